"""Attention on NVIDIA GPUs by Triton kernels: the function behind the backend `triton`.

Pads to whole tiles and powers of two, lays the tokens' arrays out, finds which tiles are visible
and runs the kernels of `gpu_kernels.py`. Away from a GPU the kernels are interpreted: for tests.

Shapes: B batch, T queries, S keys, N query heads, H head dim of queries and keys, V head dim of
values, I query tiles, J key tiles.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models.attention import gpu_kernels, schedule
from models.attention.gpu_kernels import F32, LOG2E, Kernel
from models.attention.mask import Reach
from models.attention.problem import Extras, Problem

LARGEST_HEAD = 256
# Queries and keys of a tile where a row of a head has at most 256 bytes; wider rows, smaller tiles,
# so that what a program holds stays within 96 KiB. Never timed: no GPU was at hand.
FORWARD, BACKWARD = (128, 64), (64, 64)
_SMALLEST = 16  # edge of a matrix product


class _Tokens(NamedTuple):
    """The arrays beside q, k and v: who is visible, and what is added to the scores."""

    reach: Reach
    extras: Extras


def triton_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    reach: Reach,
    extras: Extras,
    problem: Problem,
    given: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BTNV in q's dtype, lse_BTN float32): the contract is `dispatch.attention`'s."""
    return _attend(q_BTNH, k_BSKH, v_BSKV, _Tokens(reach, extras), given, problem)


def refusal(problem: Problem) -> str | None:
    """Returns why the kernels cannot do a problem, or None."""
    size = max(problem.head_dim, problem.value_dim)
    if problem.bias:
        return "it adds no bias to the scores"
    if size > LARGEST_HEAD:
        return f"head size {size} is above {LARGEST_HEAD}"
    if problem.dtype not in (jnp.bfloat16, jnp.float16, F32):
        return f"it takes bfloat16, float16 and float32, not {problem.dtype}"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BSKH, v_BSKV, tokens: _Tokens, given, problem: Problem):
    return given or _forward(q_BTNH, k_BSKH, v_BSKV, tokens, problem)


def _attend_fwd(q_BTNH, k_BSKH, v_BSKV, tokens: _Tokens, given, problem: Problem):
    out_BTNV, lse_BTN = given or _forward(q_BTNH, k_BSKH, v_BSKV, tokens, problem)
    # Named on the value that is both result and residual, see blockwise.py.
    out_BTNV = checkpoint_name(out_BTNV, "attention_out")
    lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
    return (out_BTNV, lse_BTN), (q_BTNH, k_BSKH, v_BSKV, tokens, out_BTNV, lse_BTN)


def _forward(q_BTNH, k_BSKH, v_BSKV, tokens: _Tokens, problem: Problem):
    T, V = q_BTNH.shape[1], v_BSKV.shape[3]
    kernel = _kernel(problem, FORWARD)
    kind_BIJ, *rest = _laid_out(tokens, kernel, problem)
    out_BTNV, lse_BNT = gpu_kernels.forward(
        _padded(q_BTNH, kernel.rows), _padded(k_BSKH, kernel.columns),
        _padded(v_BSKV, kernel.columns), *rest[:2], _spans(kind_BIJ), rest[2], kernel,
    )  # fmt: skip
    return out_BTNV[:, :T, :, :V], lse_BNT[:, :, :T].transpose(0, 2, 1)


