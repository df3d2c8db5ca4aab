"""Attention on TPU by Pallas kernels: the function behind the backend `tpu`, and its gradient.

Brings arrays into the kernels' layout (heads first, whole blocks, scores in base 2), makes the
tables of steps, and runs the kernels of `tpu_forward.py` and `tpu_backward.py`. Away from a TPU the
kernels are interpreted, which is exact and slow: for tests.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N // K, H head dim of queries and
keys, V head dim of values.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models.attention import schedule
from models.attention.blocks import DEFAULT_CHIP, DQ_BYTES, VMEM_BYTES, Blocks, blocks_for
from models.attention.mask import FAR, Mask, Reach, needed_IJ
from models.attention.problem import Extras, Problem, with_gradient
from models.attention.tpu_backward import backward
from models.attention.tpu_call import F32, LOG2E, Kernel
from models.attention.tpu_forward import forward

LARGEST_BOUND = 60.0
"""Largest `logit_bound` for which the maximum is left out: e^60 times a million keys times values
of 1e6 is 1e38, the end of float32, and e^-60 is still a normal number."""

_STEP_BYTES = 768 * 1024  # of the 1 MiB that a core has for scalars


def tpu_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    reach: Reach,
    extras: Extras,
    problem: Problem,
    given: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BTNV in q's dtype, lse_BTN float32): the contract is `dispatch.attention`'s."""
    del extras  # `refusal` lets none pass
    return _attend(q_BTNH, k_BSKH, v_BSKV, reach, given, problem)


def refusal(problem: Problem) -> str | None:
    """Returns why the kernels cannot do a problem, or None."""
    size = max(problem.head_dim, problem.value_dim)
    if problem.bias or problem.alibi:
        return f"it adds no {'bias' if problem.bias else 'ALiBi'} to the scores"
    if size > 256:
        return f"head size {size} is above 256"
    if problem.dtype not in (jnp.bfloat16, F32):
        return f"it takes bfloat16 and float32, not {problem.dtype}"
    T, S, group = problem.queries, problem.keys, problem.heads // problem.kv_heads
    blocks = _blocks(problem, "backward")
    steps = int(_listed(problem.mask, T, S, blocks, problem.rows_aligned).sum()) * group
    if problem.batch * steps * 12 > _STEP_BYTES:
        return f"{problem.batch} x {steps:,} blocks are more than the scalar memory can list"
    return None


def _chip(problem: Problem) -> str:
    return problem.chip or DEFAULT_CHIP


def _blocks(problem: Problem, direction: str) -> Blocks:
    size, window = max(problem.head_dim, problem.value_dim), problem.mask.window
    return blocks_for(_chip(problem), direction, size, problem.queries, problem.keys, window)


def _diagonal(problem: Problem) -> bool:
    """Whether what a query sees is one run of rows that ends at its own."""
    return problem.rows_aligned and problem.mask.causal


def _kernel(problem: Problem, blocks: Blocks) -> Kernel:
    bounds = [x for x in (problem.logit_bound, problem.softcap) if x is not None]
    return Kernel(
        blocks=blocks,
        softcap=problem.softcap,
        bounded=bool(bounds) and min(bounds) <= LARGEST_BOUND,
        aligned=_diagonal(problem),
        edge=_diagonal(problem) and schedule.window_edge(problem.mask, (blocks.q, blocks.k)) > 0,
        causal=problem.mask.causal,
        limited=problem.mask.limited,
        vmem_bytes=VMEM_BYTES[_chip(problem)],
        interpret=problem.chip is None,
    )


