"""Saving and restoring in one process: bits, meshes, retention, refusals, damage, failures."""

import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from checkpoint import manager as manager_module
from checkpoint import steps
from checkpoint import storage as storage_module
from checkpoint.config import CheckpointConfig
from checkpoint.convert.native import NativeTensors
from checkpoint.manager import CheckpointManager
from checkpoint.manifest import read_manifest
from checkpoint.steps import CheckpointError
from checkpoint.storage import load_step
from checkpoint.tree import name_optimizer, unname_optimizer
from sharding.errors import UsageError

META = {"data_step": 7, "axes": {"w": ["embed", None]}, "flag": True, "loss": 2.5, "note": "é"}
SPECS = {"w": P("fsdp", "tensor"), "b": P("tensor"), "count": P()}


def make_mesh(shape=(4, 2), axes=("fsdp", "tensor"), kind=AxisType.Explicit):
    devices = np.array(jax.devices()[: int(np.prod(shape))])
    return jax.sharding.Mesh(devices.reshape(shape), axes, axis_types=(kind,) * len(axes))


def odd_bits(dtype, shape):
    """Random bits, so that NaN payloads, infinities and negative zeros are among them."""
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    return np.random.default_rng(0).bytes(size), dtype, shape


def host_state():
    state = {}
    for name, dtype in (("f32", np.float32), ("bf16", jnp.bfloat16), ("f8", jnp.float8_e4m3fn)):
        data, dtype, shape = odd_bits(dtype, (8, 16))
        state[name] = {
            "w": np.frombuffer(data, dtype).reshape(shape),
            "b": np.arange(16).astype(dtype),
        }
    return {"params": state, "opt": {"count": np.int32(3) * np.ones((), np.int32)}}


def placed(mesh, state=None):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, NamedSharding(mesh, SPECS[path[-1].key])),
        state or host_state(),
    )


def target(mesh, state=None):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, SPECS[path[-1].key])
        ),
        state or host_state(),
    )


def same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            np.asarray(a)[..., None].view(np.uint8), np.asarray(b)[..., None].view(np.uint8)
        ),
        left,
        right,
    )


def save_all(folder, numbers, state=None, **settings):
    state = state if state is not None else placed(make_mesh())
    with CheckpointManager(folder, CheckpointConfig(every=1, **settings)) as manager:
        for number in numbers:
            assert manager.save(number, state, META)
    return manager


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1 and 2; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("saved")
    save_all(folder, [1, 2])
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


# --- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_every_mesh_gets_the_same_bits(saved, kind):
    for shape, axes in (
        ((4, 2), ("fsdp", "tensor")),
        ((8, 1), ("fsdp", "tensor")),
        ((2, 4), ("fsdp", "tensor")),
        ((2, 4), ("tensor", "fsdp")),
        ((1, 1), ("fsdp", "tensor")),
    ):
        mesh = make_mesh(shape, axes, kind)
        with jax.set_mesh(mesh):
            state, meta = load_step(saved, 2, target(mesh))
        same_bits(state, host_state())
        assert meta == META
        jax.tree.map(
            lambda x, y: pytest.fail(f"{x.sharding}") if x.sharding != y.sharding else 0,
            state,
            target(mesh),
        )


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: by this process's threads


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_or_a_layer_reads_little_else(tmp_path, axis):
    shape = (4, 2048, 1024) if axis == 2 else (4096, 2048)
    state = {"w": jax.random.normal(jax.random.key(0), shape)}
    save_all(tmp_path, [1], state)
    tensors = NativeTensors(tmp_path, 1, prefix="")
    stored = tensors._store("w")
    layer, quarter = (0,), slice(shape[axis % 2] // 4)
    where = layer if axis == 2 else (slice(None),) * axis + (quarter,)
    before = bytes_read()
    part = stored[where].read().result()
    assert 0.25 * state["w"].nbytes <= bytes_read() - before <= 0.3 * state["w"].nbytes
    np.testing.assert_array_equal(part, state["w"][where if axis < 2 else 0])


def test_shards_in_one_piece_are_read_whole(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (4096, 2048))}
    save_all(tmp_path, [1], state, chunk_mib=0)
    stored = NativeTensors(tmp_path, 1, prefix="")._store("w")
    assert stored.chunk_layout.read_chunk.shape == (4096, 2048)
    np.testing.assert_array_equal(stored[:8].read().result(), state["w"][:8])


def test_one_device_and_saving_under_a_mesh(tmp_path):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        save_all(tmp_path, [5], placed(mesh))
    alone = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=SingleDeviceSharding(jax.devices()[3])
        ),
        host_state(),
    )
    same_bits(load_step(tmp_path, 5, alone)[0], host_state())


