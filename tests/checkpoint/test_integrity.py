"""What was saved comes back bit for bit, or is refused by name: flips, cuts, swaps, edits."""

import gc
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.config import CheckpointConfig
from checkpoint.fingerprint import as_text, fingerprints, part_sums, sums_text
from checkpoint.manager import CheckpointManager
from checkpoint.manifest import MANIFEST, META, integrity_record, read_manifest, read_meta
from checkpoint.steps import CheckpointError, complete_steps
from checkpoint.storage import load_step
from checkpoint.tree import flatten
from sharding.errors import UsageError
from tests.checkpoint.test_manager import make_mesh, odd_bits
from trainer.commands import verify

U32 = 2**32
# Orbax leaves its other reads running when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def leftovers():
    """Collects what failed reads left behind while warnings about it are still ignored."""
    yield
    gc.collect()


def oracle(x: np.ndarray) -> str:
    """The fingerprint in plain integers: what every version must go on computing."""

    def mix(v: int) -> int:
        v = (v ^ v >> 16) * 0x85EBCA6B % U32
        v = (v ^ v >> 13) * 0xC2B2AE35 % U32
        return v ^ v >> 16

    word = np.uint32 if x.dtype.itemsize == 8 else f"u{x.dtype.itemsize}"
    bits = np.ascontiguousarray(x).view(word).reshape((*x.shape, -1))
    if x.dtype.itemsize != 8:
        bits = bits[..., 0]
    high = low = 0
    for index, value in np.ndenumerate(bits):
        key, stride = 0, 1
        for axis in reversed(range(bits.ndim)):
            key = (key + index[axis] * (stride * 0x9E3779B1 % U32)) % U32
            if axis == 0:
                key ^= index[0] * 0x85EBCA77 % U32
            stride *= bits.shape[axis]
        first = mix(int(value) * 0xC2B2AE3D % U32 ^ mix(key))
        second = (first ^ first >> 13) * 0x27D4EB2F % U32
        high, low = (high + first) % U32, (low + (second ^ second >> 16)) % U32
    return f"{high:08x}{low:08x}"


def fingerprint(x) -> str:
    return as_text(fingerprints({"x": x}), ["x"])["x"]


DTYPES = (np.float32, jnp.bfloat16, jnp.float8_e4m3fn, np.int32, np.uint8, np.bool_)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)], ids=str)
def test_fingerprint_is_what_it_was(dtype, shape):
    data = np.random.default_rng(1).integers(0, 2**31, shape).astype(dtype)
    assert fingerprint(jnp.asarray(data)) == oracle(np.asarray(data))


def test_fingerprint_adds_up_from_parts():
    x = np.random.default_rng(2).normal(size=(3, 4, 5)).astype(jnp.bfloat16)
    parts = [((i, j, 0), x[i : i + 1, j : j + 2]) for i in (2, 0, 1) for j in (0, 2)]
    sums = sum(part_sums(part, first, x.shape) for first, part in parts)
    assert sums_text(sums) == fingerprint(x) == oracle(x)


PART_DTYPES = (*DTYPES, np.complex64, jnp.int4, jnp.uint4)


@pytest.mark.parametrize("dtype", PART_DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (4, 3, 5)], ids=str)
def test_parts_on_the_host_are_what_devices_compute(dtype, shape):
    x = np.random.default_rng(3).integers(-8, 8, shape).astype(np.int8).astype(dtype)
    want = fingerprint(jnp.asarray(x))
    assert sums_text(part_sums(x, (0,) * len(shape), shape)) == want
    if shape:
        parts = [((i, *(0 for _ in shape[1:])), x[i : i + 2]) for i in range(0, shape[0], 2)]
        assert sums_text(sum(part_sums(part, first, shape) for first, part in parts)) == want


def test_a_part_in_several_pieces_is_refused():
    x = np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="not in one piece"):
        part_sums(x[:, :3], (0, 0), x.shape)


