"""The backward TPU kernel: gradients of q, k and v from one pass over the visible blocks.

Every grid step recomputes one block of probabilities, once, and uses it for all three gradients:
five matrix products instead of the seven of separate kernels. Steps run key block by key block; dk
and dv of a key block stay in VMEM, and so does dq of all rows of the call, each block of which is
written when its last key block is done. Scores are held transposed (keys first), so that the
log-sum-exp and delta rows spread over sublanes and only dq needs a transposition.

Shapes: B batch, T queries, S keys, K kv heads, G query heads per kv head, H head dim, P grid steps,
R query rows of a tile, C keys of a tile. The G heads of a kv head are one column of G * T rows.
"""

import operator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from models.attention import schedule
from models.attention.mask import finite
from models.attention.tpu_call import (
    F32,
    LANES,
    LN2,
    LOG2E,
    Kernel,
    cut,
    dot,
    ids_of,
    launch,
    load,
    spans,
)


def backward(
    rows, k_hSH, v_hSV, ids_B8T, tables_BP, first_tile, *, kernel: Kernel, scale: float,
    q_tiles: int, sum_dtype: jnp.dtype,
) -> list[jax.Array]:  # fmt: skip
    """Returns [dq_hRH, dk_hSH, dv_hSV]; `h` counts batch and kv heads.

    rows: q_hRH scaled as in the forward, do_hRV, lse_h1R in base 2, delta_h1R: all G * T rows, or
    a part that starts with block `first_tile`, an int32 (1,). Every row block and key block has a
    step in the tables (`schedule.backward_table`). q_tiles: the blocks of one head's T rows.
    sum_dtype: of dk and dv, which are the part's share.
    """
    q_hRH, do_hRV, lse_h1R, delta_h1R = rows
    (_, R, H), (kv_heads, _, V), keys = q_hRH.shape, v_hSV.shape, kernel.blocks.k
    return launch(
        partial(_backward_kernel, scale=scale, q_tiles=q_tiles),
        "torus_attention_backward",
        kernel,
        kv_heads=kv_heads,
        tables=(*tables_BP, first_tile),
        operands=(
            (q_hRH, "q"), (k_hSH, "k"), (v_hSV, "k"), (do_hRV, "q"), (lse_h1R, "q row"),
            (delta_h1R, "q row"), (ids_B8T, "ids"),
        ),
        results=(
            (jax.ShapeDtypeStruct(q_hRH.shape, q_hRH.dtype), "target"),
            (jax.ShapeDtypeStruct(k_hSH.shape, sum_dtype), "k"),
            (jax.ShapeDtypeStruct(v_hSV.shape, sum_dtype), "k"),
        ),
        scratch=((R, H), (keys, H), (keys, V)),
    )  # fmt: skip


