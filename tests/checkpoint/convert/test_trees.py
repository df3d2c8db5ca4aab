"""Trees of JAX stacks: what Orbax and Flax wrote of a user's own modules, with optax's Adam."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization

from checkpoint.convert.formats import open_place
from checkpoint.convert.msgpack_trees import read_msgpack
from checkpoint.convert.native import NativeTensors
from checkpoint.convert.orbax_trees import read_orbax
from sharding.errors import MismatchError, UnsafeInputError
from trainer.commands.main import main

L, D, N, K, H, F, V = 3, 6, 4, 2, 4, 10, 7
COUNT = 5
CONFIG = {"model_type": "mine", "vocab_size": V, "num_hidden_layers": L, "hidden_size": D,
          "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H, "eps": 1e-5,
          "intermediate_size": F, "max_position_embeddings": 32}  # fmt: skip
FAMILY = '''
from checkpoint.convert.families import HEAD_DIM, SIZES, Family
from checkpoint.convert.fields import Field, Rope

FAMILY = Family(
    model_type="mine", architecture="Mine", prefix="", table="""{table}""",
    fields=(*SIZES, Field("num_key_value_heads", "kv_heads"), Field("eps", "norm_eps", float),
            HEAD_DIM, Rope()),
)
'''
SCANNED = """
embedding: V D                   = tok.table: V D
head: V D                        = readout: D V
final_norm/scale: D              = out_norm: D
layers/attention_norm/scale: L D = trunk.n1[_,{L}]: D
layers/mlp_norm/scale: L D       = trunk.n2[_,{L}]: D
layers/attention/wq: L D (K G) H & layers/attention/wk: L D K H & layers/attention/wv: L D K H \\
    = trunk.qkv[_,{L}]: D (K [(G H) | H | H])
layers/attention/wo: L N H D     = trunk.o[_,{L}]: (N H) D
layers/mlp/gate: L D F & layers/mlp/up: L D F = trunk.gate_up[_,{L}]: D [ | ] F
layers/mlp/down: L F D           = trunk.down[_,{L}]: F D
"""
APART = SCANNED.replace("[_,{L}]", "").replace("trunk", "trunk.{L}")
SHAPES = {"n1": (D,), "n2": (D,), "qkv": (D, (N + 2 * K) * H), "o": (N * H, D),
          "gate_up": (D, 2, F), "down": (F, D)}  # fmt: skip


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        for name, shape in SHAPES.items():
            self.param(name, nn.initializers.zeros, shape)
        return x, None


class Tokens(nn.Module):
    @nn.compact
    def __call__(self):
        self.param("table", nn.initializers.zeros, (V, D))


class Net(nn.Module):
    """Layers scanned, their axis the second."""

    @nn.compact
    def __call__(self, x):
        Tokens(name="tok")()
        scan = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=L)
        self.param("readout", nn.initializers.zeros, (D, V))
        self.param("out_norm", nn.initializers.zeros, (D,))
        return scan(name="trunk")(x, None)[0]


class Layer(nnx.Module):
    def __init__(self):
        for name, shape in SHAPES.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))


class Table(nnx.Module):
    def __init__(self):
        self.table = nnx.Param(jnp.zeros((V, D)))


class NnxNet(nnx.Module):
    """Layers apart, in a list."""

    def __init__(self):
        self.tok, self.trunk = Table(), nnx.List([Layer() for _ in range(L)])
        self.readout, self.out_norm = nnx.Param(jnp.zeros((D, V))), nnx.Param(jnp.zeros(D))


def random_bits(tree):
    """Returns a tree with random bits in its arrays, NaN payloads among them, and COUNT counts."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if leaf.dtype == np.int32:
            return np.array(COUNT, np.int32)
        return rng.integers(0, 256, (*leaf.shape, 4), np.uint8).view(np.float32)[..., 0]

    return jax.tree.map(fill, tree)


@pytest.fixture(scope="module")
def linen():
    """A training state of the Linen module: scanned parameters, clip and AdamW."""
    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, D)))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return random_bits({"params": params, "opt_state": jax.eval_shape(adam.init, params)})


@pytest.fixture(scope="module")
def of_nnx():
    """A training state of the NNX module, as its own State."""
    model = NnxNet()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    return random_bits({"model": nnx.state(model), "optimizer": nnx.state(optimizer)})


def plain(tree, *path):
    """Returns keys joined by dots → array, of the parameters below `path`."""
    for key in path:
        tree = tree[key]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    key_of = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))))  # noqa: E731
    names = {".".join(map(key_of, path)): np.asarray(leaf) for path, leaf in leaves}
    return {name.removesuffix(".value"): leaf for name, leaf in names.items()}