def test_optimizer_with_a_changed_chain(tmp_path):
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(16)}
    old = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    new = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask={"w": True, "b": False}),
        optax.scale_by_schedule(optax.constant_schedule(-0.1)),
    )
    opt = jax.tree.map(lambda x: x + 2, jax.jit(old.init)(params))
    save_all(tmp_path, [1], {"params": params, "opt": name_optimizer(opt)})
    like = jax.eval_shape(new.init, params)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=params["b"].sharding),
        {"params": params, "opt": name_optimizer(like)},
    )
    state, _ = load_step(tmp_path, 1, abstract)
    restored = unname_optimizer(state["opt"], like)
    same_bits(restored[0], opt[1])
    assert restored[2].count == 2


def test_stock_orbax_opens_it(saved):
    assert ocp.metadata(saved / "2").metadata["params"]["f32"]["w"].shape == (8, 16)
    with ocp.training.Checkpointer(saved) as checkpointer:
        assert checkpointer.latest.step == 2
        loaded = checkpointer.load(2, target(make_mesh((2, 4))))
    same_bits(loaded, host_state())


def test_compression_and_small_pieces_change_nothing_but_the_file(tmp_path):
    big = {"w": jnp.arange(2**20, dtype=jnp.float32).reshape(1024, 1024)}
    mesh = make_mesh()
    state = placed(mesh, big)
    save_all(tmp_path / "plain", [1], state, chunk_mib=1)
    save_all(tmp_path / "small", [1], state, compression=True, chunk_mib=1)
    for name in ("plain", "small"):
        same_bits(load_step(tmp_path / name, 1, target(mesh, big))[0], big)
    files = {name: (tmp_path / name).rglob("*") for name in ("plain", "small")}
    size = {name: sum(p.stat().st_size for p in found) for name, found in files.items()}
    assert size["small"] < size["plain"] and size["plain"] >= 2**22


def test_a_file_is_written_while_the_next_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "_DATA_FILE", 2**21)
    state = {"w": jax.random.normal(jax.random.key(0), (4, 1024, 1024))}  # 16 MiB
    save_all(tmp_path, [1], state)
    sizes = [p.stat().st_size for p in tmp_path.rglob("ocdbt.process_0/d/*")]
    assert len(sizes) > 2 and max(sizes) < 2**24
    where = SingleDeviceSharding(jax.devices()[0])
    abstract = {"w": jax.ShapeDtypeStruct((4, 1024, 1024), jnp.float32, sharding=where)}
    same_bits(load_step(tmp_path, 1, abstract)[0], state)


def test_pieces_are_no_larger_than_asked_and_quarter_both_axes(tmp_path):
    state = {"w": jnp.zeros((4096, 4096), jnp.float32)}  # 64 MiB on one device
    for mib, expected in ((1, 2**18), (2, 2**19), (16, 2**20)):
        save_all(tmp_path / str(mib), [1], state, chunk_mib=mib)
        leaf = ocp.metadata(tmp_path / str(mib) / "1").metadata["w"]
        assert np.prod(leaf.storage_metadata.chunk_shape) == expected


def test_a_failed_comparison_reads_nothing_and_says_what(saved):
    mesh = make_mesh()
    wrong = target(mesh)
    leaf = wrong["params"]["f32"]["w"]
    wrong["params"]["f32"]["w"] = jax.ShapeDtypeStruct(
        (8, 16), jnp.bfloat16, sharding=leaf.sharding
    )
    with pytest.raises(
        UsageError,
        match=r"step 2 in .* does not match: holds `params/f32/w` as "
        r"float32\[8, 16\], wanted bfloat16\[8, 16\]$",
    ):
        load_step(saved, 2, wrong)
    wrong["params"]["f32"]["w"] = jax.ShapeDtypeStruct((16, 8), leaf.dtype, sharding=leaf.sharding)
    with pytest.raises(UsageError, match=r"wanted float32\[16, 8\]"):
        load_step(saved, 2, wrong)


def test_missing_and_extra_names(saved):
    wrong = target(make_mesh())
    wrong["opt"] = {"counts": wrong["opt"]["count"], "mu": wrong["params"].pop("f8")}
    with pytest.raises(
        UsageError,
        match=r"lacks 3 array\(s\): opt/counts, opt/mu/b, opt/mu/w; "
        r"also holds 3 array\(s\): opt/count, params/f8/b, ",
    ):
        load_step(saved, 2, wrong)


