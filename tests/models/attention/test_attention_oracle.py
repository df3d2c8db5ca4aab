"""Every backend against the float64 oracle: random shapes, masks, dtypes; values and gradients."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from models.attention import blocks, blockwise, gpu, schedule
from models.attention.dispatch import attention, merge
from models.attention.mask import EMPTY_LSE, Mask
from models.attention.tpu_call import LOG2E
from tests.models.attention import oracle

# Error relative to 1 + |value|, for unit-normal inputs: float32 sums in another order. The largest
# seen over these examples was 2.8e-6.
TOLERANCE = 1e-5
# Half of a unit in the last place of bfloat16, relative to 1. What may be that much off is counted
# by the oracle, `sizes`: a bound, where a fixed tolerance is missed once in hundreds of examples,
# in the tail of thousands of results of up to 4,160 terms each.
ROUNDING = 2.0**-8
KERNELS = ("pallas", "triton")

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


def small_tiles(patch: pytest.MonkeyPatch) -> None:
    """Lengths of a test then span several tiles, and panels of the TPU backward."""
    patch.setattr(blockwise, "BLOCK", 16)
    patch.setattr(gpu, "FORWARD", (32, 16))
    patch.setattr(gpu, "BACKWARD", (16, 32))
    patch.setattr(blocks, "TABLE", dict.fromkeys(blocks.TABLE, (256, 128, 128, 256)))
    patch.setattr(blocks, "DQ_BYTES", dict.fromkeys(blocks.DQ_BYTES, 1))


def run(backend, arrays, tokens, rule, *, scale, rows_aligned, dtype, logit_bound=None):
    """Returns out, lse and all gradients of one backend as float64 NumPy arrays."""
    q, k, v, dout, dlse = arrays
    optional = (rule.sinks_N, rule.bias_BNTS)

    def call(q, k, v, sinks_N, bias_BNTS):
        return attention(
            q, k, v, Mask(rule.causal, rule.window, rule.chunk), **tokens._asdict(), scale=scale,
            softcap=rule.softcap, prefix_BS=rule.prefix_BS, sinks_N=sinks_N, bias_BNTS=bias_BNTS,
            alibi_slopes_N=rule.slopes_N, logit_bound=logit_bound, backend=backend,
            rows_aligned=rows_aligned,
        )  # fmt: skip

    @jax.jit
    def both(q, k, v):
        results, pullback = jax.vjp(call, q, k, v, *optional)
        gradients = pullback((dout.astype(dtype), jnp.asarray(dlse, jnp.float32)))
        return *results, *(x for x in gradients if x is not None)

    results = both(*(jnp.asarray(x, dtype) for x in (q, k, v)))
    assert [x.dtype for x in results[:5]] == [dtype, jnp.float32, dtype, dtype, dtype]
    return [np.asarray(x.astype(jnp.float32), np.float64) for x in results]


def assert_matches(results, want: oracle.Answer, rule: oracle.Rule, sizes=None):
    """Compares with the oracle; `sizes` are its own, for bfloat16."""
    seen_BTN = ~np.isnan(want.lse_BTN)
    expected = want._replace(lse_BTN=np.where(seen_BTN, want.lse_BTN, EMPTY_LSE))._asdict()
    rounded = sizes._replace(lse_BTN=np.zeros(seen_BTN.shape))._asdict() if sizes else {}
    if rule.sinks_N is None:
        del expected["dsinks_N"]
    if rule.bias_BNTS is None:
        del expected["dbias_BNTS"]
    else:
        shared = tuple(axis for axis in (0, 1) if rule.bias_BNTS.shape[axis] == 1)
        for parts in (expected, rounded):
            if parts:
                parts["dbias_BNTS"] = parts["dbias_BNTS"].sum(shared, keepdims=True)
    for (name, value), got in zip(expected.items(), results, strict=True):
        # What sums over all rows is held to the size of its terms.
        rows = np.sqrt(want.lse_BTN.size) if name in ("dsinks_N", "dbias_BNTS") else 1
        limit = TOLERANCE * rows * (1 + np.abs(value)) + ROUNDING * rounded.get(name, 0.0)
        excess = np.abs(got - value) / limit
        assert np.all(excess <= 1), (
            f"{name}: {np.nanmax(excess):.2f} times the limit at "
            f"{np.unravel_index(np.argmax(excess), excess.shape)}"
        )
    assert not results[0][~seen_BTN].any(), "rows that see nothing must give exactly 0"
    assert not results[2][~seen_BTN].any(), "rows that see nothing must get no gradient"


def as_multiplied(q, backend: str, rule: oracle.Rule, scale: float) -> np.ndarray:
    """The bfloat16 queries of the score products: the TPU kernels take the scale into them."""
    if backend != "pallas":
        return q
    factor = np.float32(scale * (LOG2E if rule.softcap is None else 1 / rule.softcap))
    return np.asarray(jnp.asarray(q * factor, jnp.bfloat16).astype(jnp.float32)) / factor


@st.composite
def problems(draw, lengths=(1, 7, 16, 33, 50), head_dims=(16, 24, 80), added=(None,)):
    kv_heads = draw(st.sampled_from([1, 2]))
    mask = draw(st.sampled_from(["all", "causal", "window", "chunk", "both"]))
    length = draw(st.sampled_from(lengths))
    size = st.sampled_from([1, 5, 16, length])
    return dict(
        batch=draw(st.sampled_from([1, 2])),
        length=length,
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.sampled_from([1, 2, 8])),
        head_dim=draw(st.sampled_from(head_dims)),
        value_dim=draw(st.sampled_from([None, *head_dims])),
        causal=mask != "all",
        window=draw(size) if mask in ("window", "both") else None,
        chunk=draw(size) if mask in ("chunk", "both") else None,
        softcap=draw(st.sampled_from([None, 2.0])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        rows_aligned=draw(st.booleans()),
        prefix=draw(st.booleans()),
        sinks=draw(st.booleans()),
        bounded=draw(st.booleans()),
        added=draw(st.sampled_from(added)),
        seed=draw(st.integers(0, 2**16)),
    )


def check(backend, p):
    rng = np.random.default_rng(p["seed"])
    B, T, N, K, H = (p[n] for n in ("batch", "length", "heads", "kv_heads", "head_dim"))
    V = p["value_dim"] or H
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, V), (B, T, N, V), (B, T, N))
    dtype = jnp.dtype(p["dtype"])
    # The oracle sees the rounded inputs, so that only the computation is judged.
    arrays = [rng.normal(size=s) for s in shapes]
    arrays = [np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)) for x in arrays]
    tokens = packed_tokens(rng, B, T)
    bias_shape = {"bias": (B, N, T, T), "shared bias": (1, 1, T, T)}.get(p["added"])
    rule = oracle.Rule(
        causal=p["causal"],
        window=p["window"],
        chunk=p["chunk"],
        softcap=p["softcap"],
        prefix_BS=rng.random((B, T)) < 0.3 if p["prefix"] else None,
        sinks_N=rng.normal(size=N).astype(np.float32) if p["sinks"] else None,
        slopes_N=rng.random(N).astype(np.float32) if p["added"] == "slopes" else None,
        bias_BNTS=rng.normal(size=bias_shape).astype(np.float32) if bias_shape else None,
    )
    scale = H**-0.5
    results = run(
        backend, arrays, tokens, rule, scale=scale, rows_aligned=p["rows_aligned"], dtype=dtype,
        logit_bound=40.0 if p["bounded"] else None,
    )  # fmt: skip
    if p["dtype"] == "float32":
        assert_matches(results, oracle.attend(*arrays, tokens, rule, scale), rule)
        return
    q = as_multiplied(arrays[0], backend, rule, scale)
    want, sizes = oracle.attend(q, *arrays[1:], tokens, rule, scale, sizes=True)
    assert_matches(results, want, rule, sizes)


ADDED = (None, "slopes", "bias", "shared bias")


@settings(BUDGET, max_examples=8)
@given(p=problems(added=ADDED))
def test_blockwise(p):
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch)
        check("blockwise", p)


@settings(BUDGET, max_examples=8)
@given(p=problems(added=ADDED))
def test_reference(p):
    check("reference", p)


@settings(BUDGET, max_examples=6)
@given(p=problems(lengths=(1, 100, 129, 300, 520), head_dims=(64, 80, 96, 128, 192, 256)))
def test_pallas(p):
    """In interpret mode; the heads of a group and the batch are kept few, the oracle is slow."""
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch)
        check("pallas", p | {"batch": 1} if p["length"] * p["heads"] > 1000 else p)


@settings(BUDGET, max_examples=6)
@given(p=problems(lengths=(1, 16, 33, 50, 100), head_dims=(16, 24, 80), added=(None, "slopes")))
def test_triton(p):
    """In interpret mode."""
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch)
        check("triton", p)


SIZES = dict(batch=1, length=260, heads=2, kv_heads=1, head_dim=16, value_dim=None, causal=True,
             window=100, chunk=None, softcap=None, dtype="float32", rows_aligned=True, prefix=False,
             sinks=False, bounded=False, added=None, seed=0)  # fmt: skip


@pytest.mark.parametrize("backend", ["blockwise", *KERNELS])
def test_full_size_tiles(backend):
    check(backend, SIZES)


@pytest.mark.parametrize("window", [256, 512])
def test_windows_that_end_at_the_corners_of_blocks(window, monkeypatch):
    """Three blocks of 256, four sub-tiles each; this seed makes the row one document."""
    small_tiles(monkeypatch)
    assert schedule.window_edge(Mask(window=window), (256, 256)) == window // 256
    check("pallas", SIZES | dict(length=768, window=window, head_dim=64, seed=2))


@pytest.mark.parametrize("bound", [40.0, 400.0])
def test_scores_at_the_bound(bound):
    """Scores reach the bound that is promised; one too large for exp is ignored, not trusted."""
    rng = np.random.default_rng(0)
    q, k = (rng.choice([-1.0, 1.0], (1, 200, 2, 64)) for _ in range(2))
    k[:, ::3] = q[:, ::3]
    rest = [rng.normal(size=s) for s in ((1, 200, 2, 64), (1, 200, 2, 64), (1, 200, 2))]
    arrays = [x.astype(np.float32) for x in (q, k, *rest)]
    tokens, rule, scale = packed_tokens(rng, 1, 200), oracle.Rule(), bound / 64
    results = run(
        "pallas", arrays, tokens, rule, scale=scale, rows_aligned=True, dtype=jnp.float32,
        logit_bound=bound,
    )  # fmt: skip
    want = oracle.attend(*arrays, tokens, rule, scale)
    for got, value in zip(results, want[:5], strict=True):
        value = np.nan_to_num(value, nan=EMPTY_LSE)
        # float32 keeps scores to 6e-8 of their size, and p errs by as much as its score.
        limit = 1e-5 + 1e-6 * bound
        np.testing.assert_allclose(got, value, atol=limit * max(scale, 1), rtol=limit)


@pytest.mark.parametrize("backend", ["blockwise", "reference", *KERNELS])
def test_decoding_from_a_cache(backend, monkeypatch):
    """Queries at explicit positions over a longer cache, whose unwritten slots have segment 0."""
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    rng = np.random.default_rng(1)
    written, slots, new = 210, 300, 3
    k_positions = np.broadcast_to(np.arange(slots, dtype=np.int32), (2, slots))
    q_positions = np.broadcast_to(np.arange(written - new, written, dtype=np.int32), (2, new))
    tokens = oracle.Tokens(
        q_positions, k_positions, np.ones((2, new), np.int32), (k_positions < written).astype("i4")
    )
    shapes = ((2, new, 4, 16), (2, slots, 2, 16), (2, slots, 2, 16), (2, new, 4, 16), (2, new, 4))
    arrays = [rng.normal(size=s).astype("f4") for s in shapes]
    rule = oracle.Rule(window=6)
    results = run(backend, arrays, tokens, rule, scale=0.25, rows_aligned=False, dtype=jnp.float32)
    assert_matches(results, oracle.attend(*arrays, tokens, rule, 0.25), rule)


@pytest.mark.parametrize("backend", ["blockwise", *KERNELS])
def test_two_runs_are_bit_equal(backend, monkeypatch):
    small_tiles(monkeypatch)
    tokens = packed_tokens(np.random.default_rng(1), 1, 200)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 200, 2, 64), jnp.bfloat16) for key in keys)

    @jax.jit
    def both(q, k, v):
        def call(q, k, v):
            return attention(
                q, k, v, Mask(), **tokens._asdict(), scale=0.1, rows_aligned=True, backend=backend
            )

        results, pullback = jax.vjp(call, q, k, v)
        return *results, *pullback(jax.tree.map(jnp.ones_like, results))

    for a, b in zip(both(q, k, v), both(q, k, v), strict=True):
        np.testing.assert_array_equal(a, b)


@partial(jax.jit, static_argnames="backend")
def merged_both_ways(backend, q, k, v, cotangents, tokens, keys_PBS):
    """Three parts of the keys merged from the left and from the right, and the two's gradients."""

    def call(q, k, v):
        def part(keys_BS):  # the other keys are taken for padding
            segments_BS = jnp.where(keys_BS, tokens.k_segments_BS, 0)
            ids = tokens._replace(k_segments_BS=segments_BS)._asdict()
            return attention(q, k, v, Mask(window=9), **ids, scale=0.25, backend=backend)

        a, b, c = zip(*jax.lax.map(part, keys_PBS), strict=True)
        return merge(merge(a, b), c), merge(a, merge(b, c))

    results, pull = jax.vjp(call, q, k, v)
    return results, pull((cotangents, cotangents))


@pytest.mark.parametrize("backend", ["blockwise", "reference", "pallas"])
@settings(BUDGET, max_examples=6)
@given(seed=st.integers(0, 2**16), parts=st.sampled_from([1, 2, 3]))
def test_merging_is_associative_and_gives_the_whole(backend, seed, parts):
    """For any three parts of the keys, interleaved and perhaps empty; values and gradients."""
    rng = np.random.default_rng(seed)
    B, T, N, K, H = 1, 40, 2, 1, 16
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H), (B, T, N))
    q, k, v, *cotangents = (rng.normal(size=s).astype(np.float32) for s in shapes)
    tokens = packed_tokens(rng, B, T)
    keys_PBS = rng.integers(0, parts, size=(B, T)) == np.arange(3)[:, None, None]
    results, gradients = merged_both_ways(backend, q, k, v, tuple(cotangents), tokens, keys_PBS)
    rule = oracle.Rule(window=9)
    want = oracle.attend(q, k, v, *cotangents, tokens, rule, 0.25)
    for out, lse in results:
        found = [out, lse, *(x / 2 for x in gradients)]
        assert_matches([np.asarray(x, np.float64) for x in found], want, rule)