def ours_of(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns our arrays, by NumPy alone, from layers apart."""

    def stack(name):
        return np.stack([theirs[f"trunk.{i}.{name}"] for i in range(L)])

    groups = stack("qkv").reshape(L, D, K, N // K + 2, H)
    return {
        "embedding": theirs["tok.table"], "head": theirs["readout"].T,
        "final_norm/scale": theirs["out_norm"], "layers/attention_norm/scale": stack("n1"),
        "layers/mlp_norm/scale": stack("n2"), "layers/mlp/down": stack("down"),
        "layers/attention/wq": groups[:, :, :, :-2].reshape(L, D, N, H),
        "layers/attention/wk": groups[:, :, :, -2], "layers/attention/wv": groups[:, :, :, -1],
        "layers/attention/wo": stack("o").reshape(L, N, H, D),
        "layers/mlp/gate": stack("gate_up")[:, :, 0], "layers/mlp/up": stack("gate_up")[:, :, 1],
    }  # fmt: skip


def unscanned(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, array in theirs.items():
        if name.startswith("trunk."):
            found |= {f"trunk.{i}.{name[6:]}": array[:, i] for i in range(L)}
        else:
            found[name] = array
    return found


def check(place: str, table: str, parts: dict[str, dict], tmp_path: Path) -> None:
    """Converts and compares every array, Adam's moments and count with `parts`, bit for bit."""
    (tmp_path / "like").mkdir()
    (tmp_path / "like/config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "mine.py").write_text(FAMILY.replace("{table}", table))
    command = ["convert", place, f"torus:{tmp_path}/start", f"--like={tmp_path}/like",
               f"--family={tmp_path}/mine.py"]  # fmt: skip
    assert main([*command, "--with-optimizer"]) == 0
    found = NativeTensors(tmp_path / "start/checkpoints", 0, "")
    want = {f"{part}/{name}": a for part, theirs in parts.items()
            for name, a in ours_of(theirs).items()}  # fmt: skip
    want["optimizer/count"] = np.array(COUNT, np.int32)
    assert set(found.facts) == set(want)
    for name, array in want.items():
        if array.shape and array.shape[0] == V:  # the vocabulary is padded
            array = np.pad(array, ((0, found.facts[name][1][0] - V), (0, 0)))
        read = found.read(name, (), 0, array.shape[0] if array.shape else 1)
        assert (read.shape, read.tobytes()) == (array.shape, array.tobytes()), name


def parts_of(linen) -> dict[str, dict]:
    adam = linen["opt_state"][1][0]
    trees = {"params": linen["params"], "optimizer/mu": adam.mu, "optimizer/nu": adam.nu}
    return {part: unscanned(plain(tree, "params")) for part, tree in trees.items()}


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(True, False), (True, True), (False, False),
                                              (False, True)])  # fmt: skip
def test_a_scanned_linen_module_becomes_ours(ocdbt, zarr3, linen, tmp_path):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as saver:
        saver.save(tmp_path / "orbax", linen)
    check(str(tmp_path / "orbax"), SCANNED, parts_of(linen), tmp_path)


def test_an_nnx_module_in_a_manager_becomes_ours(of_nnx, tmp_path):
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        manager.save(2, args=ocp.args.StandardSave(jax.tree.map(np.zeros_like, of_nnx)))
        manager.save(10, args=ocp.args.StandardSave(of_nnx))
    adam = ("optimizer", "opt_state", 0)
    parts = {"params": plain(of_nnx, "model"), "optimizer/mu": plain(of_nnx, *adam, "mu"),
             "optimizer/nu": plain(of_nnx, *adam, "nu")}  # fmt: skip
    check(str(tmp_path / "orbax"), APART, parts, tmp_path)


def test_flax_msgpack_becomes_ours(linen, tmp_path):
    (tmp_path / "state.msgpack").write_bytes(serialization.to_bytes(linen))
    check(str(tmp_path / "state.msgpack"), SCANNED, parts_of(linen), tmp_path)


def test_a_stream_of_easylm_becomes_ours(linen, tmp_path):
    """As EasyLM's StreamingCheckpointer packs it: (keys, bytes of Flax) one after the other."""
    packer = msgpack.Packer()
    flat = serialization.to_state_dict(linen)
    with (tmp_path / "streaming_train_state").open("wb") as file:
        for path, leaf in jax.tree_util.tree_leaves_with_path(flat):
            keys = tuple(key.key for key in path)
            file.write(packer.pack((keys, serialization.to_bytes(leaf))))
    place = f"msgpack:{tmp_path}/streaming_train_state"
    check(place, SCANNED, parts_of(linen), tmp_path)


