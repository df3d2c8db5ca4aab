"""From devices into memory and back, in one process with a real keeper: any mesh, the same bits."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.fingerprint import box_sums, fingerprints
from checkpoint.memory import restore
from checkpoint.memory.slots import HEADER
from checkpoint.memory.snapshots import Snapshots, _plan
from checkpoint.memory.wire import VARIABLE, Directory, Refused
from sharding.errors import UsageError
from trainer.recovery.keeper import KeeperProcess

SHAPES = {"a": ((16, 24), "float32"), "b": ((8, 3), "bfloat16"), "c": ((), "int32")}


def layout(data: int, fsdp: int) -> dict[str, NamedSharding]:
    devices = np.asarray(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp"))
    specs = {"a": P("data", "fsdp"), "b": P("fsdp"), "c": P()}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def arrays(seed: int, where: dict[str, NamedSharding]) -> dict:
    draw = np.random.default_rng(seed)
    flat = {}
    for name, (shape, dtype) in SHAPES.items():
        values = np.asarray(draw.integers(-99, 99, shape)).astype(jnp.dtype(dtype))
        flat[name] = jax.device_put(values, where[name])
    return {"x": {"a": flat["a"]}, "b": flat["b"], "c": flat["c"]}


def abstract(where: dict[str, NamedSharding]) -> dict:
    def leaf(name):
        shape, dtype = SHAPES[name]
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where[name])

    return {"x": {"a": leaf("a")}, "b": leaf("b"), "c": leaf("c")}


@pytest.fixture
def snapshots(tmp_path, monkeypatch):
    directory = Directory(str(tmp_path))
    monkeypatch.setenv(VARIABLE, directory.environment()[VARIABLE])
    with KeeperProcess(directory) as keeper, Snapshots(1) as made:
        keeper.ensure()
        made.keeper = keeper
        yield made


def wait_until_due(snapshots: Snapshots, step: int) -> None:
    until = time.monotonic() + 20
    while not snapshots.due(step):
        assert time.monotonic() < until
        time.sleep(0.001)


def next_due(snapshots: Snapshots, step: int) -> int:
    """Does steps, from `step` on, until one is due."""
    until = time.monotonic() + 20
    while not snapshots.due(step):
        assert time.monotonic() < until
        time.sleep(0.05)
        step += 1
    return step


def take(snapshots: Snapshots, step: int, state: dict) -> None:
    wait_until_due(snapshots, step)
    write(snapshots, step, state)


def write(snapshots: Snapshots, step: int, state: dict) -> None:
    until = time.monotonic() + 20
    snapshots.take(step, state, lambda: {"data": {"next_row": 8 * step}})
    snapshots._drain.result()
    while snapshots._slots.committed < step:
        assert time.monotonic() < until
        time.sleep(0.001)


def same(one: dict, other: dict) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.parametrize("mesh", [(2, 4), (1, 8), (4, 1), (1, 1)])
def test_a_snapshot_comes_back_on_any_mesh_though_its_buffers_were_donated(snapshots, mesh):
    where = layout(2, 4)
    state, kept = arrays(1, where), arrays(1, where)
    snapshots.start(0, state, held=False)
    take(snapshots, 1, state)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    take(snapshots, 2, state)
    state = bump(state)  # the copy was dispatched before
    found = snapshots.restore_newest(abstract(layout(*mesh)), None)
    assert (found.step, found.source, found.meta) == (2, "memory", {"data": {"next_row": 16}})
    assert same(found.state, kept)
    assert found.state["b"].sharding == layout(*mesh)["b"]
    assert snapshots.restore_newest(abstract(where), 3) is None  # the disk has a newer one
    assert snapshots.restore_newest(abstract(where), 2).step == 2


def test_few_sums_are_under_way_at_a_time(snapshots, monkeypatch):
    """Were there 32, a training step on the same CPU devices would wait for them, and they for it.

    So a run on eight of them hung, once in some hundred.
    """
    waiting, most = set(), []

    class Sum:
        def __init__(self, value: jax.Array) -> None:
            self._value = value
            waiting.add(self)
            most.append(len(waiting))

        def block_until_ready(self) -> None:
            waiting.discard(self)

        def __array__(self, dtype=None, copy=None) -> np.ndarray:
            waiting.discard(self)
            return np.asarray(self._value)

    monkeypatch.setattr("checkpoint.memory.snapshots.box_sums", lambda *a: Sum(box_sums(*a)))
    state = arrays(1, layout(2, 4))
    snapshots.start(0, state, held=False)
    take(snapshots, 1, state)
    assert len(most) == 13 and max(most) == 4 and not waiting
    found = snapshots.restore_newest(abstract(layout(1, 1)), None)
    assert same(found.state, state)


def test_damage_leads_to_the_snapshot_before(snapshots):
    where = layout(1, 8)
    snapshots.start(0, arrays(0, where), held=False)
    for step in (1, 2):
        take(snapshots, step, arrays(step, where))
    slots = snapshots._slots
    slots.data(slots.held()[2])[HEADER + 1] ^= 4
    found = snapshots.restore_newest(abstract(where), None)
    assert found.step == 1 and same(found.state, arrays(1, where))
    slots.data(slots.held()[1])[HEADER + 2] ^= 1
    assert snapshots.restore_newest(abstract(where), None) is None


def test_damage_on_the_way_to_the_device_shows(snapshots, monkeypatch):
    where = layout(1, 8)
    snapshots.start(0, arrays(0, where), held=False)
    take(snapshots, 1, arrays(1, where))
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, d, **how: put(x + (x.ndim == 0), d))
    assert snapshots.restore_newest(abstract(where), None) is None
    monkeypatch.undo()


def test_a_keeper_that_was_replaced_has_the_next_snapshot_within_seconds(snapshots):
    where = layout(1, 8)
    snapshots.start(0, arrays(0, where), held=False)
    take(snapshots, 1, arrays(1, where))
    wait_until_due(snapshots, 2)  # the next one is named, and nothing is told after that
    snapshots.keeper._process.kill()
    snapshots.keeper._process.wait()
    assert snapshots.keeper.ensure()
    step = next_due(snapshots, 3)
    write(snapshots, step, arrays(step, where))
    assert snapshots.restore_newest(abstract(where), None).step == step


def test_a_step_that_nobody_can_have_named_is_no_news(snapshots, monkeypatch):
    """Whatever wrote it: a keeper is asked anew, and snapshots go on."""
    monkeypatch.setattr("checkpoint.memory.snapshots._ANEW", 0.1)
    where = layout(1, 8)
    snapshots.start(0, arrays(0, where), held=False)
    take(snapshots, 1, arrays(1, where))
    snapshots._slots.next = 10**9
    step = next_due(snapshots, 2)
    write(snapshots, step, arrays(2, where))
    assert snapshots.restore_newest(abstract(where), None).step == step < 1000


def test_room_is_made_for_the_names_of_all_arrays(snapshots, monkeypatch):
    """A process that writes a few of many arrays has the sizes of all in its index."""
    monkeypatch.setattr("checkpoint.memory.snapshots._SPARE_TEXT", 2**10)
    plan = _plan
    monkeypatch.setattr(
        "checkpoint.memory.snapshots._plan", lambda *a: (plan(*a)[0][:3], plan(*a)[1])
    )
    one = NamedSharding(jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("fsdp",)), P())
    zero = jax.device_put(jnp.zeros(()), one)
    state = {f"layers_{n}_attention_and_a_long_name": zero for n in range(1728)}
    snapshots.start(0, state, held=False)
    take(snapshots, 1, state)
    assert snapshots._slots.held().keys() == {1}


def test_a_description_that_has_grown_too_large_ends_no_run(snapshots):
    where = layout(1, 8)
    state = arrays(0, where)
    snapshots.start(0, state, held=False)
    wait_until_due(snapshots, 1)
    snapshots.take(1, state, lambda: {"text": "x" * 2**20})
    snapshots._drain.result()
    assert not snapshots._slots.held()
    step = next_due(snapshots, 2)
    write(snapshots, step, state)
    assert snapshots.restore_newest(abstract(where), None).step == step


def test_what_keepers_hold_is_restored_while_no_new_ones_are_taken(snapshots, monkeypatch):
    """As fewer hosts do that go on."""
    where = layout(2, 4)
    snapshots.start(0, arrays(1, where), held=False)
    take(snapshots, 1, arrays(1, where))
    directory = dataclasses.replace(snapshots._directory, takes=False)
    monkeypatch.setenv(VARIABLE, directory.environment()[VARIABLE])
    with Snapshots(1) as fewer:
        found = fewer.restore_newest(abstract(layout(1, 4)), None)
        assert found.step == 1 and same(found.state, arrays(1, where))
        fewer.start(1, found.state, held=found.same_layout)
        assert not any(fewer.due(step) for step in range(2, 50))
    assert snapshots._slots.held().keys() == {1}


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("x"), OSError("gone"), Refused("")])
def test_whatever_goes_wrong_in_one_process_is_told_to_the_others(snapshots, monkeypatch, error):
    where = layout(1, 8)
    snapshots.start(0, arrays(0, where), held=False)
    take(snapshots, 1, arrays(1, where))
    told = []
    monkeypatch.setattr(restore, "_load", lambda *_: (_ for _ in ()).throw(error))
    monkeypatch.setattr(restore, "_first_text", lambda text: told.append(text) or text)
    assert snapshots.restore_newest(abstract(where), None) is None
    assert told and all(told)


def test_a_problem_that_is_cut_in_a_letter_is_still_read(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather = restore.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda text: np.stack([text * 0 + 32, text]))
    assert restore._first_text("é" * 150).startswith("é" * 99)
    assert restore._first_text("x" + "é" * 150).startswith("xé")
    assert restore._first_text("") == ""


def test_without_a_keeper_nothing_happens(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with Snapshots(1) as off:
        off.start(0, {}, held=False)
        assert not off.due(1) and off.restore_newest({}, None) is None


def test_a_state_that_does_not_fit_is_refused(snapshots, monkeypatch):
    state = arrays(0, layout(1, 1))
    monkeypatch.setattr("checkpoint.memory.snapshots._SPARE_TEXT", 2**42)
    with pytest.raises(UsageError, match=r"do not fit into .* of free memory"):
        snapshots.start(0, state, held=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float16"])
def test_boxes_add_up_to_the_fingerprint(dtype):
    draw = np.random.default_rng(3)
    whole = draw.integers(-99, 99, (6, 10, 4)).astype(jnp.dtype(dtype))
    cuts = [(slice(0, 2), slice(2, 6)), (slice(0, 7), slice(7, 10)), (slice(0, 1), slice(1, 4))]
    boxes = [(a, b, c) for a in cuts[0] for b in cuts[1] for c in cuts[2]]
    firsts = [tuple(s.start for s in box) for box in boxes]
    parts = zip([whole[box] for box in boxes], firsts, strict=True)
    sums = [box_sums(box, first, whole.shape) for box, first in parts]
    total = np.add.reduce(sums, axis=0, dtype=np.uint32)
    assert (total == np.asarray(fingerprints({"w": jnp.asarray(whole)}))[0]).all()