def _forward(q_BTNH, k_BSKH, v_BSKV, reach: Reach, problem: Problem):
    (B, T, N, _), V = q_BTNH.shape, v_BSKV.shape[3]
    blocks = _blocks(problem, "forward")
    reach = _padded(reach, blocks)
    kind_BIJ, bits_BIJ, needed = _blocks_seen(reach, problem, blocks)
    step_BP, bits_BP = schedule.forward_table(kind_BIJ, bits_BIJ, needed, _diagonal(problem))
    out_hTV, lse_h1T = forward(
        _heads_first(_scaled(q_BTNH, problem), blocks.q),
        _heads_first(k_BSKH, blocks.k),
        _heads_first(v_BSKV, blocks.k),
        _ids(reach, problem),
        step_BP,
        bits_BP,
        _kernel(problem, blocks),
    )
    out_BTNV = out_hTV.reshape(B, N, -1, V)[:, :, :T].transpose(0, 2, 1, 3)
    return out_BTNV, lse_h1T.reshape(B, N, -1)[:, :, :T].transpose(0, 2, 1)


def _backward(
    q_BTNH, k_BSKH, v_BSKV, reach: Reach, dout_BTNV, lse_BTN, delta_BTN, problem: Problem
):
    (B, T, N, _), (S, K) = q_BTNH.shape, v_BSKV.shape[1:3]
    G, blocks = N // K, _blocks(problem, "backward")
    reach = _padded(reach, blocks)
    k_hSH, v_hSV = _heads_first(k_BSKH, blocks.k), _heads_first(v_BSKV, blocks.k)
    rows = (
        *(_heads_first(x, blocks.q).reshape(B * K, -1, x.shape[3])
          for x in (_scaled(q_BTNH, problem), dout_BTNV)),
        *(_rows(x_BTN, blocks.q).reshape(B * K, 1, -1) for x_BTN in (lse_BTN * LOG2E, delta_BTN)),
    )  # fmt: skip
    dq_hRH, dk_hSH, dv_hSV = _in_panels(rows, k_hSH, v_hSV, reach, G, problem, blocks)

    def tokens_first(x_hxH, heads, length):
        return x_hxH.reshape(B, heads, -1, x_hxH.shape[2])[:, :, :length].transpose(0, 2, 1, 3)

    gradients = tokens_first(dq_hRH, N, T), tokens_first(dk_hSH, K, S), tokens_first(dv_hSV, K, S)
    return *gradients, None


_attend = with_gradient(_forward, _backward)


def _in_panels(rows, k_hSH, v_hSV, reach: Reach, G: int, problem: Problem, blocks: Blocks):
    """Runs the backward kernel over panels of rows whose dq fits in VMEM, one after another.

    dk and dv are then summed over the panels in float32, two arrays whatever their number.
    """
    kind_BIJ, bits_BIJ, needed = _blocks_seen(reach, problem, blocks)
    kind_BIJ, bits_BIJ = (jnp.tile(x_BIJ, (1, G, 1)) for x_BIJ in (kind_BIJ, bits_BIJ))
    needed = np.tile(needed, (G, 1))
    run = partial(
        backward, kernel=_kernel(problem, blocks), scale=problem.scale,
        q_tiles=needed.shape[0] // G,
    )  # fmt: skip
    ids_B8T, first = _ids(reach, problem), jnp.zeros(1, jnp.int32)
    tiles, H = needed.shape[0], rows[0].shape[2]
    most = max(1, DQ_BYTES[_chip(problem)] // (4 * blocks.q * -(-H // 128) * 128))
    count = next(n for n in range(1, tiles + 1) if tiles % n == 0 and tiles // n <= most)
    if count == 1:
        tables_BP = schedule.backward_table(kind_BIJ, bits_BIJ, needed)
        return run(rows, k_hSH, v_hSV, ids_B8T, tables_BP, first, sum_dtype=k_hSH.dtype)
    size = tiles // count
    needed = needed.reshape(count, size, -1).any(0)

    def panel(carry, first):
        dq_hRH, dk_sum, dv_sum = carry
        kinds, bits = (lax.dynamic_slice_in_dim(x, first, size, 1) for x in (kind_BIJ, bits_BIJ))
        start, length = first * blocks.q, size * blocks.q
        panel_rows = [
            lax.dynamic_slice_in_dim(x, start, length, axis)
            for x, axis in zip(rows, (1, 1, 2, 2), strict=True)
        ]
        tables_BP = schedule.backward_table(kinds, bits, needed)
        dq, dk, dv = run(panel_rows, k_hSH, v_hSV, ids_B8T, tables_BP, first[None], sum_dtype=F32)
        dq_hRH = lax.dynamic_update_slice_in_dim(dq_hRH, dq, start, 1)
        return (dq_hRH, dk_sum + dk, dv_sum + dv), None

    start = jnp.zeros_like(rows[0]), *(jnp.zeros(x.shape, F32) for x in (k_hSH, v_hSV))
    (dq_hRH, dk_sum, dv_sum), _ = lax.scan(
        panel, start, jnp.arange(0, tiles, size, dtype=jnp.int32)
    )
    return dq_hRH, dk_sum.astype(k_hSH.dtype), dv_sum.astype(v_hSV.dtype)


def _padded(reach: Reach, blocks: Blocks) -> Reach:
    """Pads to whole blocks with tokens that see nothing and are seen by none."""
    outside = Reach(0, -FAR, FAR, 0, FAR, -FAR)

    def pad(x_BT, block, value):
        return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % block)), constant_values=value)

    sizes = (*[blocks.q] * 3, *[blocks.k] * 3)
    return Reach(
        *(pad(x, size, value) for x, size, value in zip(reach, sizes, outside, strict=True))
    )


