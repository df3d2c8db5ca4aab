"""Dense softmax attention in float32: the definition that other backends are held to.

It holds all (queries, keys) scores at once, so it is for tests, for short sequences and for
decoding, where there are only a few queries. The gradient is JAX's own.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N // K, H head dim.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models.attention.mask import EMPTY_LSE, Mask, visible_BTS

F32 = jnp.float32


def soft_cap(scores: jax.Array, cap: float | None) -> jax.Array:
    """Squashes scores smoothly into (-cap, cap) (Gemma 2, arXiv 2408.00118); None leaves them."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def reference_attention(
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
    """Returns (out_BTNH in q's dtype, lse_BTN float32): the contract is `dispatch.attention`'s."""
    del rows_aligned  # nothing to skip: every score is computed
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(F32) * scale
    s_BKGTS = soft_cap(jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(F32)), softcap)
    seen_BTS = visible_BTS(mask, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS)
    s_BKGTS = jnp.where(seen_BTS[:, None, None], s_BKGTS, -jnp.inf)

    if given is not None:  # functions of q, k and v whose gradients are those that are asked for
        out_BTNH, lse_BTN = (jax.lax.stop_gradient(x.astype(F32)) for x in given)
        lse_BKGT = lse_BTN.reshape(B, T, K, N // K).transpose(0, 2, 3, 1)
        p_BKGTS = jnp.exp(s_BKGTS - lse_BKGT[..., None])
        sum_BTN = p_BKGTS.sum(-1).transpose(0, 3, 1, 2).reshape(B, T, N)
        pv_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH.astype(F32))
        moved_BTNH = pv_BTKGH.reshape(B, T, N, H) - out_BTNH * sum_BTN[..., None]
        return moved_BTNH.astype(q_BTNH.dtype), sum_BTN

    max_BKGT = jax.lax.stop_gradient(jnp.maximum(s_BKGTS.max(-1), EMPTY_LSE))
    p_BKGTS = jnp.exp(s_BKGTS - max_BKGT[..., None])
    sum_BKGT = p_BKGTS.sum(-1)
    empty_BKGT = sum_BKGT == 0
    sum_BKGT = jnp.where(empty_BKGT, 1.0, sum_BKGT)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS / sum_BKGT[..., None], v_BSKH.astype(F32))
    lse_BKGT = jnp.where(empty_BKGT, EMPTY_LSE, max_BKGT + jnp.log(sum_BKGT))
    out_BTNH = out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
    lse_BTN = lse_BKGT.transpose(0, 3, 1, 2).reshape(B, T, N)
    return checkpoint_name(out_BTNH, "attention_out"), checkpoint_name(lse_BTN, "attention_lse")
