import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import UsageError
from tests.processes import run_processes
from tests.trainer.data.conftest import LENGTHS
from tests.trainer.data.test_loader import batch_sharding
from trainer.data.config import FIELDS, DataConfig
from trainer.data.dataset import open_dataset, open_training
from trainer.data.loader import Loader, batch_digest, eval_batches
from trainer.data.mixture import Interleave
from trainer.data.rows import resume_row

B = 16


@pytest.fixture
def folders(make_dataset):
    return [str(make_dataset(f"set{n}", seed=n)) for n in range(3)]


@pytest.fixture
def large(make_dataset):
    """A dataset with some steps of documents of any length."""
    return str(make_dataset("large", lengths=LENGTHS * 40, shard_tokens=10_000))


def mixed(*entries, **values) -> DataConfig:
    return DataConfig(mixture=entries, **{"seq_len": 16, **values})


# ---------------------------------------------------------------- interleaving


@st.composite
def schedules(draw):
    sources = draw(st.integers(1, 5))
    rows = sorted({0, *draw(st.lists(st.integers(1, 400), max_size=3))})
    weights = st.lists(st.integers(0, 30), min_size=sources, max_size=sources).filter(any)
    return [(row, draw(weights)) for row in rows]


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_every_source_gives_its_rows_in_order_and_in_its_share(schedule):
    interleave = Interleave(schedule)
    source, row = interleave.locate(np.arange(600))
    sources = len(schedule[0][1])
    for number in range(sources):
        np.testing.assert_array_equal(row[source == number], np.arange((source == number).sum()))
    counts = np.cumsum(source[:, None] == np.arange(sources), axis=0)
    ends = [*(start for start, _ in schedule[1:]), 600]
    for (start, weights), end in zip(schedule, ends, strict=True):
        share = np.asarray(weights) / sum(weights)
        before = counts[start - 1] if start else 0
        wanted = np.arange(1, end - start + 1)[:, None] * share
        assert np.abs(counts[start:end] - before - wanted).max() <= sources / 2
        assert not (counts[start:end] - before)[:, share == 0].any()
    for at in (0, 1, 37, 599):
        np.testing.assert_array_equal(interleave.taken(at), counts[at - 1] if at else 0 * counts[0])


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 500))
def test_a_later_weight_keeps_all_earlier_rows(schedule, at):
    kept = [(row, weights) for row, weights in schedule if row < at]
    changed = [*kept, (at, [1] * len(schedule[0][1]))]
    for one, other in zip(
        *(Interleave(entries).locate(np.arange(at)) for entries in (schedule, changed)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_far_row_is_exact():
    interleave = Interleave([(0, [734003, 314573]), (10**6, [1, 1 << 20])])
    ids = 2**42 + np.arange(5000)
    source, row = interleave.locate(ids)
    assert (row >= 0).all() and len(np.unique(source * 2**45 + row)) == 5000
    assert interleave.taken(2**42).sum() == 2**42


# ---------------------------------------------------------------- mixtures


def test_a_mixture_holds_the_rows_of_its_sources(folders):
    mixture = open_dataset(mixed((folders[0], 0.7), (folders[1], 0.2), (folders[2], 0.1)))
    members = [open_dataset(DataConfig(path, seq_len=16)) for path in folders]
    ids = np.arange(2000)
    batch, seen = mixture.rows(ids), [0, 0, 0]
    source, _ = mixture._interleave.locate(ids)
    for number, member in enumerate(members):
        mine = batch["tokens"][source == number]
        np.testing.assert_array_equal(mine, member.rows(np.arange(len(mine)))["tokens"])
        seen[number] = len(mine)
    assert np.abs(np.subtract(seen, [1400, 400, 200])).max() <= 1
    assert mixture.epochs(2000) == [
        n / m.rows_per_epoch for n, m in zip(seen, members, strict=True)
    ]
    assert mixture.epochs(2000)[0] > 2  # sources go through epochs of their own
    ids = ids[::-1][:50]
    for name, part in mixture.rows(ids, slice(3, 9)).items():
        np.testing.assert_array_equal(part, batch[name][ids, 3:9])


def test_held_out_rows_of_a_mixture_come_once_each(folders):
    held_out = open_dataset(mixed((folders[0], 0.9), (folders[1], 0.1)), "val")
    members = [open_dataset(DataConfig(path, seq_len=16), "val") for path in folders[:2]]
    assert held_out.rows_per_epoch == sum(m.rows_per_epoch for m in members)
    rows = held_out.rows(np.arange(held_out.rows_per_epoch))["tokens"]
    apart = np.concatenate([m.rows(np.arange(m.rows_per_epoch))["tokens"] for m in members])
    np.testing.assert_array_equal(*(np.sort(a.view("V64").ravel()) for a in (rows, apart)))
    real = sum(
        int((batch["segment_ids"] > 0).sum())
        for batch in eval_batches(held_out, 16, batch_sharding())
    )
    assert real == sum(member.plan.positions_per_epoch for member in members)
    text = sum(member.shards.text_bytes for member in members)
    assert held_out.bytes_per_token() == pytest.approx(text / real, rel=0.01)


def hosts(data, first: int, count: int) -> str:
    """Digest of one batch that `count` hosts would read, each its own rows, put together."""
    parts = [data.rows(first + block) for block in np.split(np.arange(B), count)]
    return batch_digest({name: np.concatenate([p[name] for p in parts]) for name in FIELDS})


def test_host_counts_and_a_weight_change_leave_batches_equal(folders):
    change = 12 * B
    plain = mixed((folders[0], 0.7), (folders[1], 0.3))
    scheduled = mixed(
        (folders[0], ((0, 0.7), (change, 0.2))), (folders[1], ((0, 0.3), (change, 0.8)))
    )
    unbroken = open_dataset(scheduled)
    expected = [batch_digest(unbroken.rows(step * B + np.arange(B))) for step in range(24)]
    found = []
    for start, count in ((0, 1), (6, 4), (12, 2), (18, 8)):
        # Every attempt opens its data anew, the first two without knowing of the change.
        data = open_dataset(plain if start < 12 else scheduled)
        found += [hosts(data, step * B, count) for step in range(start, start + 6)]
    assert found == expected
    still = open_dataset(plain)
    assert batch_digest(still.rows(12 * B + np.arange(B))) != expected[12]


def test_a_resume_may_change_weights_that_lie_ahead(folders, caplog):
    first, second = folders[:2]
    data = open_dataset(mixed((first, 0.7), (second, 0.3)))
    with Loader(data, B, batch_sharding()) as loader:
        for _ in range(4):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
    row = 4 * B

    def resumed(*entries, **values):
        return resume_row(state, open_dataset(mixed(*entries, **values)))

    caplog.set_level("INFO", logger="absl")
    assert resumed((first, 0.7), (second, 0.3)) == row
    assert resumed((first, 1.4), (second, 0.6)) == row  # the same shares
    assert "mixture" not in caplog.text
    assert resumed((first, ((0, 0.7), (row, 0.1))), (second, 0.3)) == row
    assert f"data mixture changes from row {row} on" in caplog.text
    assert resumed((first, 0.7), (second, 0.3), (folders[2], ((0, 0), (row + 5, 1)))) == row
    for entries in (
        ((first, ((0, 0.7), (row - 1, 0.1))), (second, 0.3)),
        ((first, 0.6), (second, 0.4)),
        ((first, 0.7), (folders[2], 0.3)),
    ):
        with pytest.raises(UsageError, match=r"data mixture is \[\[0, .*config.data.allow_change"):
            resumed(*entries)
    with pytest.raises(UsageError, match="data seed is 3, the checkpoint was trained with 0"):
        resumed((first, 0.7), (second, 0.3), seed=3)
    with pytest.raises(UsageError, match=r"data fingerprint is sha256:.* was trained with None"):
        resume_row(state, open_dataset(DataConfig(first, seq_len=16)))


@pytest.mark.parametrize(
    ("mixture", "text"),
    [
        ((("a", 0), ("b", 0.0)), r"the weights from row 0 on sum to zero"),
        ((("a", ((0, 1), (50, 0))), ("b", 0)), r"the weights from row 50 on sum to zero"),
        ((("a", -0.1), ("b", 1)), r"weight -0\.1 of a is not 0 or more"),
        ((("a", float("nan")),), r"weight nan of a is not 0 or more"),
        ((("a", 1), ("a", 2)), r"path 'a' is empty or named twice"),
        ((("a", ((5, 1),)),), r"rows of a are \[5\], they start at 0 and rise"),
        ((("a", ((0, 1), (0, 2))),), r"rows of a are \[0, 0\]"),
        (("a", "b"), r"'a' is not \(path, weight\)"),
        ((("a", "much"),), r"is not \(path, weight\) or"),
    ],
)
def test_bad_mixtures_are_refused(mixture, text):
    with pytest.raises(UsageError, match=text):
        DataConfig(mixture=mixture).validate()


def test_a_missing_or_negligible_member_is_refused(folders, tmp_path):
    with pytest.raises(UsageError, match=r"gone: no manifest\.json there"):
        open_dataset(mixed((folders[0], 0.9), (str(tmp_path / "gone"), 0.1)))
    with pytest.raises(UsageError, match=r"weight 1e-09 is less than a millionth"):
        open_dataset(mixed((folders[0], 1), (folders[1], 1e-9)))
    mixture = open_dataset(mixed((folders[0], 1), (folders[1], 1)))
    with pytest.raises(
        UsageError, match=r"tokenizer has 259 ids .*, the model's vocabulary has 256"
    ):
        mixture.check_vocab(256)
    with pytest.raises(UsageError, match="less than one batch of 8000"):
        Loader(mixture, 8000, batch_sharding())


WORKER = """
import json, sys
from sharding.runtime import start_runtime
start_runtime()
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sharding.errors import UsageError
from trainer.data import packing
from trainer.config import from_dict
from trainer.data.config import DataConfig
from trainer.data.dataset import open_training
from trainer.data.loader import Loader, batch_digest
from trainer.data.rows import resume_row

state, configs = json.loads(sys.argv[1]), json.loads(sys.argv[2])
configs = {name: from_dict(values, DataConfig) for name, values in configs.items()}
found = {}
mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(AxisType.Explicit,) * 2)
sharding = NamedSharding(mesh, P("data", "seq"))
for name, config in configs.items():
    data = open_training(config, 16)
    start = resume_row(state, data) if name == "mixture" else 0
    with Loader(data, 16, sharding, start_row=start) as loader:
        found[name] = [batch_digest(next(loader)) for _ in range(4)]
if jax.process_index() == 1:
    packing.best_fit, packing.count_best_fit = packing.concatenate, packing.count_concatenated
try:
    Loader(open_training(configs["single"], 16), 16, sharding)
except UsageError as error:
    found["refusal"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.multiprocess
def test_two_processes_read_what_one_does_and_compare_plans(folders, large):
    before = mixed((folders[0], 0.7), (folders[1], 0.3))
    change = 3 * B + 5
    configs = {
        "mixture": mixed((folders[0], ((0, 0.7), (change, 0))), (folders[1], 0.3)),
        "balanced": mixed((folders[0], 0.7), (folders[1], 0.3), balance=3),
        "buckets": DataConfig(large, seq_len=16, buckets=(4, 8)),
        "single": DataConfig(folders[0], seq_len=16),
    }
    with Loader(open_dataset(before), B, batch_sharding()) as loader:
        next(loader), next(loader)
        state = loader.state()
    expected = {}
    for name, config in configs.items():
        data = open_training(config, B)
        start = 2 * B if name == "mixture" else 0
        with Loader(data, B, batch_sharding(), start_row=start) as loader:
            expected[name] = [batch_digest(next(loader)) for _ in range(4)]
    arguments = [json.dumps(state), json.dumps(configs, default=vars)]
    for result in run_processes(WORKER, 2, 4, arguments, timeout=240):
        found = json.loads(result.stdout.splitlines()[-1])
        assert "processes 0 and 1 do not agree on data plan" in found.pop("refusal")
        assert found == expected


# ---------------------------------------------------------------- balance


def test_balanced_steps_hold_the_same_rows_of_like_cost(folders):
    steps = 8
    config = mixed((folders[0], 0.6), (folders[1], 0.4))
    plain = open_training(config, B)
    balanced = open_training(mixed(*config.mixture, balance=steps), B)
    spread = {}
    for name, data in (("plain", plain), ("balanced", balanced)):
        costs = data.costs(np.arange(10 * steps * B)).reshape(10, steps, B)
        spread[name] = (costs.max(axis=2) - costs.min(axis=2)).mean()
    assert spread["balanced"] < 0.35 * spread["plain"]
    for window in range(3):
        ids = window * steps * B + np.arange(steps * B)
        pair = [
            np.sort(d.rows(ids)["tokens"].copy().view("V64").ravel()) for d in (plain, balanced)
        ]
        np.testing.assert_array_equal(*pair)
    means = balanced.costs(np.arange(steps * B)).reshape(steps, B).mean(axis=1)
    assert not (np.diff(means) > 0).all()  # steps are shuffled, costs do not rise with time
    again = open_training(mixed(*config.mixture, balance=steps), B)
    for number in (0, 77, 10**6):
        ids = np.asarray([number, number + 1])
        np.testing.assert_array_equal(again.rows(ids)["tokens"], balanced.rows(ids)["tokens"])
    assert balanced.identity() == plain.identity() | {"balance": steps, "batch_size": B}
    with pytest.raises(UsageError, match="data balance is None, the checkpoint was trained with 8"):
        resume_row({"version": 1, "next_row": 5, **balanced.identity()}, plain)
    assert balanced.bytes_per_token() == plain.bytes_per_token()


# ---------------------------------------------------------------- buckets


def test_buckets_use_every_document_at_its_length(large):
    config = DataConfig(large, seq_len=16, buckets=(4, 8), window=20)
    data = open_training(config, B)
    assert data.lengths().keys() == {4, 8, 16}
    assert sum(data.lengths().values()) == pytest.approx(1)
    assert data.bytes_per_token() == open_dataset(DataConfig(large)).bytes_per_token()
    epochs = {
        part.seq_len: part.rows_per_epoch // count
        for part, count in zip(data._parts, data._counts, strict=True)
    }
    seen = {length: [] for length in epochs}
    with Loader(data, B, batch_sharding(), prefetch=0) as loader:
        for step in range(60):
            batch = jax.device_get(loader.batch(step))
            rows, length = batch["tokens"].shape
            assert rows * length == B * 16
            seen[length].append(batch)
    lengths = np.asarray([b["tokens"].shape[1] for v in seen.values() for b in v])
    for length, share in data.lengths().items():
        assert abs((lengths == length).mean() - share) < 0.05
    for part, count in zip(data._parts, data._counts, strict=True):
        batches = seen[part.seq_len][: epochs[part.seq_len]]
        rows = np.concatenate([batch["tokens"] for batch in batches])
        np.testing.assert_array_equal(rows, part.rows(np.arange(len(batches) * count))["tokens"])
        used = part.shards.lengths[part.plan.rows(np.arange(part.rows_per_epoch)).documents] - 1
        low, high = {4: (0, 4), 8: (4, 8), 16: (8, 1 << 62)}[part.seq_len]
        assert (used > low).all() and (used <= high).all()


def test_buckets_resume_at_every_step(make_dataset):
    folder = str(make_dataset("short", lengths=(5, 9, 9, 30) * 80))

    def loader_at(row):
        data = open_training(DataConfig(folder, seq_len=16, buckets=(8,), balance=2), B)
        return data, Loader(data, B, batch_sharding(), start_row=row)

    data, loader = loader_at(0)
    with loader:
        unbroken = [batch_digest(next(loader)) for _ in range(12)]
        assert len({batch["tokens"].shape for batch in map(loader.batch, range(12))}) == 2
    for step in (1, 5, 8):
        _, loader = loader_at(step * B)
        with loader:
            assert [batch_digest(next(loader)) for _ in range(4)] == unbroken[step : step + 4]
            assert resume_row(loader.state(), data) == (step + 4) * B
    other = open_training(DataConfig(folder, seq_len=16, buckets=(4,), balance=2), B)
    with pytest.raises(UsageError, match=r"data plan is .*, the checkpoint was trained with"):
        resume_row(loader.state(), other)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"buckets": (16,)},
            r"buckets = \(16,\): row lengths that rise and stay below seq_len = 16",
        ),
        ({"buckets": (8, 4)}, r"row lengths that rise"),
        ({"buckets": (0,)}, r"row lengths that rise"),
        ({"buckets": (7,)}, r"rows of 7 do not divide the 256 tokens of a step \(16 rows of 16\)"),
        ({"buckets": (8,), "mixture": (("a", 1),)}, r"buckets and config.data.mixture do not go"),
        ({"balance": -1}, r"config\.data\.balance = -1"),
    ],
)
def test_bad_buckets_are_refused(folders, values, text):
    with pytest.raises(UsageError, match=text):
        open_training(DataConfig(folders[0], **{"seq_len": 16, **values}), B)


def test_a_bucket_without_documents_is_refused(make_dataset):
    long = make_dataset("long", lengths=(100, 120) * 40)
    with pytest.raises(
        UsageError, match=r"no document of 1 to 8 positions: there is nothing to predict"
    ):
        open_training(DataConfig(str(long), seq_len=16, buckets=(8,)), B)
    few = make_dataset("few", lengths=(5, 6, 100, 120) * 3 + (100,) * 60)
    with pytest.raises(UsageError, match=r"bucket 8 fill 5 rows, a step takes 32; leave it out"):
        open_training(DataConfig(str(few), seq_len=16, buckets=(8,)), B)
