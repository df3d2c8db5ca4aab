"""Attention in O(length) memory in plain XLA, on every platform, with its own gradient.

One `lax.scan` walks the tiles (query block, key block) that the mask leaves; the forward keeps a
running maximum and sum per row, the backward recomputes each tile's probabilities from the saved
log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691). Products of bfloat16 or float16 inputs
have operands of that dtype, which is what matrix units are fast at, and float32 sums; everything
else, and every product of float32 inputs, is float32.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N // K, H head dim of
queries and keys, V head dim of values.
The G heads that share a kv head are extra rows of the same product, so keys are never repeated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models.attention.mask import EMPTY_LSE, Mask, Reach, finite, tiles, visible_BTS
from models.attention.problem import Extras, Problem, alibi_BNTS, with_gradient
from models.attention.reference import soft_cap

F32 = jnp.float32

# Largest tile edge. On XLA:CPU (2 cores, float32, batch 4, 8 heads of 64, forward and backward) 128
# took 0.12 s of processor time at 512 tokens and 1.33 s at 2,048; 256 took 0.15 s and 1.50 s.
BLOCK = 128


class _Tokens(NamedTuple):
    """The arrays beside q, k and v: who is visible, and what is added to the scores."""

    reach: Reach
    extras: Extras

    def seen_BTS(self, mask: Mask, q0: jax.Array, k0: jax.Array, bq: int, bk: int) -> jax.Array:
        """Evaluates the mask on the tile of `bq` queries from `q0` and `bk` keys from `k0`."""
        tile = Reach(
            *(_cut(x, q0, bq, 1) for x in self.reach[:3]),
            *(_cut(x, k0, bk, 1) for x in self.reach[3:]),
        )
        return visible_BTS(mask, tile)

    def added_BKGTS(
        self, K: int, q0: jax.Array, k0: jax.Array, bq: int, bk: int
    ) -> jax.Array | int:
        """Returns what bias and ALiBi add to the scores of the same tile, 0 without either."""
        bias, slopes, q_positions, k_positions = self.extras
        added = 0
        if bias is not None:
            added += _by_kv_head(_cut(_cut(bias, q0, bq, 2), k0, bk, 3).astype(F32), K)
        if slopes is not None:
            q_positions, k_positions = _cut(q_positions, q0, bq, 1), _cut(k_positions, k0, bk, 1)
            added += _by_kv_head(alibi_BNTS(slopes, q_positions, k_positions), K)
        return added


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    reach: Reach,
    extras: Extras,
    problem: Problem,
    given: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BTNV in q's dtype, lse_BTN float32): the contract is `dispatch.attention`'s.

    Lengths that are not a multiple of the block are padded here with segment 0 and cut again.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    q_pad, k_pad = -T % _block(T), -S % _block(S)
    bias, slopes, q_positions, k_positions = extras
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, q_pad), (0, k_pad)))
    if slopes is not None:
        q_positions, k_positions = _pad(q_positions, q_pad), _pad(k_positions, k_pad)
    tokens = _Tokens(
        Reach(*(_pad(x, q_pad) for x in reach[:3]), *(_pad(x, k_pad) for x in reach[3:])),
        Extras(bias, slopes, q_positions, k_positions),
    )
    out_BTNV, lse_BTN = _attend(
        _pad(q_BTNH, q_pad), _pad(k_BSKH, k_pad), _pad(v_BSKV, k_pad), tokens,
        jax.tree.map(lambda x: _pad(x, q_pad), given), problem,
    )  # fmt: skip
    return out_BTNV[:, :T], lse_BTN[:, :T]


def _forward(q_BTNH, k_BSKH, v_BSKV, tokens: _Tokens, problem: Problem):
    (B, T, N), (S, K) = q_BTNH.shape[:3], k_BSKH.shape[1:3]
    tokens = _tied(tokens, q_BTNH)
    q_BKGTH, scale = _scaled(_grouped(q_BTNH, K), problem)
    k_BKSH, v_BKSV = _heads_first(k_BSKH), _heads_first(v_BSKV)
    # What is not finite in a value moves into its key's score, which the mask can remove.
    k_BKSH, v_BKSV = k_BKSH + (0.0 * v_BKSV).sum(-1, keepdims=True), finite(v_BKSV)
    bq, bk = _block(T), _block(S)

    def visit(carry, tile):
        acc_BKGTV, max_BKGT, sum_BKGT = carry
        q0, k0 = tile[0], tile[1]
        s_BKGTS = _dot("BKGTH,BKSH->BKGTS", _cut(q_BKGTH, q0, bq, 3), _cut(k_BKSH, k0, bk, 2))
        s_BKGTS = soft_cap(scale * s_BKGTS, problem.softcap) + tokens.added_BKGTS(K, q0, k0, bq, bk)
        seen_BTS = tokens.seen_BTS(problem.mask, q0, k0, bq, bk)
        s_BKGTS = jnp.where(seen_BTS[:, None, None], s_BKGTS, -jnp.inf)
        old_max_BKGT = _cut(max_BKGT, q0, bq, 3)
        new_max_BKGT = jnp.maximum(old_max_BKGT, s_BKGTS.max(-1))
        p_BKGTS = jnp.exp(s_BKGTS - new_max_BKGT[..., None])
        decay_BKGT = jnp.exp(old_max_BKGT - new_max_BKGT)
        pv_BKGTV = _dot("BKGTS,BKSV->BKGTV", p_BKGTS, _cut(v_BKSV, k0, bk, 2))
        new_acc_BKGTV = _cut(acc_BKGTV, q0, bq, 3) * decay_BKGT[..., None] + pv_BKGTV
        new_sum_BKGT = _cut(sum_BKGT, q0, bq, 3) * decay_BKGT + p_BKGTS.sum(-1)
        return (
            _put(acc_BKGTV, new_acc_BKGTV, q0, 3),
            _put(max_BKGT, new_max_BKGT, q0, 3),
            _put(sum_BKGT, new_sum_BKGT, q0, 3),
        ), None

    rows = q_BKGTH.shape[:-1]
    start = (
        jnp.zeros((*rows, v_BSKV.shape[3]), F32),
        jnp.full(rows, EMPTY_LSE, F32),
        jnp.zeros(rows, F32),
    )
    (acc_BKGTV, max_BKGT, sum_BKGT), _ = lax.scan(visit, start, _tiles(problem, T, S))
    empty_BKGT = sum_BKGT == 0
    sum_BKGT = jnp.where(empty_BKGT, 1.0, sum_BKGT)
    lse_BKGT = jnp.where(empty_BKGT, EMPTY_LSE, max_BKGT + jnp.log(sum_BKGT))
    out_BTNV = _ungrouped(acc_BKGTV / sum_BKGT[..., None]).astype(q_BTNH.dtype)
    return out_BTNV, lse_BKGT.transpose(0, 3, 1, 2).reshape(B, T, N)


def _backward(
    q_BTNH, k_BSKH, v_BSKV, tokens: _Tokens, dout_BTNV, lse_BTN, delta_BTN, problem: Problem
):
    T, (S, K) = q_BTNH.shape[1], k_BSKH.shape[1:3]
    tokens = _tied(tokens, q_BTNH)
    q_BTNH, k_BSKH, v_BSKV, dout_BTNV = map(finite, (q_BTNH, k_BSKH, v_BSKV, dout_BTNV))
    delta_BKGT = _grouped(delta_BTN[..., None], K)[..., 0]
    lse_BKGT = _grouped(lse_BTN[..., None], K)[..., 0]
    q_BKGTH, scale = _scaled(_grouped(q_BTNH, K), problem)
    dout_BKGTV = _grouped(dout_BTNV, K)
    k_BKSH, v_BKSV = _heads_first(k_BSKH), _heads_first(v_BSKV)
    k_BKHS = k_BKSH.swapaxes(2, 3)
    bq, bk, bias = _block(T), _block(S), tokens.extras.bias_BNTS

    # Scores are held transposed (keys first): all five products then read their operands in
    # memory order. XLA:CPU takes 2 to 4 times as long for a product over the rows of its left side.
    def visit(carry, tile):
        dq_BKHGT, dk_BKSH, dv_BKSV, dbias = carry
        q0, k0 = tile[0], tile[1]
        qi_BKGTH, douti_BKGTV = _cut(q_BKGTH, q0, bq, 3), _cut(dout_BKGTV, q0, bq, 3)
        s_BKSGT = _dot("BKSH,BKGTH->BKSGT", _cut(k_BKSH, k0, bk, 2), qi_BKGTH)
        s_BKSGT = soft_cap(scale * s_BKSGT, problem.softcap)
        seen_BST = tokens.seen_BTS(problem.mask, q0, k0, bq, bk).swapaxes(1, 2)
        added = tokens.added_BKGTS(K, q0, k0, bq, bk)
        added = added if isinstance(added, int) else jnp.moveaxis(added, 4, 2)
        p_BKSGT = jnp.exp(s_BKSGT + added - _cut(lse_BKGT, q0, bq, 3)[:, :, None])
        p_BKSGT = jnp.where(seen_BST[:, None, :, None], p_BKSGT, 0.0)
        dp_BKSGT = _dot("BKSV,BKGTV->BKSGT", _cut(v_BKSV, k0, bk, 2), douti_BKGTV)
        ds_BKSGT = p_BKSGT * (dp_BKSGT - _cut(delta_BKGT, q0, bq, 3)[:, :, None])
        if dbias is not None:
            tile = _bias_gradient(ds_BKSGT, dbias.shape)
            old = _cut(_cut(dbias, q0, bq, 2), k0, bk, 3)
            dbias = lax.dynamic_update_slice(dbias, old + tile, (0, 0, q0, k0))
        if problem.softcap is not None:
            ds_BKSGT *= 1 - (s_BKSGT / problem.softcap) ** 2
        dqi_BKHGT = _dot("BKHS,BKSGT->BKHGT", _cut(k_BKHS, k0, bk, 3), ds_BKSGT)
        dkj_BKSH = _dot("BKSGT,BKGTH->BKSH", ds_BKSGT, qi_BKGTH)
        dvj_BKSV = _dot("BKSGT,BKGTV->BKSV", p_BKSGT, douti_BKGTV)
        return (
            _put(dq_BKHGT, _cut(dq_BKHGT, q0, bq, 4) + dqi_BKHGT, q0, 4),
            _put(dk_BKSH, _cut(dk_BKSH, k0, bk, 2) + dkj_BKSH, k0, 2),
            _put(dv_BKSV, _cut(dv_BKSV, k0, bk, 2) + dvj_BKSV, k0, 2),
            dbias,
        ), None

    start = (
        jnp.zeros_like(q_BKGTH.transpose(0, 1, 4, 2, 3), F32),
        jnp.zeros_like(k_BKSH, F32),
        jnp.zeros_like(v_BKSV, F32),
        None if bias is None else jnp.zeros(bias.shape, F32),
    )
    (dq_BKHGT, dk_BKSH, dv_BKSV, dbias), _ = lax.scan(visit, start, _tiles(problem, T, S))
    dq_BTNH = _ungrouped(dq_BKHGT.transpose(0, 1, 3, 4, 2)) * problem.scale
    return (
        dq_BTNH.astype(q_BTNH.dtype),
        (scale * dk_BKSH).transpose(0, 2, 1, 3).astype(k_BSKH.dtype),
        dv_BKSV.transpose(0, 2, 1, 3).astype(v_BSKV.dtype),
        _Tokens(None, Extras(None if bias is None else dbias.astype(bias.dtype))),
    )


_attend = with_gradient(_forward, _backward)


def _dot(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the float32 product; the narrower dtype is that of the inputs, as probabilities and
    their gradients are rounded to it (FlashAttention does so too)."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(letters, a.astype(dtype), b.astype(dtype), preferred_element_type=F32)


def _scaled(q_BKGTH: jax.Array, problem: Problem) -> tuple[jax.Array, float]:
    """Returns the queries and what their scores are still to be multiplied by.

    A scale that is no power of two would round 16-bit queries once more.
    """
    return (q_BKGTH * problem.scale, 1.0) if q_BKGTH.dtype == F32 else (q_BKGTH, problem.scale)


def _tied(tokens: _Tokens, q_BTNH: jax.Array) -> _Tokens:
    """Makes the masks depend on the layer.

    Else JAX, differentiating a scan over layers, sees that they do not, evaluates those of all
    tiles before the scan and keeps them: a byte per head, query and key.
    """
    return lax.optimization_barrier((tokens, q_BTNH[:1, :1, :1, :1]))[0]


def _block(length: int) -> int:
    """The tile edge for `length`: equal parts of at most BLOCK, so that little is padded."""
    parts = -(-length // BLOCK)
    even = -(-length // parts)
    return even if parts == 1 else -(-even // 8) * 8


def _tiles(problem: Problem, T: int, S: int) -> jax.Array:
    return jnp.asarray(tiles(problem.mask, T, S, _block(T), _block(S), problem.rows_aligned))


def _pad(array: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(array, [(0, 0), (0, rows)] + [(0, 0)] * (array.ndim - 2)) if rows else array


def _cut(array: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, size, axis)


def _put(array: jax.Array, update: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, update, start, axis)


def _grouped(x_BTNH: jax.Array, K: int) -> jax.Array:
    """Query heads split by the kv head they read, heads before rows: x_BKGTH."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _by_kv_head(x_BNTS: jax.Array, K: int) -> jax.Array:
    """Splits the heads by the kv head they read; one head stands for all."""
    B, N, T, S = x_BNTS.shape
    return x_BNTS[:, None] if N == 1 else x_BNTS.reshape(B, K, N // K, T, S)


def _bias_gradient(ds_BKSGT: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums the gradient of a tile of scores over the batch and heads that share a bias."""
    B, K, bk, G, bq = ds_BKSGT.shape
    ds_BNTS = ds_BKSGT.transpose(0, 1, 3, 4, 2).reshape(B, K * G, bq, bk)
    shared = [axis for axis in (0, 1) if shape[axis] == 1]
    return ds_BNTS.sum(shared, keepdims=True)


def _heads_first(x_BSKH: jax.Array) -> jax.Array:
    return x_BSKH.transpose(0, 2, 1, 3)
