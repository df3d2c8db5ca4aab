"""Both backends against the float64 oracle: random shapes, masks, dtypes; values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from models.attention import blockwise
from models.attention.dispatch import attention
from models.attention.mask import EMPTY_LSE, Mask
from tests.models.attention import oracle

# Error relative to 1 + |value|, for unit-normal inputs. The largest seen over these examples were
# 2.8e-6 in float32 and 3.2e-3 in bfloat16, whose rounding alone is 2e-3.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

# No shrinking: the cases are small already, and every attempt would compile again.
BUDGET = settings(deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


def packed_tokens(rng: np.random.Generator, batch: int, length: int) -> oracle.Tokens:
    """Rows of one to four documents with positions from 0, and padding at the end of some."""
    positions, segments = np.zeros((2, batch, length), np.int32)
    for b in range(batch):
        end = length - int(rng.integers(0, length // 2 + 1)) * int(rng.integers(0, 2))
        cuts = np.sort(rng.integers(0, end + 1, size=int(rng.integers(0, 4))))
        bounds = [0, *cuts.tolist(), end]
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            positions[b, start:stop] = np.arange(stop - start)
            segments[b, start:stop] = i + 1
    return oracle.Tokens(positions, positions, segments, segments)


def run(backend, mask, arrays, tokens, *, scale, softcap, rows_aligned, dtype):
    """Returns out, lse, dq, dk, dv of one backend as float64 NumPy arrays."""
    q, k, v, dout, dlse = arrays

    def call(q, k, v):
        return attention(
            q, k, v, mask, **tokens._asdict(),
            scale=scale, softcap=softcap, backend=backend, rows_aligned=rows_aligned,
        )  # fmt: skip

    @jax.jit
    def both(q, k, v):
        results, pullback = jax.vjp(call, q, k, v)
        return *results, *pullback((dout.astype(dtype), jnp.asarray(dlse, jnp.float32)))

    results = both(*(jnp.asarray(x, dtype) for x in (q, k, v)))
    assert [x.dtype for x in results] == [dtype, jnp.float32, dtype, dtype, dtype]
    return [np.asarray(x.astype(jnp.float32), np.float64) for x in results]


def assert_matches(results, want: oracle.Answer, dtype: str):
    seen_BTN = ~np.isnan(want.lse_BTN)
    lse_BTN = np.where(seen_BTN, want.lse_BTN, EMPTY_LSE)
    for name, got, expected in zip(
        want._fields, results, want._replace(lse_BTN=lse_BTN), strict=True
    ):
        limit = TOLERANCE["float32" if name == "lse_BTN" else dtype]
        np.testing.assert_allclose(got, expected, atol=limit, rtol=limit, err_msg=name)
    assert not results[0][~seen_BTN].any(), "rows that see nothing must give exactly 0"
    assert not results[2][~seen_BTN].any(), "rows that see nothing must get no gradient"


@st.composite
def problems(draw):
    kv_heads = draw(st.sampled_from([1, 2]))
    causal = draw(st.booleans())
    length = draw(st.sampled_from([1, 7, 16, 33, 50]))
    return dict(
        batch=draw(st.sampled_from([1, 2])),
        length=length,
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.sampled_from([1, 2, 8])),
        head_dim=draw(st.sampled_from([16, 24, 80])),
        causal=causal,
        window=draw(st.sampled_from([None, 1, 5, 16, length])) if causal else None,
        softcap=draw(st.sampled_from([None, 2.0])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        rows_aligned=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def check(backend, p):
    rng = np.random.default_rng(p["seed"])
    q_shape = (p["batch"], p["length"], p["heads"], p["head_dim"])
    k_shape = (p["batch"], p["length"], p["kv_heads"], p["head_dim"])
    arrays = [rng.normal(size=s) for s in (q_shape, k_shape, k_shape, q_shape, q_shape[:3])]
    dtype = jnp.dtype(p["dtype"])
    # The oracle sees the rounded inputs, so that only the computation is judged.
    arrays = [np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)) for x in arrays]
    tokens = packed_tokens(rng, p["batch"], p["length"])
    rule = dict(causal=p["causal"], window=p["window"])
    maths = dict(scale=p["head_dim"] ** -0.5, softcap=p["softcap"])
    results = run(
        backend, Mask(**rule), arrays, tokens, **maths, rows_aligned=p["rows_aligned"], dtype=dtype
    )
    assert_matches(results, oracle.attend(*arrays, tokens, **rule, **maths), p["dtype"])


@settings(BUDGET, max_examples=12)
@given(p=problems())
def test_blockwise(p):
    # Small tiles, so that lengths of a test span several and odd lengths need padding.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 16)
        check("blockwise", p)


@settings(BUDGET, max_examples=6)
@given(p=problems())
def test_reference(p):
    check("reference", p)


def test_full_size_tiles():
    check(
        "blockwise",
        dict(batch=1, length=260, heads=2, kv_heads=1, head_dim=16, causal=True, window=100,
             softcap=None, dtype="float32", rows_aligned=True, seed=0),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_decoding_from_a_cache(backend, monkeypatch):
    """Queries at explicit positions over a longer cache, whose unwritten slots have segment 0."""
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    rng = np.random.default_rng(1)
    written, slots, new = 21, 40, 3
    k_positions = np.broadcast_to(np.arange(slots, dtype=np.int32), (2, slots))
    q_positions = np.broadcast_to(np.arange(written - new, written, dtype=np.int32), (2, new))
    tokens = oracle.Tokens(
        q_positions, k_positions, np.ones((2, new), np.int32), (k_positions < written).astype("i4")
    )
    arrays = [
        rng.normal(size=s).astype("f4")
        for s in (
            (2, new, 4, 16),
            (2, slots, 2, 16),
            (2, slots, 2, 16),
            (2, new, 4, 16),
            (2, new, 4),
        )
    ]
    maths = dict(scale=0.25, softcap=None)
    results = run(
        backend, Mask(window=6), arrays, tokens, **maths, rows_aligned=False, dtype=jnp.float32
    )
    want = oracle.attend(*arrays, tokens, causal=True, window=6, **maths)
    assert_matches(results, want, "float32")
