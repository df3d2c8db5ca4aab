import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import UsageError
from trainer.data.plan import Plan, permutation


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


def test_permutation_is_pinned():
    # These numbers are part of every checkpoint: a change here breaks exact resume.
    assert permutation(8, seed=1, epoch=2, purpose=0).tolist() == PINNED
    assert sorted(permutation(1000, 2**62, 5, 2, 7).tolist()) == list(range(1000))


PINNED = [4, 2, 0, 6, 1, 5, 7, 3]


def test_refusals():
    with pytest.raises(UsageError, match=r"'bestift': choose bestfit or concat; did you mean"):
        Plan(np.asarray([5]), seq_len=4, how="bestift")
    with pytest.raises(UsageError, match="nothing to predict"):
        Plan(np.asarray([0, 1, 1]), seq_len=4)
