"""The forward TPU kernel: one grid step per visible block, with a body for each kind of block.

FULL blocks hold no mask code at all; DIAGONAL ones leave out the sub-tiles above the diagonal and
mask those on it by row numbers; PART ones test each visible sub-tile against the tokens' reach. The
running maximum and sum of a query block stay in VMEM from its first step to its last
(FlashAttention-2, Dao 2023, arXiv 2307.08691). Scores are in base 2: exp2 is what the chip has.

Shapes: T queries, S keys, H head dim, V of values, P grid steps, R rows of a tile, C columns of a
tile, L lanes. `h` counts batch and query heads.
"""

import operator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.attention import schedule
from models.attention.mask import EMPTY_LSE, finite
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

# JAX 0.12 has moved it; 0.10 has it at the old place only.
_reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal


def hide(s_RC, ids_ref, q_start, k_start, kernel: Kernel) -> jax.Array:
    """Puts -inf where a tile of scores is not visible by `ids`, see `_ids` in tpu.py.

    One select for each condition: masks that are combined first spill out of their few registers.
    """
    rows, columns = s_RC.shape
    q_R8 = ids_of(ids_ref, q_start, rows).T
    if kernel.aligned:
        k_RC, ends_R8 = lax.broadcasted_iota(jnp.int32, (rows, columns), 1), q_R8 - k_start
        s_RC = jnp.where(k_RC >= ends_R8[:, 0:1], s_RC, -jnp.inf)
        return jnp.where(k_RC <= ends_R8[:, 1:2], s_RC, -jnp.inf)
    k_8C = ids_of(ids_ref, k_start, columns)
    s_RC = jnp.where(q_R8[:, 0:1] == k_8C[3:4], s_RC, -jnp.inf)
    if kernel.causal:
        s_RC = jnp.where(k_8C[4:5] <= q_R8[:, 1:2], s_RC, -jnp.inf)
    if kernel.limited:
        s_RC = jnp.where(k_8C[5:6] >= q_R8[:, 2:3], s_RC, -jnp.inf)
    return s_RC


def forward(q_hTH, k_hSH, v_hSH, ids_B8T, step_BP, bits_BP, kernel: Kernel):
    """Returns (out_hTH in q's dtype, lse_h1T float32), lengths being whole blocks.

    q carries the scale of base-2 scores, with a soft-cap the scale divided by the cap.
    """
    (heads, T, _), (kv_heads, _, V), rows = q_hTH.shape, v_hSH.shape, kernel.blocks.q
    return launch(
        _forward_kernel,
        "torus_attention_forward",
        kernel,
        kv_heads=kv_heads,
        tables=(step_BP, bits_BP),
        operands=((q_hTH, "q"), (k_hSH, "k"), (v_hSH, "k"), (ids_B8T, "ids")),
        results=(
            (jax.ShapeDtypeStruct((heads, T, V), q_hTH.dtype), "q"),
            (jax.ShapeDtypeStruct((heads, 1, T), F32), "q row"),
        ),
        scratch=((rows, V), (rows, LANES), (rows, LANES)),
    )


