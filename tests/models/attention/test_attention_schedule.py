"""The tables of steps: every visible pair is computed once, and nothing that is hidden counts."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import schedule
from models.attention.blocks import TABLE, Blocks, blocks_for
from models.attention.mask import Mask, needed_IJ, reach, visible_BTS
from tests.models.attention.test_attention_oracle import packed_tokens

BLOCK, SUB = 8, 4


@st.composite
def problems(draw):
    kind = draw(st.sampled_from(["all", "causal", "window", "chunk"]))
    size = draw(st.sampled_from([1, 3, 8, 9, 20]))
    return dict(
        mask=Mask(
            causal=kind != "all",
            window=size if kind == "window" else None,
            chunk=size if kind == "chunk" else None,
        ),
        tiles=draw(st.sampled_from([1, 4])),
        aligned=draw(st.booleans()),
        prefix=draw(st.booleans()),
        heads=draw(st.sampled_from([1, 2])),
        seed=draw(st.integers(0, 2**16)),
    )


def tables(p):
    rng = np.random.default_rng(p["seed"])
    T = p["tiles"] * BLOCK
    tokens = packed_tokens(rng, 2, T)
    prefix = rng.random((2, T)) < 0.2 if p["prefix"] else None
    aligned = p["aligned"] and not p["prefix"]
    diagonal = aligned and p["mask"].causal

    @jax.jit
    def arrays(tokens, prefix):
        seen = reach(p["mask"], *tokens, prefix)
        blocks = (BLOCK, BLOCK), (SUB, SUB)
        kinds, bits = schedule.block_kinds(p["mask"], seen, *blocks, diagonal)
        return kinds, bits, visible_BTS(p["mask"], seen)

    kinds, bits, visible = map(np.asarray, arrays(tokens, prefix))
    return kinds, bits, needed_IJ(p["mask"], T, T, BLOCK, BLOCK, aligned), visible, diagonal


def computed(steps, bits, tiles: int) -> np.ndarray:
    """Times that each pair of one row's tokens is computed, DIAGONAL and PART masks left out."""
    count = np.zeros((tiles * BLOCK, tiles * BLOCK), int)
    for step, visible in zip(steps, bits, strict=True):
        q0, k0 = BLOCK * int(schedule.query_tile(step)), BLOCK * int(schedule.key_tile(step))
        if schedule.kind(step) in (schedule.FULL, schedule.DIAGONAL):
            count[q0 : q0 + BLOCK, k0 : k0 + BLOCK] += 1
        elif schedule.kind(step) == schedule.PART:
            for bit in range(4):
                q, k = q0 + bit // 2 * SUB, k0 + bit % 2 * SUB
                count[q : q + SUB, k : k + SUB] += int(visible) >> bit & 1
    return count


@settings(max_examples=10, deadline=None, derandomize=True)
@given(p=problems())
def test_forward(p):
    kinds, bits, needed, visible, diagonal = tables(p)
    make = jax.jit(lambda kinds, bits: schedule.forward_table(kinds, bits, needed, diagonal))
    steps, step_bits = map(np.asarray, make(kinds, bits))
    for b, row in enumerate(steps):
        count = computed(row, step_bits[b], p["tiles"])
        assert (count[visible[b]] == 1).all(), "a visible pair is computed once"
        assert count.max() <= 1
        for flag in (schedule.is_first, schedule.is_last):
            flagged = [schedule.query_tile(s) for s in row if flag(s)]
            assert sorted(flagged) == list(range(p["tiles"])), "each query tile once"
        for step in row:
            i, j = int(schedule.query_tile(step)), int(schedule.key_tile(step))
            block = visible[b, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            if schedule.kind(step) == schedule.FULL:
                assert block.all()
            elif schedule.kind(step) == schedule.DIAGONAL:
                upper = i - j == schedule.window_edge(p["mask"], (BLOCK, BLOCK)) > 0
                assert upper or i == j
                np.testing.assert_array_equal(block, np.tri(BLOCK, dtype=bool) ^ upper)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(p=problems())
def test_backward(p):
    kinds, bits, needed, visible, _ = tables(p)
    repeat = (1, p["heads"], 1)
    kinds, bits = np.tile(kinds, repeat), np.tile(bits, repeat)
    rows = p["tiles"] * p["heads"]
    needed = np.tile(needed, repeat[1:])
    table = jax.jit(lambda kinds, bits: schedule.backward_table(kinds, bits, needed))(kinds, bits)
    for b, (steps, step_bits, targets) in enumerate(zip(*map(np.asarray, table), strict=True)):
        for head in range(p["heads"]):
            own = schedule.query_tile(steps) // p["tiles"] == head
            local = steps[own] - (head * p["tiles"] << 17)
            count = computed(local, step_bits[own], p["tiles"])
            assert (count[visible[b]] == 1).all()
            assert count.max() <= 1
        for flag in (schedule.is_first, schedule.is_last):
            flagged = [schedule.key_tile(s) for s in steps if flag(s)]
            assert sorted(flagged) == list(range(p["tiles"])), "each key tile once"
        emitted = np.flatnonzero(schedule.emits(steps))
        assert sorted(schedule.query_tile(steps[emitted])) == list(range(rows))
        np.testing.assert_array_equal(targets[emitted], schedule.query_tile(steps[emitted]))
        changes = np.flatnonzero(np.diff(targets))
        assert set(changes) <= set(emitted), "an output block stays until it is written"
        for i in range(rows):
            visits = np.flatnonzero((schedule.query_tile(steps) == i) & (schedule.kind(steps) > 0))
            assert (
                visits.size == 0 or visits[-1] <= emitted[schedule.query_tile(steps[emitted]) == i]
            )


@pytest.mark.parametrize("chip", sorted({chip for chip, _, _ in TABLE}))
@pytest.mark.parametrize("length", [1, 129, 700, 1025, 1500, 1700, 4096, 4097])
def test_blocks_cover_any_length(chip, length):
    for direction in ("forward", "backward"):
        for head_dim in (64, 128, 192, 256):
            window = 900 if head_dim == 64 else None
            sizes = blocks_for(chip, direction, head_dim, length, length, window)
            assert isinstance(sizes, Blocks)
            assert sizes.q % 128 == sizes.k % 128 == sizes.sub % 128 == 0
            assert sizes.q % sizes.sub == sizes.k % sizes.sub == 0
            assert -length % sizes.q < 256 * -(-length // sizes.q), "little is padded"
            assert (sizes.q // sizes.sub) * (sizes.k // sizes.sub) <= 31, "bits of an int32"