def test_flax_msgpack_in_chunks_and_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    half, numbers = jnp.ones(3, "bfloat16"), np.arange(60, dtype=np.float32).reshape(5, 12)
    tree = {"a": numbers, "b": {"c": half}, "n": 3, "s": np.float32(2)}
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree, in_place=True))
    kind, path = open_place(str(tmp_path / "x.msgpack"))
    found = read_msgpack(path)
    assert kind == "msgpack" and found.left == ["n"]
    assert found.read("a", (), 1, 3).tolist() == numbers[1:3].tolist()
    assert found.read("b.c", (), 0, 3).tobytes() == np.asarray(half).tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xc7\x04\x02abcd", "extension 2 is not an array of Flax"),
        (b"\x81\xa1a\xc7\x08\x01\x93\x91\x02\xa7float32", "msgpack"),
        (b"\xdd\xff\xff\xff\xff", "4294967295 bytes or values in 0 bytes"),
        (b"\xdf\xff\xff\xff\xff" + b"\x00" * 9, "4294967295 bytes or values"),
        (b"\x81\xa1a" * 500, "deeper ones"),
        (b"\x82\xa1a\x01\xa1a\x01", "there twice"),
        (b"\xc1", "begins no value"),
        (b"\x81\xa1a\xcb\x00", "ends inside a value"),
    ],
)
def test_hostile_msgpack_is_refused(data, message, tmp_path):
    (tmp_path / "x.msgpack").write_bytes(data)
    with pytest.raises(UnsafeInputError, match=message):
        read_msgpack(tmp_path / "x.msgpack")


# ---------------------------------------------------------------- Orbax, hostile


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small tree, a folder per array."""
    folder = tmp_path_factory.mktemp("orbax") / "item"
    tree = {"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": {"c": np.int32(4)}, "s": "x"}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as saver:
        saver.save(folder, tree)
    return folder


@pytest.fixture
def item(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "item")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_tree_is_read_by_rows_and_what_is_no_array_stays(item):
    found = read_orbax(item)
    assert found.left == ["s"]
    assert found.facts == {"a": (np.dtype("float32"), (4, 3)), "b.c": (np.dtype("int32"), ())}
    assert found.read("a", (), 1, 3).tolist() == [[3, 4, 5], [6, 7, 8]]


def test_items_of_a_step_are_told_apart_by_name(saved, tmp_path):
    for name in ("params", "ema"):
        shutil.copytree(saved, tmp_path / "step_3" / name)
    assert set(read_orbax(tmp_path).facts) == {"params.a", "params.b.c", "ema.a", "ema.b.c"}


def keys(*names):
    entry = {"key_metadata": [{"key": name} for name in names],
             "value_metadata": {"value_type": "jax.Array"}}  # fmt: skip
    return lambda item: edit(item / "_METADATA", tree_metadata={str(names): entry})


DAMAGE = {
    "no tree": (lambda i: edit(i / "_METADATA", tree_metadata=[]), "does not describe a tree"),
    "no JSON": (lambda i: (i / "_METADATA").write_bytes(b"{]"), "is not JSON"),
    "a name that leads out": (keys("../outside/a"), "is unsafe"),
    "an array that is not there": (keys("z"), "cannot be read"),
    "a huge array": (lambda i: edit(i / "a/.zarray", shape=[2**50, 3]), "bytes in"),
    "a huge chunk": (lambda i: edit(i / "a/.zarray", chunks=[2**40, 3]), "in chunks of"),
    "blosc": (
        lambda i: edit(
            i / "a/.zarray", compressor={"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}
        ),
        "blosc",
    ),
    "a link out": (lambda i: os.symlink("/etc/passwd", i / "a/0.1"), "link out of its folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_hostile_orbax_is_refused(name, item):
    damage, message = DAMAGE[name]
    damage(item)
    with pytest.raises(UnsafeInputError, match=message):
        read_orbax(item)


@pytest.mark.parametrize("damage", [os.unlink, lambda p: os.truncate(p, 9)])
def test_a_damaged_chunk_is_refused_when_it_is_read(damage, item):
    damage(item / "a/0.0")
    found = read_orbax(item)
    with pytest.raises(UnsafeInputError, match="`a` cannot be read"):
        found.read("a", (), 0, 4)


def test_a_folder_without_items_is_refused(tmp_path):
    with pytest.raises(MismatchError, match="holds no _METADATA of Orbax"):
        read_orbax(tmp_path)


def test_a_stack_without_the_axis_is_refused(linen, tmp_path, capsys):
    (tmp_path / "state.msgpack").write_bytes(serialization.to_bytes(linen))
    table = SCANNED.replace("n1[_,{L}]", "n1[_,_,_,{L}]")
    with pytest.raises(AssertionError):
        check(str(tmp_path / "state.msgpack"), table, parts_of(linen), tmp_path)
    assert "cannot be taken apart along axis 3" in capsys.readouterr().err