def test_target_without_a_sharding_is_refused(saved):
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), host_state())
    with pytest.raises(ValueError, match=r"needs a sharding for opt/count, params/bf16/b"):
        load_step(saved, 2, bare)


def test_step_that_is_not_there(saved):
    with pytest.raises(UsageError, match=r"no step 3 in .*; complete steps are 1, 2"):
        load_step(saved, 3, target(make_mesh()))


# --- when it saves and what stays --------------------------------------------------------------


def test_interval_force_and_repetition(tmp_path):
    state = {"w": jnp.ones(4)}
    with CheckpointManager(tmp_path, CheckpointConfig(every=10, keep_ladder=0)) as manager:
        assert manager.latest() is None and manager.steps() == []
        assert [step for step in range(1, 31) if manager.save(step, state, {})] == [10, 20, 30]
        assert not manager.save(30, state, {}, force=True)  # the end of the run was just saved
        assert manager.save(33, state, {}, force=True)
        manager.wait()
        assert manager.steps() == [30, 33] and manager.latest() == 33
    with CheckpointManager(tmp_path, CheckpointConfig(every=0)) as manager:
        assert not any(manager.due(step) for step in range(100))
        manager.restore(None, abstract_of(state))
        assert not manager.save(33, state, {}, force=True)  # nothing happened since the restore


