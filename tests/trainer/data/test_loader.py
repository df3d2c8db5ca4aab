import gc
import json
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.errors import UsageError
from tests.processes import run_processes
from trainer.data.config import FIELDS, DataConfig
from trainer.data.dataset import open_dataset
from trainer.data.loader import Loader, batch_digest, eval_batches
from trainer.data.rows import Rows, resume_row

LAYOUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
BATCH = 8


def batch_sharding(data: int = 8, seq: int = 1) -> NamedSharding:
    mesh = jax.make_mesh((data, seq), ("data", "seq"), axis_types=(AxisType.Explicit,) * 2)
    return NamedSharding(mesh, P("data", "seq"))


def config_for(folder, **values) -> DataConfig:
    return DataConfig(path=str(folder), **{"seq_len": 16, **values})


@pytest.fixture
def dataset(make_dataset):
    return open_dataset(config_for(make_dataset()))


def test_rows_hold_the_documents(dataset):
    shards = dataset.shards
    batch = dataset.rows(np.arange(dataset.rows_per_epoch))
    pieces = dataset.plan.rows(np.arange(dataset.rows_per_epoch))
    expected = {name: np.zeros_like(array) for name, array in batch.items()}
    segment = dict.fromkeys(range(dataset.rows_per_epoch), 0)
    for document, start, count, row, column in zip(
        pieces.documents, pieces.starts, pieces.counts, pieces.rows, pieces.columns, strict=True
    ):
        tokens = shards.document(document)
        at = np.s_[row, column : column + count]
        expected["tokens"][at] = tokens[start : start + count]
        expected["targets"][at] = tokens[start + 1 : start + count + 1]
        expected["positions"][at] = np.arange(count)
        segment[row] += 1
        expected["segment_ids"][at] = segment[row]
    for name in FIELDS:
        assert batch[name].dtype == np.int32
        np.testing.assert_array_equal(batch[name], expected[name])
    assert (batch["segment_ids"] > 0).sum() == np.maximum(shards.lengths - 1, 0).sum()
    assert len(shards.manifest.split("train")) > 1  # documents of several shards were read


def test_columns_are_cut_from_whole_rows(dataset):
    ids = np.asarray([5, 0, 3 * dataset.rows_per_epoch - 1])
    whole = dataset.rows(ids)
    for columns in (slice(0, 4), slice(3, 9), slice(15, 16)):
        part = dataset.rows(ids, columns)
        for name in FIELDS:
            np.testing.assert_array_equal(part[name], whole[name][:, columns])


@pytest.mark.parametrize("packing", ["bestfit", "concat"])
def test_a_row_is_the_same_in_two_instances(make_dataset, packing):
    folder = make_dataset()
    one, two = (open_dataset(config_for(folder, packing=packing)) for _ in range(2))
    rows = one.rows(np.arange(4 * one.rows_per_epoch))
    for number in np.random.default_rng(0).permutation(4 * one.rows_per_epoch)[:30].tolist():
        for name, array in two.row(number).items():
            np.testing.assert_array_equal(array, rows[name][number])


def test_grain_sees_the_same_rows(dataset):
    rows = dataset.as_grain().map(lambda row: row["tokens"])
    for number in (0, 7, 5 * dataset.rows_per_epoch):
        np.testing.assert_array_equal(rows[number], dataset.row(number)["tokens"])


def test_batches_are_the_rows_in_order_on_every_mesh(dataset):
    digests = set()
    for layout in LAYOUTS:
        sharding = batch_sharding(*layout)
        with Loader(dataset, BATCH, sharding, start_row=3) as loader:
            batches = [next(loader) for _ in range(4)]
        for step, batch in enumerate(batches):
            expected = dataset.rows(3 + step * BATCH + np.arange(BATCH))
            assert sorted(batch) == sorted(FIELDS)
            for name, array in batch.items():
                assert array.sharding == sharding and array.dtype == np.int32
                np.testing.assert_array_equal(jax.device_get(array), expected[name])
        digests.add(tuple(batch_digest(batch) for batch in batches))
    assert len(digests) == 1
    assert len(set(digests.pop())) == 4
    assert batch_digest(batches[0]) == batch_digest(dataset.rows(3 + np.arange(BATCH)))


def test_replicated_axes_and_transfer_guard(dataset):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with (
        jax.transfer_guard("disallow"),
        Loader(dataset, BATCH, NamedSharding(mesh, P("data"))) as loader,
    ):
        batch = next(loader)
        assert batch_digest(batch) == batch_digest(dataset.rows(np.arange(BATCH)))