def _blocks_seen(reach: Reach, problem: Problem, blocks: Blocks):
    """Returns kind_BIJ and bits_BIJ of `schedule.block_kinds`, and which blocks have a step."""
    block, sub = (blocks.q, blocks.k), (blocks.sub, blocks.sub)
    kind_BIJ, bits_BIJ = schedule.block_kinds(problem.mask, reach, block, sub, _diagonal(problem))
    T, S = reach.q_last_BT.shape[1], reach.k_before_BS.shape[1]
    return kind_BIJ, bits_BIJ, _listed(problem.mask, T, S, blocks, problem.rows_aligned)


def _listed(mask: Mask, T: int, S: int, blocks: Blocks, rows_aligned: bool) -> np.ndarray:
    return needed_IJ(mask, T, S, blocks.q, blocks.k, rows_aligned)


def _ids(reach: Reach, problem: Problem) -> jax.Array:
    """Returns the int32 (B, 8, tokens) by which PART blocks test pairs.

    With a diagonal, rows 0-1: the first and the last row that a query sees. Else the arrays of
    `Reach`, queries in rows 0-2, keys in rows 3-5, with no segment in common to padding.
    """
    real_BT = reach.q_segments_BT > 0
    if _diagonal(problem):
        row_T = jnp.arange(real_BT.shape[1], dtype=jnp.int32)
        first_BT = row_T - (reach.q_last_BT - jnp.maximum(reach.q_first_BT, 0))
        ids = jnp.where(real_BT, first_BT, FAR), jnp.where(real_BT, row_T, -1)
    else:
        ids = reach._replace(q_segments_BT=jnp.where(real_BT, reach.q_segments_BT, -1))
    length = max(x.shape[1] for x in ids)
    ids = jnp.stack([jnp.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in ids], 1)
    return jnp.pad(ids, ((0, 0), (0, 8 - ids.shape[1]), (0, 0)))


def _scaled(q_BTNH: jax.Array, problem: Problem) -> jax.Array:
    """Takes the scale into q, with the factor into base 2 or into the soft-cap's tanh."""
    factor = LOG2E if problem.softcap is None else 1 / problem.softcap
    return (q_BTNH.astype(F32) * (problem.scale * factor)).astype(q_BTNH.dtype)


def _rows(x_BTN: jax.Array, block: int) -> jax.Array:
    """One number per query and head, padded with zeros to whole blocks: (B, N, rows)."""
    return jnp.pad(x_BTN.transpose(0, 2, 1), ((0, 0), (0, 0), (0, -x_BTN.shape[1] % block)))


def _heads_first(x_BTNH: jax.Array, block: int) -> jax.Array:
    """Batch and heads as one dimension, rows padded with zeros to whole blocks."""
    B, T, N, H = x_BTNH.shape
    x_BNTH = jnp.pad(x_BTNH.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -T % block), (0, 0)))
    return x_BNTH.reshape(B * N, -1, H)