def _forward_kernel(
    steps, bits, q_ref, k_ref, v_ref, ids_ref, out_ref, lse_ref, acc_ref, max_ref, sum_ref,
    *, kernel: Kernel, index: jax.Array,
):  # fmt: skip
    blocks, sub = kernel.blocks, kernel.blocks.sub
    step = steps[index]
    kind = schedule.kind(step)
    on_diagonal = schedule.query_tile(step) == schedule.key_tile(step)

    def tile(rows: slice, columns: slice, hidden=None, starts: bool = False, load=load):
        """Adds the keys of `columns` to the sums of `rows`, or starts the sums with them."""
        s_RC = dot(load(q_ref, rows), load(k_ref, columns), 1, 1)
        if kernel.softcap is not None:
            s_RC = jnp.tanh(s_RC) * (kernel.softcap * LOG2E)
        if hidden is not None:
            s_RC = hidden(s_RC)
        if kernel.bounded:
            p_RC = jnp.exp2(s_RC)
        else:
            max_RL = jnp.broadcast_to(s_RC.max(1, keepdims=True), (s_RC.shape[0], LANES))
            if not starts:
                old_RL = max_ref[rows]
                max_RL = jnp.maximum(old_RL, max_RL)
                decay_RL = jnp.exp2(old_RL - max_RL)
            max_ref[rows] = max_RL
            p_RC = jnp.exp2(s_RC - widen(max_RL, s_RC.shape[1]))
        # Sums stay apart by lane until the last step: adding lanes up at every tile costs more.
        sum_RL = sum(p_RC[:, c : c + LANES] for c in range(0, p_RC.shape[1], LANES))
        pv_RH = dot(p_RC.astype(v_ref.dtype), load(v_ref, columns), 1, 0)
        if starts:
            sum_ref[rows], acc_ref[rows] = sum_RL, pv_RH
        elif kernel.bounded:
            sum_ref[rows] += sum_RL
            acc_ref[rows] += pv_RH
        else:
            sum_ref[rows] = sum_ref[rows] * decay_RL + sum_RL
            acc_ref[rows] = acc_ref[rows] * widen(decay_RL, pv_RH.shape[1]) + pv_RH

    @pl.when(schedule.is_first(step) & (kind != schedule.DIAGONAL))
    def _():
        max_ref[...] = jnp.full_like(max_ref, EMPTY_LSE)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    if kernel.aligned:

        @pl.when((kind == schedule.DIAGONAL) & on_diagonal)
        def _():
            for c in range(0, blocks.k, sub):
                columns = slice(c, c + sub)
                for rows in spans(c, c + sub, blocks.rows):
                    tile(rows, columns, partial(cut, operator.ge, rows.start - c), c == 0)
                for rows in spans(c + sub, blocks.q, blocks.rows):
                    tile(rows, columns, starts=c == 0)

    if kernel.edge:

        @pl.when((kind == schedule.DIAGONAL) & ~on_diagonal)
        def _():
            for c in range(0, blocks.k, sub):
                columns = slice(c, c + sub)
                for rows in spans(0, c, blocks.rows):
                    tile(rows, columns)
                for rows in spans(c, c + sub, blocks.rows):
                    tile(rows, columns, partial(cut, operator.lt, rows.start - c))

    @pl.when(kind == schedule.FULL)
    def _():
        for rows in spans(0, blocks.q, blocks.rows):
            for columns in spans(0, blocks.k, blocks.columns):
                tile(rows, columns)

    @pl.when(kind == schedule.PART)
    def _():
        visible = bits[index]
        q_start = schedule.query_tile(step) * blocks.q
        k_start = schedule.key_tile(step) * blocks.k

        def load_apart(ref, at: slice):
            """What is not finite in a value moves into its key's score, which `hide` can remove."""
            if ref is v_ref:
                return finite(load(v_ref, at))
            if ref is k_ref:
                flaw_C1 = (0.0 * v_ref[0, at].astype(F32)).sum(1, keepdims=True)
                return (k_ref[0, at].astype(F32) + flaw_C1).astype(k_ref.dtype)
            return load(ref, at)

        for i, rows in enumerate(spans(0, blocks.q, sub)):
            for j, columns in enumerate(spans(0, blocks.k, sub)):
                bit = i * (blocks.k // sub) + j

                @pl.when((visible >> bit) & 1 == 1)
                def _(rows=rows, columns=columns):
                    for part in spans(rows.start, rows.stop, blocks.rows):
                        hidden = partial(
                            hide, ids_ref=ids_ref, q_start=q_start + part.start,
                            k_start=k_start + columns.start, kernel=kernel,
                        )  # fmt: skip
                        tile(part, columns, hidden, load=load_apart)

    @pl.when(schedule.is_last(step))
    def _():
        sum_RL = jnp.broadcast_to(sum_ref[...].sum(1, keepdims=True), sum_ref.shape)
        # A row that saw nothing has sum 0 and accumulator 0: any finite divisor gives 0.
        divisor_RL = jnp.maximum(sum_RL, 1e-30)
        inverse_RL = _reciprocal(divisor_RL, approx=True)
        for _ in range(2):  # Newton steps; cheaper on v5e than the exact reciprocal
            inverse_RL *= 2.0 - divisor_RL * inverse_RL
        out_ref[0] = (acc_ref[...] * widen(inverse_RL, acc_ref.shape[1])).astype(out_ref.dtype)
        # One transposition takes both to rows, where the logarithm costs 1/128 of the work.
        lane = lax.broadcasted_iota(jnp.int32, sum_RL.shape, 1)
        both_LR = jnp.where(lane < LANES // 2, sum_RL, max_ref[...]).T
        sum_1R, max_1R = both_LR[:1], both_LR[LANES // 2 : LANES // 2 + 1]
        lse_1R = jnp.log(jnp.maximum(sum_1R, 1e-30)) + (0.0 if kernel.bounded else max_1R * LN2)
        lse_ref[0] = jnp.where(sum_1R == 0, EMPTY_LSE, lse_1R)


def widen(x_RL: jax.Array, width: int) -> jax.Array:
    """Gives a value repeated over the lanes any width."""
    copies = -(-width // LANES)
    return (jnp.tile(x_RL, (1, copies)) if copies > 1 else x_RL)[:, :width]