def test_only_held_columns_are_read(dataset):
    asked = []

    class Spy(Rows):
        seq_len, rows_per_epoch = dataset.seq_len, dataset.rows_per_epoch
        fields, identity = FIELDS, dataset.identity

        def rows(self, ids, columns=slice(None)):
            asked.append((ids.tolist(), columns.start, columns.stop))
            return dataset.rows(ids, columns)

    devices = np.asarray(jax.devices()[:2]).reshape(1, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "seq"))
    Loader(Spy(), 4, NamedSharding(mesh, P("data", "seq")), prefetch=0).batch(1)
    assert sorted(asked) == [([4, 5, 6, 7], 0, 8), ([4, 5, 6, 7], 8, 16)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_at_every_step_is_exact(dataset, prefetch):
    def loader_at(start):
        return Loader(dataset, BATCH, batch_sharding(), start_row=start, prefetch=prefetch)

    def take(loader, count):
        return [batch_digest(next(loader)) for _ in range(count)]

    begin = dataset.rows_per_epoch - 60  # an epoch ends inside batch 7
    with loader_at(begin) as loader:
        unbroken = take(loader, 15)
    for step in range(1, 11):
        with loader_at(begin) as loader:
            take(loader, step)
            state = json.loads(json.dumps(loader.state()))
        start = resume_row(state, dataset)
        assert start == begin + step * BATCH
        with loader_at(start) as loader:
            assert take(loader, 5) == unbroken[step : step + 5]
            assert batch_digest(loader.batch(1)) == unbroken[step + 1]


def test_batch_size_may_change_on_resume(dataset):
    with Loader(dataset, 8, batch_sharding()) as loader:
        next(loader)
        start = resume_row(loader.state(), dataset)
    with Loader(dataset, 16, batch_sharding(), start_row=start) as loader:
        batch = next(loader)
    np.testing.assert_array_equal(
        jax.device_get(batch["tokens"]), dataset.rows(np.arange(8, 24))["tokens"]
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seq_len": 8}, r"data seq_len is 8, the checkpoint was trained with 16; accept the"),
        ({"seed": 7}, r"data seed is 7, .* with 0"),
        ({"packing": "concat"}, r"data packing is concat, .* bestfit"),
        ({"window": 5}, r"data window is 5"),
        ({"shuffle": False}, r"data shuffle is False, .* True; .*config.data.allow_change=True"),
    ],
)
def test_changed_plan_is_refused(make_dataset, change, text):
    folder = make_dataset()
    with Loader(open_dataset(config_for(folder)), BATCH, batch_sharding()) as loader:
        next(loader)
        state = loader.state()
    changed = open_dataset(config_for(folder, **change))
    with pytest.raises(UsageError, match=text):
        resume_row(state, changed)
    assert resume_row(state, changed, allow_change=True) == BATCH


def test_changed_dataset_is_refused(make_dataset):
    one, two = (open_dataset(config_for(make_dataset(f"set{n}", seed=n))) for n in range(2))
    with Loader(one, BATCH, batch_sharding()) as loader:
        state = loader.state()
    with pytest.raises(UsageError, match=r"data fingerprint is sha256:\w+, .*allow_change=True"):
        resume_row(state, two)
    with pytest.raises(UsageError, match="not one this version reads"):
        resume_row({"version": 2, "next_row": 0}, one)


def test_small_dataset_and_uneven_batch_are_refused(dataset):
    rows = dataset.rows_per_epoch
    text = rf"has {rows} rows of 16, less than one batch of 8000: lower the batch size"
    with pytest.raises(UsageError, match=text):
        Loader(dataset, 8000, batch_sharding())
    with pytest.raises(UsageError, match=r"batch of 6 rows of 16 does not divide over .*'data'"):
        Loader(dataset, 6, batch_sharding())
    with Loader(dataset, 7, batch_sharding(1, 8)) as loader:
        assert next(loader)["tokens"].shape == (7, 16)


def test_model_vocabulary_is_checked(dataset):
    dataset.check_vocab(259)
    with pytest.raises(
        UsageError, match=r"tokenizer has 259 ids .* has 256: set .*model.vocab=259"
    ):
        dataset.check_vocab(256)


def test_errors_of_the_thread_reach_the_consumer(dataset, monkeypatch):
    good = dataset.rows

    def rows(ids, columns=slice(None)):
        if ids[0] >= 2 * BATCH:
            raise OSError("disk gone")
        return good(ids, columns)

    monkeypatch.setattr(dataset, "rows", rows)
    with Loader(dataset, BATCH, batch_sharding()) as loader:
        next(loader)
        next(loader)
        for _ in range(2):  # it does not skip the batch that failed
            with pytest.raises(OSError, match="disk gone"):
                next(loader)
        assert loader.state()["next_row"] == 2 * BATCH