def test_fingerprint_does_not_depend_on_the_mesh():
    data, dtype, shape = odd_bits(np.float32, (8, 16))
    x = np.frombuffer(data, dtype).reshape(shape)
    found = set()
    for sizes in ((1, 1), (8, 1), (4, 2), (2, 4), (1, 8)):
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            found.add(fingerprint(jax.device_put(x, NamedSharding(mesh, P("fsdp", "tensor")))))
    assert found == {oracle(x)}


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_change_shows(data):
    x = np.arange(24, dtype=np.float32).reshape(4, 6) % data.draw(st.sampled_from([2, 24]))
    before = fingerprint(x)
    y = x.copy().reshape(-1)
    kind = data.draw(st.sampled_from(["flip", "swap", "roll", "zero"]))
    i, j = data.draw(st.tuples(st.integers(0, 23), st.integers(0, 23)))
    if kind == "flip":
        y.view(np.uint32)[i] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    elif kind == "swap":
        y[[i, j]] = y[[j, i]]
    elif kind == "roll":
        y = np.roll(y.reshape(4, 6), i, axis=0).reshape(-1)
    else:
        y[min(i, j) : max(i, j) + 1] = 0
    same = y.tobytes() == x.tobytes()
    assert (fingerprint(y.reshape(4, 6)) == before) == same


# ---------------------------------------------------------------- damage on disk


def state(step: int) -> dict:
    rng = np.random.default_rng(step)
    normal = rng.normal(size=(64, 32)).astype(np.float32)
    return {
        "params": {"w": normal, "half": normal.astype(jnp.bfloat16), "b": normal[0]},
        "opt": {"nu": {"w": normal**2 * 1e-6}, "count": np.full((), step, np.int32)},
    }


def meta(step: int) -> dict:
    return {"data": {"next_row": step * 8, "seed": 0}, "note": "é"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("integrity") / "run"
    with CheckpointManager(folder, CheckpointConfig(every=1, keep_last=3)) as manager:
        for step in (1, 2):
            assert manager.save(step, jax.tree.map(jnp.asarray, state(step)), meta(step))
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def abstract():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state(1))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refused_or_same(folder: Path, step: int = 2) -> bool:
    """Whether the step is refused; if it is not, what it returns must be what was saved."""
    try:
        found, about = load_step(folder, step, abstract())
    except (CheckpointError, UsageError) as error:
        assert str(step) in str(error)
        return True
    for name, leaf in flatten(found).items():
        assert np.asarray(leaf).tobytes() == flatten(state(step))[name].tobytes(), name
    assert about == meta(step)
    return False