def _attend_bwd(problem: Problem, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKV, tokens, out_BTNV, lse_BTN = residuals
    dout_BTNV, dlse_BTN = cotangents
    # d lse / d s = p, so the gradient through lse only shifts the row constant of FlashAttention.
    delta_BTN = (dout_BTNV.astype(F32) * out_BTNV.astype(F32)).sum(-1) - dlse_BTN
    kernel = _kernel(problem, BACKWARD)
    kind_BIJ, q_ids, k_ids, slopes_N = _laid_out(tokens, kernel, problem)
    arrays = (
        _padded(q_BTNH, kernel.rows), _padded(k_BSKH, kernel.columns),
        _padded(v_BSKV, kernel.columns), _padded(dout_BTNV, kernel.rows),
        *(_tokens_last(x_BTN, kernel.rows) for x_BTN in (lse_BTN * LOG2E, delta_BTN)),
        q_ids, k_ids,
    )  # fmt: skip
    dq_BTNH = gpu_kernels.backward_queries(*arrays, _spans(kind_BIJ), slopes_N, kernel)
    dk_BSKH, dv_BSKV = gpu_kernels.backward_keys(
        *arrays, _spans(kind_BIJ.swapaxes(1, 2)), slopes_N, kernel
    )
    results = zip((dq_BTNH, dk_BSKH, dv_BSKV), (q_BTNH, k_BSKH, v_BSKV), strict=True)
    return *(dx[:, : x.shape[1], :, : x.shape[3]] for dx, x in results), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _kernel(problem: Problem, tile: tuple[int, int]) -> Kernel:
    size = _power_of_two(max(problem.head_dim, problem.value_dim))
    parts = max(1, size * jnp.dtype(problem.dtype).itemsize // 256)
    rows, columns = (
        min(edge // parts, _power_of_two(length))
        for edge, length in zip(tile, (problem.queries, problem.keys), strict=True)
    )
    return Kernel(
        rows=rows,
        columns=columns,
        scale=problem.scale,
        softcap=problem.softcap,
        causal=problem.mask.causal,
        limited=problem.mask.limited,
        alibi=problem.alibi,
        interpret=problem.platform != "cuda",
    )


def _laid_out(tokens: _Tokens, kernel: Kernel, problem: Problem):
    """Returns kind_BIJ of `schedule.tile_kinds`, q_ids_B4T, k_ids_B4S and the slopes or None."""
    rows, columns = kernel.rows, kernel.columns
    reach = Reach(
        *(_pad(x_BT, rows) for x_BT in tokens.reach[:3]),
        *(_pad(x_BS, columns) for x_BS in tokens.reach[3:]),
    )
    mask, extras = problem.mask, tokens.extras
    kind_BIJ = schedule.tile_kinds(reach, rows, columns, causal=mask.causal, limited=mask.limited)
    q_positions_BT, k_positions_BS = reach.q_last_BT, reach.k_before_BS  # not read without slopes
    if extras.slopes_N is not None:
        q_positions_BT = _pad(extras.q_positions_BT, rows)
        k_positions_BS = _pad(extras.k_positions_BS, columns)
    segments_BT = jnp.where(reach.q_segments_BT > 0, reach.q_segments_BT, -1)
    q_ids_B4T = jnp.stack([segments_BT, *reach[1:3], q_positions_BT], 1)
    return kind_BIJ, q_ids_B4T, jnp.stack([*reach[3:], k_positions_BS], 1), extras.slopes_N


def _spans(kind_BIJ: jax.Array) -> jax.Array:
    """Returns spans_BI4: first visible tile, start and end of the first full run, end of visible.

    Tiles between the ends that are not visible are computed, and hidden.
    """
    J = kind_BIJ.shape[2]
    j = jnp.arange(J, dtype=jnp.int32)

    def first_BI(where):
        return jnp.where(where, j, J).min(2)

    seen = kind_BIJ != schedule.NOTHING
    last_BI = jnp.where(seen, j + 1, 0).max(2)
    full_BI = first_BI(kind_BIJ == schedule.FULL)
    rest_BI = first_BI((kind_BIJ != schedule.FULL) & (j > full_BI[:, :, None]))
    full_BI, rest_BI = jnp.minimum(full_BI, last_BI), jnp.minimum(rest_BI, last_BI)
    return jnp.stack([first_BI(seen), full_BI, rest_BI, last_BI], 2)


def _power_of_two(size: int) -> int:
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def _pad(x_BT: jax.Array, block: int) -> jax.Array:
    """Pads tokens with zeros to whole blocks; as segments they are padding."""
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % block)))


def _padded(x_BTNH: jax.Array, block: int) -> jax.Array:
    """Pads with zeros to whole blocks of tokens and a head size that is a power of two."""
    _, T, _, H = x_BTNH.shape
    return jnp.pad(x_BTNH, ((0, 0), (0, -T % block), (0, 0), (0, _power_of_two(H) - H)))


def _tokens_last(x_BTN: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x_BTN.transpose(0, 2, 1), ((0, 0), (0, 0), (0, -x_BTN.shape[1] % block)))