def test_close_ends_the_thread_and_prefetch_is_bounded(dataset, monkeypatch):
    read = []
    good = dataset.rows
    monkeypatch.setattr(
        dataset, "rows", lambda ids, columns: read.append(ids[0]) or good(ids, columns)
    )
    loader = Loader(dataset, BATCH, batch_sharding(), prefetch=3)
    next(loader)
    time.sleep(0.2)
    assert len(read) <= 4
    loader.close()
    loader.close()
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_interrupt_while_waiting_loses_no_batch(dataset, monkeypatch):
    with Loader(dataset, BATCH, batch_sharding()) as loader:
        first = loader._ahead[0]
        first.result()
        with monkeypatch.context() as patch:
            patch.setattr(first, "result", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                next(loader)
        assert loader.state()["next_row"] == 0
        assert batch_digest(next(loader)) == batch_digest(dataset.rows(np.arange(BATCH)))


def test_eval_covers_the_split_once(make_dataset):
    folder = make_dataset()
    dataset = open_dataset(config_for(folder, seed=5), "val")
    batches = [jax.device_get(b) for b in eval_batches(dataset, 16, batch_sharding(4, 2))]
    assert dataset.rows_per_epoch % 16
    assert {batch["tokens"].shape for batch in batches} == {(16, 16)}
    assert len(batches) == -(-dataset.rows_per_epoch // 16)
    real = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    assert real == dataset.plan.positions_per_epoch
    assert not batches[-1]["segment_ids"][dataset.rows_per_epoch % 16 :].any()
    other = open_dataset(config_for(folder, seed=6), "val")
    assert other.identity() == dataset.identity()  # held-out rows do not depend on the seed
    tiny = list(eval_batches(dataset, 8 * dataset.rows_per_epoch, batch_sharding()))
    assert len(tiny) == 1  # most devices hold nothing but padding


def test_digest_sees_every_element(dataset):
    batch = dataset.rows(np.arange(4))
    digest = batch_digest(batch)
    for name in FIELDS:
        changed = {**batch, name: batch[name].copy()}
        changed[name][3, 7] += 1
        assert batch_digest(changed) != digest
    swapped = {name: array[[1, 0, 2, 3]] for name, array in batch.items()}
    assert batch_digest(swapped) != digest


WORKER = """
import json, sys
from sharding.runtime import start_runtime
start_runtime()
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sharding.errors import UsageError
from trainer.data.config import DataConfig
from trainer.data.dataset import open_dataset
from trainer.data.loader import Loader, batch_digest
from trainer.data.rows import resume_row

folder, state, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
dataset = open_dataset(DataConfig(path=folder, seq_len=16))
found = {"processes": jax.process_count(), "digests": {}}
for data, seq in ((8, 1), (2, 4), (1, 8)):
    mesh = jax.make_mesh((data, seq), ("data", "seq"), axis_types=(AxisType.Explicit,) * 2)
    start = resume_row(state, dataset) if state else 0
    with Loader(dataset, 8, NamedSharding(mesh, P("data", "seq")), start_row=start) as loader:
        found["digests"][f"{data}x{seq}"] = [batch_digest(next(loader)) for _ in range(steps)]
        found["state"] = loader.state()
if jax.process_count() > 1:
    other = open_dataset(DataConfig(path=folder, seq_len=16, seed=jax.process_index()))
    try:
        Loader(other, 8, NamedSharding(mesh, P("data", "seq")))
    except UsageError as error:
        found["refusal"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.multiprocess
def test_batches_survive_a_change_of_process_count(make_dataset):
    folder = make_dataset()
    dataset = open_dataset(config_for(folder))
    with Loader(dataset, BATCH, batch_sharding()) as loader:
        unbroken = [batch_digest(next(loader)) for _ in range(9)]
    state, at = None, 0
    for processes in (2, 4):
        results = run_processes(
            WORKER, processes, 8 // processes, [folder, json.dumps(state), 3], timeout=240
        )
        for result in results:
            found = json.loads(result.stdout.splitlines()[-1])
            assert found["processes"] == processes
            for layout, digests in found["digests"].items():
                assert digests == unbroken[at : at + 3], (processes, layout)
            assert "processes 0 and 1 do not agree on data seed" in found["refusal"]
        state, at = found["state"], at + 3
    start = resume_row(state, dataset)
    assert start == 6 * BATCH
    with Loader(dataset, BATCH, batch_sharding(2, 4), start_row=start) as loader:  # one process
        assert [batch_digest(next(loader)) for _ in range(3)] == unbroken[6:]


def test_skipped_shards_are_in_the_state(dataset):
    with Loader(dataset, BATCH, batch_sharding()) as loader:
        assert "skipped" not in loader.state()
        file = dataset.shards.manifest.split("train")[0].file
        dataset.shards.skip(file)
        state = loader.state()
    assert state["skipped"] == {dataset.identity()["fingerprint"]: [file]}
    again = open_dataset(config_for(dataset.shards.folder))
    resume_row(state | again.identity(), again)
    assert again.skipped() == state["skipped"]
    assert (again.rows(np.arange(8))["segment_ids"] == 0).any()


def test_closing_ends_a_read_that_waits(dataset, monkeypatch):
    cancelled = threading.Event()
    monkeypatch.setattr(dataset.shards, "cancel", cancelled.set)
    monkeypatch.setattr(dataset, "rows", lambda ids, columns=None: cancelled.wait(30) and {})
    begin = time.monotonic()
    Loader(dataset, BATCH, batch_sharding()).close()
    assert cancelled.is_set() and time.monotonic() - begin < 10
