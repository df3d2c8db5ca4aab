"""The Triton kernels for NVIDIA GPUs: forward, gradient of queries, gradients of keys and values.

One program of a grid makes one tile of its result and walks the tiles of the other side that the
mask leaves (FlashAttention-2, Dao 2023, arXiv 2307.08691). Nothing is added by several programs, so
two runs are bit-equal. Lengths are whole tiles and head sizes powers of two here; `gpu.py` pads.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N // K, H head dim of queries and
keys, V head dim of values, R queries of a tile, C keys of a tile, I query tiles, J key tiles.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from models.attention.mask import EMPTY_LSE

F32 = jnp.float32
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453

# Rows of the tokens' arrays: q_ids_B4T and k_ids_B4S.
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
    interpret: bool

    def call(self, body, name: str, grid, in_specs, out_specs, out_shape, operands):
        """Runs `body` over the grid; operands that are None reach it as None."""
        wide = max(x.shape[-1] for x in operands[:3]) > 64
        return pl.pallas_call(
            partial(body, kernel=self),
            grid=grid,
            in_specs=[
                None if operand is None else spec
                for spec, operand in zip(in_specs, operands, strict=True)
            ],
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=triton.CompilerParams(num_warps=8 if wide else 4, num_stages=2),
            interpret=self.interpret,
            name=name,
        )(*operands)


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
    q_axis, k_axis = (0, 1) if keys_first else (1, 0)

    def of_queries(row):
        return jnp.expand_dims(q_ids(row), q_axis)

    def of_keys(row):
        return jnp.expand_dims(k_ids(row), k_axis)

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


def _walk(spans_ref, visit, carry):
    """Visits the tiles of a span: the mask is tested before and after its wholly visible run."""
    first, full, rest, last = (spans_ref[i] for i in range(4))
    carry = lax.fori_loop(first, full, partial(visit, hidden=True), carry)
    carry = lax.fori_loop(full, rest, partial(visit, hidden=False), carry)
    return lax.fori_loop(rest, last, partial(visit, hidden=True), carry)


# ------------------------------------------------------------------------------ by query tile


def _query_specs(kernel: Kernel, B: int, T: int, S: int, N: int, K: int, H: int, V: int):
    """Returns (grid, specs by name): the last query tiles come first, they have the most to do."""
    rows, G = kernel.rows, N // K
    tiles = T // rows

    def tile(i):
        return tiles - 1 - i

    return (tiles, N, B), {
        "q": pl.BlockSpec((None, rows, None, H), lambda i, n, b: (b, tile(i), n, 0)),
        "out": pl.BlockSpec((None, rows, None, V), lambda i, n, b: (b, tile(i), n, 0)),
        "k": pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, n // G, 0)),
        "v": pl.BlockSpec((None, S, None, V), lambda i, n, b: (b, 0, n // G, 0)),
        "row": pl.BlockSpec((None, None, rows), lambda i, n, b: (b, n, tile(i))),
        "q_ids": pl.BlockSpec((None, 4, rows), lambda i, n, b: (b, 0, tile(i))),
        "k_ids": pl.BlockSpec((None, 4, S), lambda i, n, b: (b, 0, 0)),
        "spans": pl.BlockSpec((None, None, 4), lambda i, n, b: (b, tile(i), 0)),
        "slope": pl.BlockSpec((1,), lambda i, n, b: (n,)),
    }


def forward(q_BTNH, k_BSKH, v_BSKV, q_ids_B4T, k_ids_B4S, spans_BI4, slopes_N, kernel: Kernel):
    """Returns (out_BTNV in q's dtype, lse_BNT float32)."""
    (B, T, N, H), (S, K, V) = q_BTNH.shape, v_BSKV.shape[1:]
    grid, spec = _query_specs(kernel, B, T, S, N, K, H, V)
    return kernel.call(
        _forward_kernel, "torus_attention_forward", grid,
        [spec[x] for x in ("q", "k", "v", "q_ids", "k_ids", "spans", "slope")],
        [spec["out"], spec["row"]],
        [jax.ShapeDtypeStruct((B, T, N, V), q_BTNH.dtype), jax.ShapeDtypeStruct((B, N, T), F32)],
        (q_BTNH, k_BSKH, v_BSKV, q_ids_B4T, k_ids_B4S, spans_BI4, slopes_N),
    )  # fmt: skip


def _forward_kernel(
    q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, spans_ref, slope_ref, out_ref, lse_ref,
    *, kernel: Kernel,
):  # fmt: skip
    q_RH, slope = q_ref[...], slope_ref[0] if kernel.alibi else None

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

    start = (
        jnp.zeros(out_ref.shape, F32),
        jnp.full(kernel.rows, EMPTY_LSE, F32),
        jnp.zeros(kernel.rows, F32),
    )
    acc_RV, max_R, sum_R = _walk(spans_ref, visit, start)
    empty_R = sum_R == 0
    sum_R = jnp.where(empty_R, 1.0, sum_R)
    out_ref[...] = (acc_RV / sum_R[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(empty_R, EMPTY_LSE, (max_R + jnp.log2(sum_R)) * LN2)


def backward_queries(
    q_BTNH, k_BSKH, v_BSKV, dout_BTNV, lse_BNT, delta_BNT, q_ids_B4T, k_ids_B4S, spans_BI4,
    slopes_N, kernel: Kernel,
):  # fmt: skip
    """Returns dq_BTNH in q's dtype. lse in base 2; delta: rows' sums of dout * out, minus dlse."""
    (B, T, N, H), (S, K, V) = q_BTNH.shape, v_BSKV.shape[1:]
    grid, spec = _query_specs(kernel, B, T, S, N, K, H, V)
    names = ("q", "k", "v", "out", "row", "row", "q_ids", "k_ids", "spans", "slope")
    return kernel.call(
        _backward_queries_kernel, "torus_attention_backward_queries", grid,
        [spec[x] for x in names], spec["q"], jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        (q_BTNH, k_BSKH, v_BSKV, dout_BTNV, lse_BNT, delta_BNT, q_ids_B4T, k_ids_B4S, spans_BI4,
         slopes_N),
    )  # fmt: skip


def _backward_queries_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_ids_ref, k_ids_ref, spans_ref, slope_ref,
    dq_ref, *, kernel: Kernel,
):  # fmt: skip
    q_RH, dout_RV, slope = q_ref[...], dout_ref[...], slope_ref[0] if kernel.alibi else None
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


# ------------------------------------------------------------------------------ by key tile


def backward_keys(
    q_BTNH, k_BSKH, v_BSKV, dout_BTNV, lse_BNT, delta_BNT, q_ids_B4T, k_ids_B4S, spans_BJ4,
    slopes_N, kernel: Kernel,
):  # fmt: skip
    """Returns (dk_BSKH, dv_BSKV), summed over the G query heads of each kv head."""
    (B, T, N, H), (S, K, V) = q_BTNH.shape, v_BSKV.shape[1:]
    G, columns = N // K, kernel.columns
    heads, keys = lambda j, n, b: (b, 0, n, 0), lambda j, n, b: (b, j, n, 0)
    k_spec, v_spec = (pl.BlockSpec((None, columns, None, size), keys) for size in (H, V))
    row = pl.BlockSpec((None, G, T), lambda j, n, b: (b, n, 0))
    return kernel.call(
        _backward_keys_kernel, "torus_attention_backward_keys", (S // columns, K, B),
        [
            pl.BlockSpec((None, T, G, H), heads), k_spec, v_spec,
            pl.BlockSpec((None, T, G, V), heads), row, row,
            pl.BlockSpec((None, 4, T), lambda j, n, b: (b, 0, 0)),
            pl.BlockSpec((None, 4, columns), lambda j, n, b: (b, 0, j)),
            pl.BlockSpec((None, None, 4), lambda j, n, b: (b, j, 0)),
            pl.BlockSpec((G,), lambda j, n, b: (n,)),
        ],
        [k_spec, v_spec],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKH, v_BSKV)],
        (q_BTNH, k_BSKH, v_BSKV, dout_BTNV, lse_BNT, delta_BNT, q_ids_B4T, k_ids_B4S, spans_BJ4,
         slopes_N),
    )  # fmt: skip


def _backward_keys_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_ids_ref, k_ids_ref, spans_ref, slopes_ref,
    dk_ref, dv_ref, *, kernel: Kernel,
):  # fmt: skip
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