def flip_many(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Flips `count` single bits, spread over all files, one at a time; returns refusals by file."""
    rng = np.random.default_rng(seed)
    paths = [path for path in files(folder / "2") if path.stat().st_size]
    refused: dict[str, int] = {}
    for number in range(count):
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        bit = int(rng.integers(8 * len(whole)))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        name = path.relative_to(folder / "2").as_posix()
        refused[name] = refused.get(name, 0) + refused_or_same(folder)
        path.write_bytes(whole)
    assert not refused_or_same(folder)  # each flip was undone
    return refused


def test_flipped_bits_are_refused_or_harmless(run):
    refused = flip_many(run, 4 * len(files(run / "2")), seed=0)
    # Harmless flips hit what no restore reads; in arrays and in our own files there are none.
    for ours in ("integrity", "meta", "manifest"):
        assert refused[f"{ours}/data.json"] >= 4, ours
    assert sum(count for name, count in refused.items() if "/d/" in name) > 0


@pytest.mark.soak
def test_two_thousand_flipped_bits(run):
    assert sum(flip_many(run, 2000, seed=1).values()) > 500


def test_cut_emptied_zeroed_and_missing_files(run):
    refused = 0
    for number, path in enumerate(files(run / "2")):  # all kinds: tests/checkpoint/test_damages.py
        whole = path.read_bytes()
        half = len(whole) // 2
        page = whole[:half] + bytes(min(4096, len(whole) - half)) + whole[half + 4096 :]
        path.write_bytes((whole[:half], b"", page)[number % 3])
        refused += refused_or_same(run)
        path.unlink()
        refused += refused_or_same(run)
        path.write_bytes(whole)
    assert refused > 10


def test_files_swapped_between_steps_are_refused(run):
    for item in sorted(path.name for path in (run / "2").iterdir() if path.is_dir()):
        shutil.move(run / "2" / item, run / "aside")
        shutil.copytree(run / "1" / item, run / "2" / item)
        # Both steps hold the same arrays, so their manifests may be equal to the second.
        assert refused_or_same(run) or item == MANIFEST, item
        shutil.rmtree(run / "2" / item)
        shutil.move(run / "aside", run / "2" / item)
    shutil.rmtree(run / "2")
    shutil.copytree(run / "1", run / "2")
    with pytest.raises(CheckpointError, match="its files were saved as step 1"):
        read_meta(run, 2)


def test_edited_metadata_is_refused(run):
    path = run / "2" / META / "data.json"
    edited = json.loads(path.read_text())
    edited["data"]["next_row"] = 0
    path.write_text(json.dumps(edited))
    with pytest.raises(CheckpointError, match="meta is not what was saved"):
        load_step(run, 2, abstract())
    record = integrity_record(2, {}, read_manifest(run, 2), edited)
    (run / "2" / "integrity" / "data.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="5 of 5 arrays are not the bits that were saved"):
        load_step(run, 2, abstract())


def test_the_array_is_named_and_the_check_can_be_turned_off(run):
    part = next(p for p in files(run / "2") if "/d/" in p.as_posix() and p.stat().st_size > 20_000)
    damaged = bytearray(part.read_bytes())
    place = damaged.find(state(2)["params"]["w"][:1].tobytes())
    assert place > 0
    damaged[place] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"1 of 5 arrays .* saved: params/w$"):
        load_step(run, 2, abstract())
    load_step(run, 2, {"opt": abstract()["opt"]}, partial=True)  # the others are sound
    found, _ = load_step(run, 2, abstract(), verify=False)
    assert (np.asarray(found["params"]["w"]) != state(2)["params"]["w"]).sum() == 1


def test_the_newest_sound_step_is_taken_and_the_damaged_one_set_aside(run):
    (run / "2" / "meta" / "data.json").write_text("{}")
    with CheckpointManager(run, CheckpointConfig(every=1)) as manager:
        found = manager.restore_newest(abstract())
        assert found.step == 1
        assert found.meta == meta(1)
        assert "step 2" in found.damaged[0]
        assert complete_steps(run) == [1]
        assert (run / "2.damaged" / "meta").is_dir()
        assert manager.save(2, jax.tree.map(jnp.asarray, state(2)), meta(2))
    assert complete_steps(run) == [1, 2]
    assert not refused_or_same(run)


def test_only_damaged_steps_is_an_error_that_names_them(run):
    for step in (1, 2):
        (run / str(step) / "meta" / "data.json").unlink()
    with (
        CheckpointManager(run, CheckpointConfig()) as manager,
        pytest.raises(CheckpointError, match=r"step 2 .*; .*step 1 "),
    ):
        manager.restore_newest(abstract())
    assert complete_steps(run) == [1, 2]  # nothing was touched


def test_verify_command_names_what_is_damaged(run, capsys):
    assert verify.main([str(run)]) == 0
    assert capsys.readouterr().out.count("all as saved") == 2
    part = max(
        (p for p in files(run / "2") if "/d/" in p.as_posix()), key=lambda p: p.stat().st_size
    )
    damaged = bytearray(part.read_bytes())
    damaged[damaged.find(state(2)["params"]["w"][:1].tobytes())] ^= 1
    part.write_bytes(damaged)
    assert verify.main([str(run)]) == 1
    told = capsys.readouterr()
    assert "step 1: 5 arrays" in told.out
    assert "1 of 5 arrays are not the bits that were saved: params/w" in told.err
    assert verify.main([str(run / "1")]) == verify.main([str(run), "--step", "1"]) == 0
