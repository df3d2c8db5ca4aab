"""Attention in O(length) memory in plain XLA, on every platform, with its own gradient.

One `lax.scan` walks the tiles (query block, key block) that the mask leaves; the forward keeps a
running maximum and sum per row, the backward recomputes each tile's probabilities from the saved
log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691). Arithmetic is float32 throughout.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N // K, H head dim.
The G heads that share a kv head are extra rows of the same product, so keys are never repeated.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from models.attention.mask import EMPTY_LSE, Mask, tiles, visible_BTS
from models.attention.reference import soft_cap

F32 = jnp.float32

# Largest tile edge. On XLA:CPU (2 cores, float32, batch 4, 8 heads of 64, forward and backward) 128
# took 0.12 s of processor time at 512 tokens and 1.33 s at 2,048; 256 took 0.15 s and 1.50 s.
BLOCK = 128


@dataclass(frozen=True)
class _Plan:
    """What is static about one call; hashable because custom_vjp compares it."""

    mask: Mask
    scale: float
    softcap: float | None
    rows_aligned: bool


class _Tokens(NamedTuple):
    """Positions and segment ids of queries (T) and keys (S)."""

    q_positions_BT: jax.Array
    k_positions_BS: jax.Array
    q_segments_BT: jax.Array
    k_segments_BS: jax.Array

    def visible_BTS(self, mask: Mask, q0: jax.Array, k0: jax.Array, bq: int, bk: int) -> jax.Array:
        """Evaluates the mask on the tile of `bq` queries from `q0` and `bk` keys from `k0`."""
        return visible_BTS(
            mask,
            _cut(self.q_positions_BT, q0, bq, 1),
            _cut(self.k_positions_BS, k0, bk, 1),
            _cut(self.q_segments_BT, q0, bq, 1),
            _cut(self.k_segments_BS, k0, bk, 1),
        )


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None,
    rows_aligned: bool,
    given: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BTNH in q's dtype, lse_BTN float32): the contract is `dispatch.attention`'s.

    Lengths that are not a multiple of the block are padded here with segment 0 and cut again.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    q_pad, k_pad = -T % _block(T), -S % _block(S)
    tokens = _Tokens(
        _pad(q_positions_BT, q_pad),
        _pad(k_positions_BS, k_pad),
        _pad(q_segments_BT, q_pad),
        _pad(k_segments_BS, k_pad),
    )
    out_BTNH, lse_BTN = _attend(
        _pad(q_BTNH, q_pad),
        _pad(k_BSKH, k_pad),
        _pad(v_BSKH, k_pad),
        tokens,
        jax.tree.map(lambda x: _pad(x, q_pad), given),
        _Plan(mask, scale, softcap, rows_aligned),
    )
    return out_BTNH[:, :T], lse_BTN[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BSKH, v_BSKH, tokens: _Tokens, given, plan: _Plan):
    return given or _forward(q_BTNH, k_BSKH, v_BSKH, tokens, plan)


def _attend_fwd(q_BTNH, k_BSKH, v_BSKH, tokens: _Tokens, given, plan: _Plan):
    out_BTNH, lse_BTN = given or _forward(q_BTNH, k_BSKH, v_BSKH, tokens, plan)
    # Named here, on the value that is both result and residual: a policy that saves the two names
    # then leaves the backward nothing to rerun the forward for.
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
    return (out_BTNH, lse_BTN), (q_BTNH, k_BSKH, v_BSKH, tokens, out_BTNH, lse_BTN)


def _forward(q_BTNH, k_BSKH, v_BSKH, tokens: _Tokens, plan: _Plan):
    (B, T, N), (S, K) = q_BTNH.shape[:3], k_BSKH.shape[1:3]
    tokens = _tied(tokens, q_BTNH)
    q_BKGTH = _grouped(q_BTNH, K) * plan.scale
    k_BKSH, v_BKSH = _heads_first(k_BSKH), _heads_first(v_BSKH)
    bq, bk = _block(T), _block(S)

    def visit(carry, tile):
        acc_BKGTH, max_BKGT, sum_BKGT = carry
        q0, k0 = tile[0], tile[1]
        s_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", _cut(q_BKGTH, q0, bq, 3), _cut(k_BKSH, k0, bk, 2))
        seen_BTS = tokens.visible_BTS(plan.mask, q0, k0, bq, bk)
        s_BKGTS = jnp.where(seen_BTS[:, None, None], soft_cap(s_BKGTS, plan.softcap), -jnp.inf)
        old_max_BKGT = _cut(max_BKGT, q0, bq, 3)
        new_max_BKGT = jnp.maximum(old_max_BKGT, s_BKGTS.max(-1))
        p_BKGTS = jnp.exp(s_BKGTS - new_max_BKGT[..., None])
        decay_BKGT = jnp.exp(old_max_BKGT - new_max_BKGT)
        pv_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", p_BKGTS, _cut(v_BKSH, k0, bk, 2))
        new_acc_BKGTH = _cut(acc_BKGTH, q0, bq, 3) * decay_BKGT[..., None] + pv_BKGTH
        new_sum_BKGT = _cut(sum_BKGT, q0, bq, 3) * decay_BKGT + p_BKGTS.sum(-1)
        return (
            _put(acc_BKGTH, new_acc_BKGTH, q0, 3),
            _put(max_BKGT, new_max_BKGT, q0, 3),
            _put(sum_BKGT, new_sum_BKGT, q0, 3),
        ), None

    row_BKGT = q_BKGTH[..., 0]
    start = (
        jnp.zeros_like(q_BKGTH),
        jnp.full_like(row_BKGT, EMPTY_LSE),
        jnp.zeros_like(row_BKGT),
    )
    (acc_BKGTH, max_BKGT, sum_BKGT), _ = lax.scan(visit, start, _tiles(plan, T, S))
    empty_BKGT = sum_BKGT == 0
    sum_BKGT = jnp.where(empty_BKGT, 1.0, sum_BKGT)
    lse_BKGT = jnp.where(empty_BKGT, EMPTY_LSE, max_BKGT + jnp.log(sum_BKGT))
    out_BTNH = _ungrouped(acc_BKGTH / sum_BKGT[..., None]).astype(q_BTNH.dtype)
    return out_BTNH, lse_BKGT.transpose(0, 3, 1, 2).reshape(B, T, N)


def _attend_bwd(plan: _Plan, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKH, tokens, out_BTNH, lse_BTN = residuals
    dout_BTNH, dlse_BTN = cotangents
    T, (S, K) = q_BTNH.shape[1], k_BSKH.shape[1:3]
    tokens = _tied(tokens, q_BTNH)
    # d lse / d s = p, so the gradient through lse only shifts the row constant of FlashAttention.
    delta_BTN = (dout_BTNH.astype(F32) * out_BTNH.astype(F32)).sum(-1) - dlse_BTN
    delta_BKGT = _grouped(delta_BTN[..., None], K)[..., 0]
    lse_BKGT = _grouped(lse_BTN[..., None], K)[..., 0]
    q_BKGTH, dout_BKGTH = _grouped(q_BTNH, K) * plan.scale, _grouped(dout_BTNH, K)
    k_BKSH, v_BKSH = _heads_first(k_BSKH), _heads_first(v_BSKH)
    k_BKHS = k_BKSH.swapaxes(2, 3)
    bq, bk = _block(T), _block(S)

    # Scores are held transposed (keys first): all five products then read their operands in
    # memory order. XLA:CPU takes 2 to 4 times as long for a product over the rows of its left side.
    def visit(carry, tile):
        dq_BKHGT, dk_BKSH, dv_BKSH = carry
        q0, k0 = tile[0], tile[1]
        qi_BKGTH, douti_BKGTH = _cut(q_BKGTH, q0, bq, 3), _cut(dout_BKGTH, q0, bq, 3)
        s_BKSGT = jnp.einsum("BKSH,BKGTH->BKSGT", _cut(k_BKSH, k0, bk, 2), qi_BKGTH)
        s_BKSGT = soft_cap(s_BKSGT, plan.softcap)
        seen_BST = tokens.visible_BTS(plan.mask, q0, k0, bq, bk).swapaxes(1, 2)
        masked_BKSGT = jnp.where(seen_BST[:, None, :, None], s_BKSGT, -jnp.inf)
        p_BKSGT = jnp.exp(masked_BKSGT - _cut(lse_BKGT, q0, bq, 3)[:, :, None])
        dp_BKSGT = jnp.einsum("BKSH,BKGTH->BKSGT", _cut(v_BKSH, k0, bk, 2), douti_BKGTH)
        ds_BKSGT = p_BKSGT * (dp_BKSGT - _cut(delta_BKGT, q0, bq, 3)[:, :, None])
        if plan.softcap is not None:
            ds_BKSGT *= 1 - (s_BKSGT / plan.softcap) ** 2
        dqi_BKHGT = jnp.einsum("BKHS,BKSGT->BKHGT", _cut(k_BKHS, k0, bk, 3), ds_BKSGT)
        dkj_BKSH = jnp.einsum("BKSGT,BKGTH->BKSH", ds_BKSGT, qi_BKGTH)
        dvj_BKSH = jnp.einsum("BKSGT,BKGTH->BKSH", p_BKSGT, douti_BKGTH)
        return (
            _put(dq_BKHGT, _cut(dq_BKHGT, q0, bq, 4) + dqi_BKHGT, q0, 4),
            _put(dk_BKSH, _cut(dk_BKSH, k0, bk, 2) + dkj_BKSH, k0, 2),
            _put(dv_BKSH, _cut(dv_BKSH, k0, bk, 2) + dvj_BKSH, k0, 2),
        ), None

    start = (
        jnp.zeros_like(q_BKGTH.transpose(0, 1, 4, 2, 3)),
        jnp.zeros_like(k_BKSH),
        jnp.zeros_like(v_BKSH),
    )
    (dq_BKHGT, dk_BKSH, dv_BKSH), _ = lax.scan(visit, start, _tiles(plan, T, S))
    dq_BTNH = _ungrouped(dq_BKHGT.transpose(0, 1, 3, 4, 2)) * plan.scale
    return (
        dq_BTNH.astype(q_BTNH.dtype),
        dk_BKSH.transpose(0, 2, 1, 3).astype(k_BSKH.dtype),
        dv_BKSH.transpose(0, 2, 1, 3).astype(v_BSKH.dtype),
        None,
        None,
    )


_attend.defvjp(_attend_fwd, _attend_bwd)


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


def _tiles(plan: _Plan, T: int, S: int) -> jax.Array:
    return jnp.asarray(tiles(plan.mask, T, S, _block(T), _block(S), plan.rows_aligned))


def _pad(array: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(array, [(0, 0), (0, rows)] + [(0, 0)] * (array.ndim - 2)) if rows else array


def _cut(array: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, size, axis)


def _put(array: jax.Array, update: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, update, start, axis)


def _grouped(x_BTNH: jax.Array, K: int) -> jax.Array:
    """Query heads split by the kv head they read, heads before rows, float32: x_BKGTH."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.astype(F32).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _heads_first(x_BSKH: jax.Array) -> jax.Array:
    return x_BSKH.astype(F32).transpose(0, 2, 1, 3)