def _backward_kernel(
    steps, bits, targets, first, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_ref,
    dq_ref, dk_ref, dv_ref, dq_all_ref, dk_sum_ref, dv_sum_ref, *, kernel: Kernel,
    index: jax.Array, scale: float, q_tiles: int,
):  # fmt: skip
    blocks, sub = kernel.blocks, kernel.blocks.sub
    step = steps[index]
    kind = schedule.kind(step)
    in_head = lax.rem(schedule.query_tile(step) + first[0], q_tiles)
    on_diagonal = in_head == schedule.key_tile(step)
    row = pl.multiple_of(schedule.query_tile(step) * blocks.q, LANES)

    def tile(rows: slice, columns: slice, hidden=None, load=load):
        """Adds what the tile of queries `rows` and keys `columns` gives to the three gradients."""
        q_RH, k_CH, do_RV = load(q_ref, rows), load(k_ref, columns), load(do_ref, rows)
        s_CR = dot(k_CH, q_RH, 1, 1)
        if kernel.softcap is not None:
            t_CR = jnp.tanh(s_CR)
            s_CR = t_CR * (kernel.softcap * LOG2E)
        s_CR -= lse_ref[0, :, rows]
        if hidden is not None:
            s_CR = hidden(s_CR)  # last, so that a row's NaN reaches only the keys that it sees
        p_CR = jnp.exp2(s_CR)
        dv_sum_ref[columns] += dot(p_CR.astype(do_RV.dtype), do_RV, 1, 0)
        ds_CR = p_CR * (dot(load(v_ref, columns), do_RV, 1, 1) - delta_ref[0, :, rows])
        if kernel.softcap is not None:
            ds_CR *= 1.0 - t_CR * t_CR
        ds_CR = ds_CR.astype(q_RH.dtype)
        dk_sum_ref[columns] += dot(ds_CR, q_RH, 1, 0)
        dq_rows = pl.ds(row + rows.start, rows.stop - rows.start)
        dq_all_ref[dq_rows] += dot(ds_CR, k_CH, 0, 0)

    @pl.when(pl.program_id(1) == 0)
    def _():
        def clear(i, _):
            dq_all_ref[pl.ds(pl.multiple_of(i * LANES, LANES), LANES)] = jnp.zeros(
                (LANES, dq_all_ref.shape[1]), F32
            )
            return 0

        lax.fori_loop(0, dq_all_ref.shape[0] // LANES, clear, 0)

    @pl.when(schedule.is_first(step))
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    for edge in (False, True)[: kernel.aligned + kernel.edge]:

        @pl.when((kind == schedule.DIAGONAL) & (~on_diagonal if edge else on_diagonal))
        def _(edge=edge):
            keep = operator.gt if edge else operator.le  # of key and query
            for c in range(0, blocks.k, sub):
                for r in range(0, c + sub, sub) if edge else range(c, blocks.q, sub):
                    hidden = partial(cut, keep, 0) if r == c else None
                    tile(slice(r, r + sub), slice(c, c + sub), hidden)

    @pl.when(kind == schedule.FULL)
    def _():
        for columns in spans(0, blocks.k, blocks.columns):
            for rows in spans(0, blocks.q, blocks.rows):
                tile(rows, columns)

    @pl.when(kind == schedule.PART)
    def _():
        visible = bits[index]
        q_start = in_head * blocks.q
        k_start = schedule.key_tile(step) * blocks.k

        for i, rows in enumerate(spans(0, blocks.q, sub)):
            for j, columns in enumerate(spans(0, blocks.k, sub)):

                @pl.when((visible >> (i * (blocks.k // sub) + j)) & 1 == 1)
                def _(rows=rows, columns=columns):
                    hidden = partial(
                        _hide, ids_ref=ids_ref, q_start=q_start + rows.start,
                        k_start=k_start + columns.start, kernel=kernel,
                    )  # fmt: skip
                    tile(rows, columns, hidden, lambda *at: finite(load(*at)))

    @pl.when(schedule.is_last(step))
    def _():
        dk_sum = dk_sum_ref[...] * (LN2 if kernel.softcap is None else kernel.softcap)
        dk_ref[0] = dk_sum.astype(dk_ref.dtype)
        dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)

    @pl.when(schedule.emits(step))
    def _():
        dq_ref[0] = (dq_all_ref[pl.ds(row, blocks.q)] * scale).astype(dq_ref.dtype)


def _hide(s_CR: jax.Array, ids_ref, q_start, k_start, kernel: Kernel) -> jax.Array:
    """As `tpu_forward.hide`, for scores with keys first."""
    columns, rows = s_CR.shape
    q_8R = ids_of(ids_ref, q_start, rows)
    if kernel.aligned:
        k_CR = lax.broadcasted_iota(jnp.int32, (columns, rows), 0)
        ends_8R = q_8R - k_start
        s_CR = jnp.where(k_CR >= ends_8R[0:1], s_CR, -jnp.inf)
        return jnp.where(k_CR <= ends_8R[1:2], s_CR, -jnp.inf)
    k_C8 = ids_of(ids_ref, k_start, columns).T
    s_CR = jnp.where(q_8R[0:1] == k_C8[:, 3:4], s_CR, -jnp.inf)
    if kernel.causal:
        s_CR = jnp.where(k_C8[:, 4:5] <= q_8R[1:2], s_CR, -jnp.inf)
    if kernel.limited:
        s_CR = jnp.where(k_C8[:, 5:6] >= q_8R[2:3], s_CR, -jnp.inf)
    return s_CR
