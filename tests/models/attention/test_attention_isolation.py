"""What one part of a row must not do to another: documents, padding, rows that see nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import blockwise, gpu
from models.attention.dispatch import attention
from models.attention.mask import EMPTY_LSE, Mask

B, N, K, H = 2, 4, 2, 16
DOCUMENTS = (19, 13)
PADDING = 8
T = sum(DOCUMENTS) + PADDING
POSITIONS_BT = np.tile(
    np.concatenate([np.arange(n) for n in (*DOCUMENTS, PADDING)]), (B, 1)
).astype(np.int32)
SEGMENTS_BT = np.tile(np.repeat([1, 2, 0], (*DOCUMENTS, PADDING)), (B, 1)).astype(np.int32)

NAMES = ("q", "k", "v", "dout", "dlse")
OPTIONS = ({}, dict(rows_aligned=False, softcap=20.0))

every_backend = pytest.mark.parametrize("backend", ["blockwise", "reference", "pallas", "triton"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    monkeypatch.setattr(gpu, "FORWARD", (16, 16))
    monkeypatch.setattr(gpu, "BACKWARD", (16, 16))


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K))


# Compiled once per backend and shape for the whole file: compiling is what these tests cost.
STATIC = ("backend", "rows_aligned", "softcap")


@partial(jax.jit, static_argnames=STATIC)
def attend(backend, q, k, v, positions=POSITIONS_BT, segments=SEGMENTS_BT, **options):
    return attention(
        q, k, v, Mask(window=9), q_positions_BT=positions, k_positions_BS=positions,
        q_segments_BT=segments, k_segments_BS=segments, scale=H**-0.5, backend=backend,
        **dict(rows_aligned=True) | options,
    )  # fmt: skip


@partial(jax.jit, static_argnames=STATIC)
def pull(backend, q, k, v, dout, dlse, **options):
    """The gradients of q, k and v for given cotangents of out and lse."""
    return jax.vjp(lambda *qkv: attend(backend, *qkv, **options), q, k, v)[1]((dout, dlse))


def cotangents(rows_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random cotangents of out and lse in the chosen rows, 0 elsewhere."""
    rng = np.random.default_rng(1)
    dout, dlse = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, T, N))
    return (
        (dout * rows_BT[:, :, None, None]).astype(np.float32),
        (dlse * rows_BT[:, :, None]).astype(np.float32),
    )


@every_backend
def test_packed_equals_separate(backend):
    q, k, v = inputs()
    out, lse = attend(backend, q, k, v)
    for start, length in zip((0, DOCUMENTS[0]), DOCUMENTS, strict=True):
        rows = slice(start, start + length)
        alone = [x[:, rows] for x in (q, k, v, POSITIONS_BT, SEGMENTS_BT)]
        alone_out, alone_lse = attend(backend, *alone)
        np.testing.assert_allclose(out[:, rows], alone_out, atol=1e-6)
        np.testing.assert_allclose(lse[:, rows], alone_lse, atol=1e-6)


@every_backend
def test_changing_one_document_leaves_the_other_bit_equal(backend):
    q, k, v = inputs()
    first = slice(0, DOCUMENTS[0])
    second = slice(DOCUMENTS[0], sum(DOCUMENTS))
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[:, first] = 100 * x[:, first] + 3
    given = cotangents(SEGMENTS_BT > 0)
    before = [*attend(backend, q, k, v), *pull(backend, q, k, v, *given)]
    after = [*attend(backend, *changed), *pull(backend, *changed, *given)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[:, second], new[:, second])
        assert not np.array_equal(old[:, first], new[:, first])