def abstract_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def test_retention(tmp_path):
    state = {"w": jnp.ones(4)}
    save_all(tmp_path, range(1, 8), state, keep_last=2, keep_every=3, keep_ladder=0)
    assert steps.complete_steps(tmp_path) == [3, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6", "7"]
    save_all(tmp_path, [8], state, keep_last=1, keep_ladder=0)
    assert steps.complete_steps(tmp_path) == [8]


def test_the_newest_good_step_stays_whatever_is_saved(tmp_path):
    state = {"w": jnp.ones(4)}
    with CheckpointManager(tmp_path, CheckpointConfig(keep_last=2, keep_ladder=0)) as manager:
        for number in range(1, 9):
            manager.save(number, state, META, force=True)
            manager.wait()
            if number in (3, 4):
                assert manager.mark_good([number]) == [number]
        assert manager.mark_good([2]) == [2]  # retired: nothing to wait for
    assert steps.good_steps(tmp_path) == [4] and steps.complete_steps(tmp_path) == [4, 7, 8]
    load_step(tmp_path, 4, abstract_of(state))  # the mark does not disturb Orbax


def test_a_step_still_being_written_is_marked_later(tmp_path):
    with CheckpointManager(tmp_path, CheckpointConfig(every=1)) as manager:
        manager.save(1, {"w": jnp.ones(4)}, META)
        written = manager.mark_good([1])
        assert written in ([], [1])
        manager.wait()
        assert manager.mark_good([1]) == [1]
    assert steps.good_steps(tmp_path) == [1]


def test_step_that_cannot_be_retired_is_no_failure(tmp_path, monkeypatch, caplog):
    def refuse(folder, step):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(manager_module.steps, "delete_step", refuse)
        save_all(tmp_path, [1, 2], {"w": jnp.ones(4)}, keep_last=1, keep_ladder=0)
    assert "step 1 stays: [Errno 13] Permission denied" in caplog.text
    save_all(tmp_path, [3], {"w": jnp.ones(4)}, keep_last=1, keep_ladder=0)
    assert steps.complete_steps(tmp_path) == [3]


def test_orbax_notes_are_dropped_and_ours_are_not(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    save_all(tmp_path, [1], {"w": jnp.ones(4)})
    assert [record.getMessage()[:26] for record in caplog.records if record.name == "absl"] == [
        "checkpoint: step 1 saved, "
    ]


def test_empty_parts_of_the_state_come_back_empty(tmp_path):
    state = {"params": {"w": jnp.ones(4), "none": {}}, "opt": {}}
    save_all(tmp_path, [1], state)
    assert load_step(tmp_path, 1, abstract_of(state))[0].keys() == state.keys()
    restored = load_step(tmp_path, 1, abstract_of(state))[0]
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_going_back_needs_the_newer_steps_gone(tmp_path):
    state = {"w": jnp.ones(4)}
    save_all(tmp_path, [1, 2, 3], state, keep_last=3)
    with CheckpointManager(tmp_path, CheckpointConfig(every=1, keep_last=3)) as manager:
        manager.restore(1, abstract_of(state))
        with pytest.raises(UsageError, match=r"cannot save step 2: .* already holds step 3"):
            manager.save(2, state, {})
        manager.discard_where(lambda step, meta: step > 1)
        assert manager.steps() == [1]
        assert manager.save(2, {"w": jnp.zeros(4)}, {})
    assert not load_step(tmp_path, 2, abstract_of(state))[0]["w"].any()


def test_donating_and_changing_what_is_being_saved(tmp_path):
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    mesh = make_mesh()
    state = {"w": jax.device_put(jnp.zeros((512, 512)), NamedSharding(mesh, P("fsdp", "tensor")))}
    shape = abstract_of(state)
    with CheckpointManager(tmp_path, CheckpointConfig(every=1, keep_last=5)) as manager:
        for step in range(1, 6):
            state = update(state)
            manager.save(step, state, {})
            manager.poll()
    for step in range(1, 6):
        assert (np.asarray(load_step(tmp_path, step, shape)[0]["w"]) == step).all()


def test_synchronous_save_is_there_on_return(tmp_path):
    with CheckpointManager(tmp_path, CheckpointConfig(every=1, asynchronous=False)) as manager:
        manager.save(1, {"w": jnp.ones(4)}, {})
        assert manager.latest() == 1


# --- refusals and failures ---------------------------------------------------------------------


def test_nothing_is_written_for_a_refused_state(tmp_path):
    with CheckpointManager(tmp_path, CheckpointConfig(every=1)) as manager:
        with pytest.raises(UsageError, match=r"the top: 'a\.b'"):
            manager.save(1, {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, {})
        with pytest.raises(UsageError, match=r"meta `when` is not JSON: .*not JSON serializable"):
            manager.save(1, {"a": jnp.ones(2)}, {"when": jnp.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_cleared_and_never_a_step(tmp_path):
    (tmp_path / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"found 3\.orbax-checkpoint-tmp \(interrupted save\)"):
        load_step(tmp_path, 3, {})
    with CheckpointManager(tmp_path, CheckpointConfig()) as manager:
        assert manager.latest() is None
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write checkpoints to"):
        CheckpointManager(tmp_path / "file" / "run", CheckpointConfig()).__enter__()
    with pytest.raises(UsageError, match=r"checkpoint\.keep_last is 0"):
        CheckpointManager(tmp_path, CheckpointConfig(keep_last=0))


def poll_for(manager, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        manager.poll()
        time.sleep(0.01)


@pytest.fixture
def broken_disk(monkeypatch):
    """Lets a test make commits fail, at a moment it chooses."""
    gate, state = threading.Event(), {"fail": True}
    real = manager_module.steps.sync_step

    def sync(folder, step):
        gate.wait(10)
        if state["fail"]:
            raise OSError(28, "No space left on device")
        real(folder, step)

    monkeypatch.setattr(manager_module.steps, "sync_step", sync)
    return gate, state


def test_failure_surfaces_at_the_next_poll_and_once(tmp_path, broken_disk):
    gate, disk = broken_disk
    state = {"w": jnp.ones(4)}
    with CheckpointManager(tmp_path, CheckpointConfig(every=1)) as manager:
        manager.save(1, state, {})
        manager.poll()  # still being written
        gate.set()
        with pytest.raises(CheckpointError, match=r"saving step 1 to .* failed: .*No space left"):
            poll_for(manager, 10)
        manager.poll()
        disk["fail"] = False
        manager.save(2, state, {})
    assert steps.complete_steps(tmp_path)[-1] == 2


def test_failure_surfaces_at_close_and_at_the_next_save(tmp_path, broken_disk):
    gate, _ = broken_disk
    gate.set()
    state = {"w": jnp.ones(4)}
    manager = CheckpointManager(tmp_path, CheckpointConfig(every=1))
    manager.save(1, state, {})
    with pytest.raises(CheckpointError, match="saving step 1"):
        manager.save(2, state, {})
    manager.save(3, state, {})
    with pytest.raises(CheckpointError, match="saving step 3"):
        manager.close()


def test_an_error_in_the_run_is_not_hidden_by_one_of_saving(tmp_path, broken_disk):
    broken_disk[0].set()
    with (
        pytest.raises(ZeroDivisionError),
        CheckpointManager(tmp_path, CheckpointConfig(every=1)) as manager,
    ):
        manager.save(1, {"w": jnp.ones(4)}, {})
        raise ZeroDivisionError


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest: .* is not JSON: Expecting"),
        ("[]", "manifest: .* is not a JSON object"),
        ('{"format": 9}', r"manifest format 9, this version reads 2"),
    ],
)
def test_manifest_that_cannot_be_used(copied, text, message):
    (copied / "2" / "manifest" / "data.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"cannot read step 2 in .*: {message}"):
        read_manifest(copied, 2)
