import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import UsageError
from trainer.data import packing
from trainer.data import plan as plan_module
from trainer.data.plan import Plan, Scatter, permutation


@st.composite
def plans(draw):
    seq_len = draw(st.sampled_from([1, 2, 7, 16]))
    edges = [0, 1, 2, seq_len, seq_len + 1, seq_len + 2, 10 * seq_len, 10 * seq_len + 1]
    length = st.one_of(st.sampled_from(edges), st.integers(0, 3 * seq_len))
    lengths = draw(st.lists(length, min_size=1, max_size=60).filter(lambda x: max(x) > 1))
    plan = Plan(
        np.asarray(lengths),
        seq_len=seq_len,
        how=draw(st.sampled_from(["bestfit", "concat"])),
        window=draw(st.integers(1, 70)),
        shuffle=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
    )
    return lengths, plan


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 3))
def test_every_epoch_predicts_every_token_once(case, epoch):
    lengths, plan = case
    ids = epoch * plan.rows_per_epoch + np.arange(plan.rows_per_epoch)
    pieces = plan.rows(ids)
    predicted = [
        (document, start + 1 + i)
        for document, start, count in zip(
            pieces.documents, pieces.starts, pieces.counts, strict=True
        )
        for i in range(count)
    ]
    expected = {(d, i) for d, length in enumerate(lengths) for i in range(1, length)}
    assert len(predicted) == len(expected) == plan.positions_per_epoch
    assert set(predicted) == expected
    assert (pieces.counts > 0).all()


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 3))
def test_rows_are_filled_from_the_left_and_stay_in_their_window(case, epoch):
    lengths, plan = case
    windows = range(-(-len(lengths) // plan._window_size))
    window_of = {d: w for w in windows for d in plan.members(w)[0].tolist()}
    ids = epoch * plan.rows_per_epoch + np.arange(plan.rows_per_epoch)
    pieces = plan.rows(ids)
    assert set(pieces.rows.tolist()) == set(range(plan.rows_per_epoch))
    for row in range(plan.rows_per_epoch):
        mine = pieces.rows == row
        counts = pieces.counts[mine]
        assert counts.sum() <= plan.seq_len
        np.testing.assert_array_equal(pieces.columns[mine], np.cumsum(counts) - counts)
        assert len({window_of[d] for d in pieces.documents[mine].tolist()}) == 1


@pytest.mark.parametrize("how", ["bestfit", "concat"])
def test_a_row_can_be_computed_alone(how):
    lengths = np.random.default_rng(0).integers(0, 50, 300)
    whole = Plan(lengths, seq_len=16, how=how, window=64, seed=3)
    ids = np.arange(3 * whole.rows_per_epoch)
    pieces = whole.rows(ids)
    alone = Plan(lengths, seq_len=16, how=how, window=64, seed=3)
    for row in np.random.default_rng(1).permutation(ids)[:40]:
        one, mine = alone.rows(np.asarray([row])), pieces.rows == row
        for name in ("documents", "starts", "counts", "columns"):
            np.testing.assert_array_equal(getattr(one, name), getattr(pieces, name)[mine])


def test_epochs_and_seeds_differ_and_no_shuffle_repeats():
    lengths = np.random.default_rng(0).integers(2, 50, 300)
    plan = Plan(lengths, seq_len=16, seed=0)
    other = Plan(lengths, seq_len=16, seed=1)
    rows = np.arange(plan.rows_per_epoch)
    first = plan.rows(rows).documents
    assert not np.array_equal(first, plan.rows(rows + plan.rows_per_epoch).documents)
    assert not np.array_equal(first[:50], other.rows(rows).documents[:50])
    plain = Plan(lengths, seq_len=16, shuffle=False)
    rows = np.arange(plain.rows_per_epoch)
    again = plain.rows(rows + plain.rows_per_epoch)
    np.testing.assert_array_equal(plain.rows(rows).starts, again.starts)
    np.testing.assert_array_equal(plain.rows(rows).documents, again.documents)


def test_a_far_row_needs_no_rows_before_it():
    plan = Plan(np.full(1000, 20), seq_len=32)
    assert len(plan.rows(np.asarray([10**12]))) > 0


def test_padding_of_many_short_documents():
    lengths = np.random.default_rng(0).lognormal(6, 1, 38_000).astype(np.int64) + 2
    plan = Plan(lengths, seq_len=2048)
    assert plan.padding < 0.0004
    assert plan.rows_per_epoch >= -(-plan.positions_per_epoch // 2048)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 28, 29, 32, 33, 160, 300]), min_size=1),
    st.integers(1, 9),
    st.integers(0, 2),
)
def test_added_positions_find_room_and_every_token_is_still_read_once(lengths, window, epoch):
    lengths, T, added = np.asarray([*lengths, 40]), 16, 4
    plan = Plan(
        lengths, seq_len=T, window=window, seed=epoch, added=lambda d: added * (d % 2).astype(int)
    )
    rows = np.arange(plan.rows_per_epoch)
    pieces = plan.rows(epoch * plan.rows_per_epoch + rows)
    predicted = [
        (document, start + 1 + i)
        for document, start, count in zip(
            pieces.documents, pieces.starts, pieces.counts - pieces.added, strict=True
        )
        for i in range(count)
    ]
    assert len(predicted) == len(set(predicted)) == np.maximum(lengths - 1, 0).sum()
    assert (np.bincount(pieces.rows, pieces.counts) <= T).all()
    assert (pieces.counts > pieces.added).all()
    assert not pieces.added[pieces.documents % 2 == 0].any()
    short = (pieces.documents % 2 == 1) & (lengths[pieces.documents] - 1 + added <= T)
    assert (pieces.added[short] == added).all()


def test_a_document_that_fits_a_row_is_never_cut():
    lengths = np.random.default_rng(0).integers(0, 40, 500)
    plan = Plan(lengths, seq_len=16, window=100)
    pieces = plan.rows(np.arange(plan.rows_per_epoch))
    cuts = np.bincount(pieces.documents, minlength=len(lengths))
    assert (cuts[(lengths > 1) & (lengths <= 17)] == 1).all()
    assert cuts.max() > 2 and plan.padding < 0.02


def test_documents_routed_by_length_are_all_used_once():
    lengths = np.random.default_rng(0).integers(0, 90, 700)
    used = []
    for only in ((0, 16), (16, 40), (40, 1 << 62)):
        plan = Plan(lengths, seq_len=16, window=64, only=only)
        pieces = plan.rows(np.arange(plan.rows_per_epoch))
        used.append(np.unique(pieces.documents))
        assert ((lengths[used[-1]] - 1 > only[0]) & (lengths[used[-1]] - 1 <= only[1])).all()
    assert np.array_equal(np.sort(np.concatenate(used)), np.flatnonzero(lengths > 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 9))
def test_scatter_is_a_permutation_of_which_parts_can_be_computed(size, seed):
    scatter = Scatter(size, seed)
    whole = scatter(np.arange(size))
    assert np.array_equal(np.sort(whole), np.arange(size))
    part = np.random.default_rng(seed).integers(0, size, 20)
    assert np.array_equal(scatter(part), whole[part])


def test_scatter_looks_random():
    places = Scatter(100_000, 1)(np.arange(100_000))
    assert abs(np.corrcoef(np.arange(100_000), places)[0, 1]) < 0.01
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.01
    halves = np.bincount(places[:50_000] * 16 // 100_000)  # 3125 expected in each
    assert np.abs(halves - 3125).max() < 200
    assert not np.array_equal(places, Scatter(100_000, 2)(np.arange(100_000)))


class Endless:
    """Lengths of many documents, computed instead of stored."""

    def __init__(self, documents):
        self._documents = documents

    def __len__(self):
        return self._documents

    def __getitem__(self, documents):
        return 2 + documents * 2654435761 % 1500


def test_memory_does_not_grow_with_documents():
    peaks = []
    for documents in (4 << 11, 60 << 11):
        tracemalloc.start()
        plan = Plan(Endless(documents), seq_len=512, window=1 << 11)
        for number in range(6):  # more windows than are kept
            plan.rows(np.arange(64) + number * 10**8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 4 << 20


def test_row_counts_are_cached_and_damage_is_repaired(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path))
    monkeypatch.setattr(plan_module, "_CACHED_FROM", 100)
    lengths = np.random.default_rng(0).integers(0, 50, 300)
    settings = {"seq_len": 16, "window": 32, "key": "set"}
    first = Plan(lengths, **settings)
    (path,) = (tmp_path / "plans").iterdir()
    assert not list(tmp_path.glob("**/*.tmp"))

    def counted(*_):
        raise AssertionError("counted again")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "count_best_fit", counted)
        assert Plan(lengths, **settings).digest() == first.digest()
        with pytest.raises(AssertionError, match="counted again"):
            Plan(lengths, **settings | {"key": "another"})
        with pytest.raises(AssertionError, match="counted again"):
            Plan(lengths, **settings | {"seq_len": 17})
    content = path.read_bytes()
    for damaged in (content[:-8], content[:40] + b"x" + content[41:], b""):
        path.write_bytes(damaged)
        caplog.clear()
        assert Plan(lengths, **settings).digest() == first.digest()
        assert "is damaged and is built anew" in caplog.text
        assert path.read_bytes() == content


def test_plans_without_a_key_share_no_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path))
    monkeypatch.setattr(plan_module, "_CACHED_FROM", 100)
    for length in (9, 17):  # 8 and 16 positions: two documents or one in a row of 16
        plan = Plan(np.full(300, length), seq_len=16, window=32)
        assert plan.rows_per_epoch * 16 == 300 * (length - 1)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_only_noted(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(plan_module, "_CACHED_FROM", 100)
    plan = Plan(np.full(300, 9), seq_len=16, key="set")
    assert plan.rows_per_epoch == 150
    assert "not kept for the next start" in caplog.text


def test_counting_agrees_with_packing():
    for seed in range(5):
        positions = np.random.default_rng(seed).integers(1, 70, 200)
        added = 4 * np.random.default_rng(seed).integers(0, 2, 200)
        rows = packing.best_fit(np.arange(200), positions, added, 32).rows
        assert rows.max() + 1 == packing.count_best_fit(positions, added, 32)
        assert np.array_equal(np.unique(rows), np.arange(rows.max() + 1))


def test_permutation_is_pinned():
    # These numbers are part of every checkpoint: a change here breaks exact resume.
    assert permutation(8, seed=1, epoch=2, purpose=0).tolist() == PINNED
    assert sorted(permutation(1000, 2**62, 5, 2, 7).tolist()) == list(range(1000))


def test_plan_is_pinned():
    # As the permutation: checkpoints hold this digest.
    lengths = np.arange(700) * 7919 % 90
    assert Plan(lengths, seq_len=32, window=128, seed=3).digest() == "996e0443b7cc3f1a"


@pytest.mark.parametrize(
    ("documents", "plan", "first", "order"),
    [
        (675, "cf7fc5d715e4fa12", [94, 650, 549, 246], "9087e4970e4bda3d"),
        (676, "f9196d214c0bf56c", [94, 650, 549, 246], "81a1f7377dc0c04a"),
        (677, None, [68, 624, 275, 313], "acd7913f2b7dc5d9"),
    ],
)
def test_orders_around_a_square_are_pinned(documents, plan, first, order):
    """Of 26 x 26 documents and one less or more: there the sizes of the two digits change."""
    scattered = Scatter(documents, 3)(np.arange(documents))
    assert scattered[:4].tolist() == first
    assert hashlib.sha256(scattered.astype("<i8").tobytes()).hexdigest()[:16] == order
    if plan:
        lengths = np.arange(documents) * 7919 % 90
        assert Plan(lengths, seq_len=32, window=128, seed=3).digest() == plan


PINNED = [4, 2, 0, 6, 1, 5, 7, 3]


def test_refusals():
    with pytest.raises(UsageError, match=r"'bestift': choose bestfit or concat; did you mean"):
        Plan(np.asarray([5]), seq_len=4, how="bestift")
    with pytest.raises(UsageError, match="nothing to predict"):
        Plan(np.asarray([0, 1, 1]), seq_len=4)