@every_backend
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_in_padding_reaches_nobody(backend, poison):
    clean = [*inputs(), *cotangents(np.ones((B, T)))]
    poisoned = [x.copy() for x in clean]
    for x in poisoned:
        x[:, SEGMENTS_BT[0] == 0] = poison
    before = [*attend(backend, *clean[:3]), *pull(backend, *clean)]
    after = [*attend(backend, *poisoned[:3]), *pull(backend, *poisoned)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("backend", ["blockwise", "pallas"])
@pytest.mark.parametrize("options", OPTIONS, ids=["rows aligned", "any rows"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "dlse"])
def test_poison_stays_in_its_document(backend, name, options):
    """One bad number at a token: all others are bit-equal, and those that see it are not finite."""
    clean = dict(zip(NAMES, [*inputs(), *cotangents(np.ones((B, T)))], strict=True))
    bad, at = DOCUMENTS[0] + 3, slice(DOCUMENTS[0], sum(DOCUMENTS))
    results = {}
    for poison in (0, np.nan, np.inf, -np.inf):
        arrays = {n: x.copy() for n, x in clean.items()}
        arrays[name][0, bad, 0] = poison
        q, k, v, *given = (arrays[n] for n in NAMES)
        results[poison] = dict(zip(
            ("out", "lse", "dq", "dk", "dv"),
            [*attend(backend, q, k, v, **options), *pull(backend, q, k, v, *given, **options)],
            strict=True,
        ))  # fmt: skip
    touched = {"q": ("out", "dq"), "k": ("out", "lse", "dk"), "v": ("out", "dv")}
    for poison in (np.nan, np.inf, -np.inf):
        for result, value in results[poison].items():
            value, want = np.array(value), np.array(results[0][result])
            if result in touched.get(name, ("dq", "dk")) and (poison is np.nan or name != "k"):
                assert not np.all(np.isfinite(value[0, at])), result
            value[0, at] = want[0, at] = 0
            np.testing.assert_array_equal(value, want, err_msg=f"{poison} in {name}: {result}")


@every_backend
def test_padding_gives_zero_and_gets_no_gradient(backend):
    q, k, v = inputs()
    padding = SEGMENTS_BT[0] == 0
    out, lse = attend(backend, q, k, v)
    assert not np.any(out[:, padding])
    assert np.all(lse[:, padding] == np.float32(EMPTY_LSE))
    for grad in pull(backend, q, k, v, *cotangents(np.ones((B, T)))):
        assert np.all(np.isfinite(grad))
        assert not np.any(grad[:, padding])


@every_backend
def test_queries_whose_document_is_elsewhere(backend):
    """Real queries, but none of their keys here (one part of a sequence spread over devices)."""
    q, k, v = inputs()

    def call(q, k, v):
        ids = jnp.asarray(POSITIONS_BT, jnp.int32)
        ones = jnp.ones((B, T), jnp.int32)
        return attention(
            q, k, v, Mask(), q_positions_BT=ids, k_positions_BS=ids, q_segments_BT=ones,
            k_segments_BS=2 * ones, scale=1.0, backend=backend,
        )  # fmt: skip

    @jax.jit
    def both(q, k, v):
        results, pullback = jax.vjp(call, q, k, v)
        return results, pullback(jax.tree.map(jnp.ones_like, results))

    (out, lse), grads = both(q, k, v)
    assert not np.any(out)
    assert np.all(lse == np.float32(EMPTY_LSE))
    for grad in grads:
        assert not np.any(grad)


@every_backend
def test_parts_share_the_gradient_of_the_whole(backend):
    """Given out and lse of the whole, every part of the keys gives its own share and no more."""
    positions, segments = (jnp.asarray(x, jnp.int32) for x in (POSITIONS_BT, SEGMENTS_BT))

    def part(q, k, v, keys=slice(None), given=None):
        return attention(
            q, k[:, keys], v[:, keys], Mask(), q_positions_BT=positions, q_segments_BT=segments,
            k_positions_BS=positions[:, keys], k_segments_BS=segments[:, keys], scale=0.3,
            backend=backend, given=given,
        )  # fmt: skip

    @jax.jit
    def both(q, k, v, dout, dlse):
        whole, pull = jax.vjp(part, q, k, v)
        shares = [
            jax.vjp(lambda *qkv, s=s: part(*qkv, s, whole), q, k, v)[1]((dout, dlse))
            for s in (slice(23), slice(23, None))
        ]
        return pull((dout, dlse)), jax.tree.map(jnp.add, *shares)

    want, got = both(*inputs(), *cotangents(SEGMENTS_BT > 0))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
