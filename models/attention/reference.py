"""Dense softmax attention in float32: the definition that other backends are held to.

It holds all (queries, keys) scores at once, so it is for tests, for short sequences and for
decoding, where there are only a few queries. The gradient is JAX's own.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N // K, H head dim
of queries and keys, V head dim of values.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models.attention.mask import EMPTY_LSE, Reach, visible_BTS
from models.attention.problem import Extras, Problem, alibi_BNTS

F32 = jnp.float32


def soft_cap(scores: jax.Array, cap: float | None) -> jax.Array:
    """Squashes scores smoothly into (-cap, cap) (Gemma 2, arXiv 2408.00118); None leaves them."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def reference_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    reach: Reach,
    extras: Extras,
    problem: Problem,
    given: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BTNV in q's dtype, lse_BTN float32): the contract is `dispatch.attention`'s."""
    B, T, N, H = q_BTNH.shape
    S, K, V = v_BSKV.shape[1:]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(F32) * problem.scale
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(F32))
    s_BNTS = soft_cap(s_BKGTS, problem.softcap).reshape(B, N, T, S)
    if extras.bias_BNTS is not None:
        s_BNTS += extras.bias_BNTS.astype(F32)
    if extras.slopes_N is not None:
        s_BNTS += alibi_BNTS(extras.slopes_N, extras.q_positions_BT, extras.k_positions_BS)
    s_BNTS = jnp.where(visible_BTS(problem.mask, reach)[:, None], s_BNTS, -jnp.inf)
    s_BKGTS = s_BNTS.reshape(s_BKGTS.shape)

    if given is not None:  # functions of q, k and v whose gradients are those that are asked for
        out_BTNV, lse_BTN = (jax.lax.stop_gradient(x.astype(F32)) for x in given)
        lse_BKGT = lse_BTN.reshape(B, T, K, N // K).transpose(0, 2, 3, 1)
        p_BKGTS = jnp.exp(s_BKGTS - lse_BKGT[..., None])
        sum_BTN = p_BKGTS.sum(-1).transpose(0, 3, 1, 2).reshape(B, T, N)
        pv_BTKGV = jnp.einsum("BKGTS,BSKV->BTKGV", p_BKGTS, v_BSKV.astype(F32))
        moved_BTNV = pv_BTKGV.reshape(B, T, N, V) - out_BTNV * sum_BTN[..., None]
        return moved_BTNV.astype(q_BTNH.dtype), sum_BTN

    max_BKGT = jax.lax.stop_gradient(jnp.maximum(s_BKGTS.max(-1), EMPTY_LSE))
    p_BKGTS = jnp.exp(s_BKGTS - max_BKGT[..., None])
    sum_BKGT = p_BKGTS.sum(-1)
    empty_BKGT = sum_BKGT == 0
    sum_BKGT = jnp.where(empty_BKGT, 1.0, sum_BKGT)
    out_BTKGV = jnp.einsum("BKGTS,BSKV->BTKGV", p_BKGTS / sum_BKGT[..., None], v_BSKV.astype(F32))
    lse_BKGT = jnp.where(empty_BKGT, EMPTY_LSE, max_BKGT + jnp.log(sum_BKGT))
    out_BTNV = out_BTKGV.reshape(B, T, N, V).astype(q_BTNH.dtype)
    lse_BTN = lse_BKGT.transpose(0, 3, 1, 2).reshape(B, T, N)
    return checkpoint_name(out_BTNV, "attention_out"), checkpoint_name(lse_BTN, "attention_lse")
