"""Attention on NVIDIA GPUs by Triton kernels: the function behind the backend `triton`.

Pads to whole tiles and powers of two, lays the tokens' arrays out, finds which tiles are visible
and runs the kernels of `gpu_kernels.py`. Away from a GPU the kernels are interpreted: for tests.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N // K, H head dim of queries and
keys, V head dim of values, I query tiles, J key tiles.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from models.attention import gpu_kernels, schedule
from models.attention.gpu_kernels import F32, LOG2E, Kernel
from models.attention.mask import Reach
from models.attention.problem import Extras, Problem, with_gradient

LARGEST_HEAD = 256
# Queries and keys of a tile where a row of a head has at most 256 bytes; wider rows, smaller tiles,
# so that what a program holds stays within 96 KiB. Never timed: no GPU was at hand.
FORWARD, BACKWARD = (128, 64), (64, 64)
SMALLEST = 16  # edge of a matrix product


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
    return _attend(q_BTNH, k_BSKH, v_BSKV, (reach, extras), given, problem)


def refusal(problem: Problem) -> str | None:
    """Returns why the kernels cannot do a problem, or None."""
    if problem.bias:
        return "it adds no bias to the scores"
    if (size := max(problem.head_dim, problem.value_dim)) > LARGEST_HEAD:
        return f"head size {size} is above {LARGEST_HEAD}"
    if problem.dtype not in (jnp.bfloat16, jnp.float16, F32):
        return f"it takes bfloat16, float16 and float32, not {problem.dtype}"
    return None


def _forward(q_BTNH, k_BSKH, v_BSKV, tokens, problem: Problem):
    (B, T, N, _), V = q_BTNH.shape, v_BSKV.shape[3]
    kernel = _kernel(problem, FORWARD)
    q, k, v = _padded(q_BTNH, kernel), _padded(k_BSKH, kernel, "k"), _padded(v_BSKV, kernel, "k")
    ids, spans_BI4, _ = _laid_out(*tokens, kernel, problem)
    out_BTNV, lse_BNT = _launch(
        gpu_kernels.forward, "q", kernel, problem,
        ((q, "q"), (k, "k"), (v, "k"), *ids, (spans_BI4, "spans")),
        (
            (jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype), "q"),
            (jax.ShapeDtypeStruct((B, N, q.shape[1]), F32), "q row"),
        ),
    )  # fmt: skip
    return out_BTNV[:, :T, :, :V], lse_BNT[:, :, :T].transpose(0, 2, 1)


def _backward(q_BTNH, k_BSKH, v_BSKV, tokens, dout_BTNV, lse_BTN, delta_BTN, problem: Problem):
    kernel = _kernel(problem, BACKWARD)
    q, k, v = _padded(q_BTNH, kernel), _padded(k_BSKH, kernel, "k"), _padded(v_BSKV, kernel, "k")
    rows = (_pad(x_BTN, kernel.rows).transpose(0, 2, 1) for x_BTN in (lse_BTN * LOG2E, delta_BTN))
    ids, spans_BI4, spans_BJ4 = _laid_out(*tokens, kernel, problem)
    operands = (
        (q, "q"), (k, "k"), (v, "k"), (_padded(dout_BTNV, kernel), "q"),
        *((row, "q row") for row in rows), *ids,
    )  # fmt: skip
    dq = _launch(
        gpu_kernels.backward_queries, "q", kernel, problem, (*operands, (spans_BI4, "spans")),
        ((jax.ShapeDtypeStruct(q.shape, q.dtype), "q"),),
    )  # fmt: skip
    dkv = _launch(
        gpu_kernels.backward_keys, "k", kernel, problem, (*operands, (spans_BJ4, "spans")),
        [(jax.ShapeDtypeStruct(x.shape, x.dtype), "k") for x in (k, v)],
    )  # fmt: skip
    pairs = zip((*dq, *dkv), (q_BTNH, k_BSKH, v_BSKV), strict=True)
    return *(dx[:, : x.shape[1], :, : x.shape[3]] for dx, x in pairs), None


_attend = with_gradient(_forward, _backward)


def _launch(body, over: str, kernel: Kernel, problem: Problem, operands, results):
    """Runs `body` for every tile of queries ("q") or keys ("k"), every head and batch row.

    operands, results: (array, what it holds). Of the side that it goes over, a program gets its
    tile, of the other side all; going over keys, of all the query heads that read them.
    """
    (B, T, _, _), S = operands[0][0].shape, operands[1][0].shape[1]
    G = problem.heads // problem.kv_heads
    tiles = T // kernel.rows if over == "q" else S // kernel.columns
    group, share = (None, G) if over == "q" else (G, 1)

    def tile(i):  # those that have the most to do under a causal mask come first
        return tiles - 1 - i if over == "q" else i

    def spec(array, what: str) -> pl.BlockSpec | None:
        if array is None:
            return None
        if what == "spans":
            return pl.BlockSpec((None, None, 4), lambda i, n, b: (b, tile(i), 0))
        if what == "slopes":
            return pl.BlockSpec((group or 1,), lambda i, n, b: (n,))
        whole, edge = (T, kernel.rows) if what[0] == "q" else (S, kernel.columns)
        size, place = (edge, tile) if what[0] == over else (whole, lambda i: 0)
        if what == "q row":
            return pl.BlockSpec((None, group, size), lambda i, n, b: (b, n, place(i)))
        if what in ("q ids", "k ids"):
            return pl.BlockSpec((None, 4, size), lambda i, n, b: (b, 0, place(i)))
        if what == "q":
            shape = (None, size, group, array.shape[3])
            return pl.BlockSpec(shape, lambda i, n, b: (b, place(i), n, 0))
        shape = (None, size, None, array.shape[3])
        return pl.BlockSpec(shape, lambda i, n, b: (b, place(i), n // share, 0))

    wide = max(array.shape[3] for array, _ in operands[:3]) > 64
    return pl.pallas_call(
        partial(body, kernel=kernel),
        grid=(tiles, problem.heads // (group or 1), B),
        in_specs=[spec(*operand) for operand in operands],
        out_specs=[spec(*result) for result in results],
        out_shape=[shape for shape, _ in results],
        compiler_params=triton.CompilerParams(num_warps=8 if wide else 4, num_stages=2),
        interpret=problem.platform != "cuda",
        name=f"torus_attention_{body.__name__}",
    )(*(array for array, _ in operands))


def _kernel(problem: Problem, tile: tuple[int, int]) -> Kernel:
    size = _power_of_two(max(problem.head_dim, problem.value_dim))
    parts = max(1, size * jnp.dtype(problem.dtype).itemsize // 256)
    lengths = (problem.queries, problem.keys)
    edges = (min(e // parts, _power_of_two(n)) for e, n in zip(tile, lengths, strict=True))
    mask = problem.mask
    return Kernel(*edges, problem.scale, problem.softcap, mask.causal, mask.limited, problem.alibi)


def _laid_out(reach: Reach, extras: Extras, kernel: Kernel, problem: Problem):
    """Returns the operands that say what is visible, and the spans by query and by key tile."""
    rows, columns, mask = kernel.rows, kernel.columns, problem.mask
    reach = Reach(*(_pad(x, rows) for x in reach[:3]), *(_pad(x, columns) for x in reach[3:]))
    kind_BIJ = schedule.tile_kinds(reach, rows, columns, causal=mask.causal, limited=mask.limited)
    q_positions_BT, k_positions_BS = reach.q_last_BT, reach.k_before_BS  # not read without slopes
    if extras.slopes_N is not None:
        q_positions_BT = _pad(extras.q_positions_BT, rows)
        k_positions_BS = _pad(extras.k_positions_BS, columns)
    segments_BT = jnp.where(reach.q_segments_BT > 0, reach.q_segments_BT, -1)
    ids = (
        (jnp.stack([segments_BT, *reach[1:3], q_positions_BT], 1), "q ids"),
        (jnp.stack([*reach[3:], k_positions_BS], 1), "k ids"),
        (extras.slopes_N, "slopes"),
    )
    return ids, gpu_kernels.spans(kind_BIJ), gpu_kernels.spans(kind_BIJ.swapaxes(1, 2))


def _power_of_two(size: int) -> int:
    return max(SMALLEST, 1 << (size - 1).bit_length())


def _pad(x_BT: jax.Array, block: int) -> jax.Array:
    """Pads tokens with zeros to whole blocks; as segments they are padding."""
    return jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % block)] + [(0, 0)] * (x_BT.ndim - 2))


def _padded(x_BTNH: jax.Array, kernel: Kernel, side: str = "q") -> jax.Array:
    """Pads with zeros to whole tiles of tokens and a head size that is a power of two."""
    H = x_BTNH.shape[3]
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, 0), (0, 0), (0, _power_of_two(H) - H)))
    return _pad(x_BTNH, kernel.rows if side == "q" else kernel.columns)
