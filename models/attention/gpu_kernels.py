"""The Triton kernels for NVIDIA GPUs: forward, gradient of queries, gradients of keys and values.

One program makes one tile of its result and walks the tiles of the other side that the mask leaves
(FlashAttention-2, Dao 2023, arXiv 2307.08691). Nothing is added up by several programs, so two runs
are bit-equal. Lengths are whole tiles and head sizes powers of two here; `gpu.py` pads.

Shapes: H head dim of queries and keys, V head dim of values, R queries of a tile, C keys of a tile,
B batch, I query tiles, J key tiles.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from models.attention import schedule
from models.attention.mask import EMPTY_LSE

F32 = jnp.float32
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453

# Rows of the tokens' arrays, of queries and of keys.
_SEGMENT, _LAST, _FIRST, _POSITION = range(4)
_BEFORE, _AFTER = 1, 2


@dataclass(frozen=True)
class Kernel:
    """What is fixed in a kernel. rows, columns: queries and keys of a tile.

    causal, limited: which ends of a query's reach are tested. alibi: slopes are given.
    """

    rows: int
    columns: int
    scale: float
    softcap: float | None
    causal: bool
    limited: bool
    alibi: bool


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contracts one axis of each in float32; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == F32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=F32)


def _scores(left, right, q_ids, k_ids, slope, kernel: Kernel, *, hidden: bool, keys_first=False):
    """Returns (scores in base 2 of left @ right.T, tanh of the soft-cap or None).

    q_ids, k_ids: functions from a row of the tokens' arrays to its values for this tile. hidden:
    the tile holds pairs that the mask rules out.
    """

    def of_queries(row):
        return jnp.expand_dims(q_ids(row), 0 if keys_first else 1)

    def of_keys(row):
        return jnp.expand_dims(k_ids(row), 1 if keys_first else 0)

    scores, tanh = _dot(left, right, 1, 1) * kernel.scale, None
    if kernel.softcap is not None:
        tanh = jnp.tanh(scores / kernel.softcap)
        scores = tanh * kernel.softcap
    if kernel.alibi:
        scores -= slope * jnp.abs(of_queries(_POSITION) - of_keys(_POSITION)).astype(F32)
    scores *= LOG2E
    if hidden:
        seen = of_queries(_SEGMENT) == of_keys(_SEGMENT)
        if kernel.causal:
            seen &= of_keys(_BEFORE) <= of_queries(_LAST)
        if kernel.limited:
            seen &= of_keys(_AFTER) >= of_queries(_FIRST)
        scores = jnp.where(seen, scores, -jnp.inf)
    return scores, tanh


def spans(kind_BIJ: jax.Array) -> jax.Array:
    """Returns spans_BI4: first visible tile, start and end of the first full run, end of visible.

    Tiles in between that are not visible are computed, and hidden.
    """
    J = kind_BIJ.shape[2]
    j = jnp.arange(J, dtype=jnp.int32)
    seen, full = kind_BIJ != schedule.NOTHING, kind_BIJ == schedule.FULL
    last_BI = jnp.where(seen, j + 1, 0).max(2)
    first_BI, full_BI = (jnp.where(x, j, J).min(2) for x in (seen, full))
    rest_BI = jnp.where(~full & (j > full_BI[:, :, None]), j, J).min(2)
    full_BI, rest_BI = jnp.minimum(full_BI, last_BI), jnp.minimum(rest_BI, last_BI)
    return jnp.stack([first_BI, full_BI, rest_BI, last_BI], 2)


def _walk(spans_ref, visit, carry):
    """Visits the tiles of a span: the mask is tested before and after its wholly visible run."""
    first, full, rest, last = (spans_ref[i] for i in range(4))
    carry = lax.fori_loop(first, full, partial(visit, hidden=True), carry)
    carry = lax.fori_loop(full, rest, partial(visit, hidden=False), carry)
    return lax.fori_loop(rest, last, partial(visit, hidden=True), carry)


def forward(
    q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, slopes_ref, spans_ref, out_ref, lse_ref,
    *, kernel: Kernel,
):  # fmt: skip
    """Makes out and lse of a tile of queries."""
    q_RH, slope = q_ref[...], slopes_ref[0] if kernel.alibi else None

    def visit(j, carry, hidden: bool):
        acc_RV, max_R, sum_R = carry
        keys = pl.ds(j * kernel.columns, kernel.columns)
        s_RC, _ = _scores(
            q_RH, k_ref[keys, :], lambda row: q_ids_ref[row, :], lambda row: k_ids_ref[row, keys],
            slope, kernel, hidden=hidden,
        )  # fmt: skip
        new_max_R = jnp.maximum(max_R, s_RC.max(1))
        p_RC = jnp.exp2(s_RC - new_max_R[:, None])
        decay_R = jnp.exp2(max_R - new_max_R)
        v_CV = v_ref[keys, :]
        acc_RV = acc_RV * decay_R[:, None] + _dot(p_RC.astype(v_CV.dtype), v_CV, 1, 0)
        return acc_RV, new_max_R, sum_R * decay_R + p_RC.sum(1)

    max_R = jnp.full(lse_ref.shape, EMPTY_LSE, F32)
    start = jnp.zeros(out_ref.shape, F32), max_R, jnp.zeros_like(max_R)
    acc_RV, max_R, sum_R = _walk(spans_ref, visit, start)
    empty_R = sum_R == 0
    sum_R = jnp.where(empty_R, 1.0, sum_R)
    out_ref[...] = (acc_RV / sum_R[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(empty_R, EMPTY_LSE, (max_R + jnp.log2(sum_R)) * LN2)


def backward_queries(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_ids_ref, k_ids_ref, slopes_ref, spans_ref,
    dq_ref, *, kernel: Kernel,
):  # fmt: skip
    """Makes dq of a tile of queries. lse in base 2; delta: of dout * out summed, minus dlse."""
    q_RH, dout_RV, slope = q_ref[...], dout_ref[...], slopes_ref[0] if kernel.alibi else None
    lse_R1, delta_R1 = lse_ref[...][:, None], delta_ref[...][:, None]

    def visit(j, dq_RH, hidden: bool):
        keys = pl.ds(j * kernel.columns, kernel.columns)
        k_CH = k_ref[keys, :]
        s_RC, tanh_RC = _scores(
            q_RH, k_CH, lambda row: q_ids_ref[row, :], lambda row: k_ids_ref[row, keys],
            slope, kernel, hidden=hidden,
        )  # fmt: skip
        ds_RC = jnp.exp2(s_RC - lse_R1) * (_dot(dout_RV, v_ref[keys, :], 1, 1) - delta_R1)
        if tanh_RC is not None:
            ds_RC *= 1.0 - tanh_RC * tanh_RC
        return dq_RH + _dot(ds_RC.astype(k_CH.dtype), k_CH, 1, 0)

    dq_RH = _walk(spans_ref, visit, jnp.zeros(q_ref.shape, F32))
    dq_ref[...] = (dq_RH * kernel.scale).astype(dq_ref.dtype)


def backward_keys(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_ids_ref, k_ids_ref, slopes_ref, spans_ref,
    dk_ref, dv_ref, *, kernel: Kernel,
):  # fmt: skip
    """Makes dk and dv of a tile of keys, summed over the query heads that read it."""
    k_CH, v_CV = k_ref[...], v_ref[...]

    def head(g, sums):
        slope = slopes_ref[g] if kernel.alibi else None

        def visit(i, sums, hidden: bool):
            dk_CH, dv_CV = sums
            rows = pl.ds(i * kernel.rows, kernel.rows)
            q_RH, dout_RV = q_ref[rows, g, :], dout_ref[rows, g, :]
            s_CR, tanh_CR = _scores(
                k_CH, q_RH, lambda row: q_ids_ref[row, rows], lambda row: k_ids_ref[row, :],
                slope, kernel, hidden=hidden, keys_first=True,
            )  # fmt: skip
            p_CR = jnp.exp2(s_CR - lse_ref[g, rows][None, :])
            dv_CV += _dot(p_CR.astype(dout_RV.dtype), dout_RV, 1, 0)
            ds_CR = p_CR * (_dot(v_CV, dout_RV, 1, 1) - delta_ref[g, rows][None, :])
            if tanh_CR is not None:
                ds_CR *= 1.0 - tanh_CR * tanh_CR
            return dk_CH + _dot(ds_CR.astype(q_RH.dtype), q_RH, 1, 0), dv_CV

        return _walk(spans_ref, visit, sums)

    start = jnp.zeros(k_ref.shape, F32), jnp.zeros(v_ref.shape, F32)
    dk_CH, dv_CV = lax.fori_loop(0, q_ref.shape[1], head, start)
    dk_ref[...] = (dk_CH * kernel.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_CV.astype(dv_ref.dtype)
