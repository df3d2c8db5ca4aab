"""One attention call as backends see it, and what those with a gradient of their own share.

Shapes: B batch, T queries, S keys, N query heads, V head dim of values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models.attention.mask import Mask, finite


@dataclass(frozen=True)
class Problem:
    """The static part of a call: all that a backend may decide on; hashable.

    rows_aligned: as in `attention`, and no key is flagged as prefix.
    logit_bound: scores are promised to stay within plus and minus this, None for no promise.
    one_document, needs_lse: as in `attention`.
    platform: "tpu" or "cuda" where kernels can be compiled for the target of the call, else None.
    chip: the TPU that the call is compiled for (a name in `sharding.hardware.CHIPS`), else None.
    """

    mask: Mask
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: jnp.dtype
    scale: float
    softcap: float | None
    rows_aligned: bool
    logit_bound: float | None
    alibi: bool
    bias: bool
    one_document: bool
    needs_lse: bool
    platform: str | None
    chip: str | None


class Extras(NamedTuple):
    """What is added to the scores, None where the call has none of it."""

    bias_BNTS: jax.Array | None = None  # batch and heads may be 1
    slopes_N: jax.Array | None = None
    q_positions_BT: jax.Array | None = None  # given with slopes
    k_positions_BS: jax.Array | None = None


def with_gradient(forward: Callable, backward: Callable) -> Callable:
    """Returns attention over (q, k, v, tokens, given, problem), differentiated by `backward`.

    forward: takes (q, k, v, tokens, problem), returns (out_BTNV, lse_BTN).
    backward: takes (q, k, v, tokens, dout_BTNV, lse_BTN, delta_BTN, problem), returns the gradients
        of q, k, v and tokens. delta is the row constant of FlashAttention, float32 and finite.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(5,))
    def attend(q, k, v, tokens, given, problem: Problem):
        return given or forward(q, k, v, tokens, problem)

    def attend_fwd(q, k, v, tokens, given, problem: Problem):
        out_BTNV, lse_BTN = given or forward(q, k, v, tokens, problem)
        # Named here, on the value that is both result and residual: a policy that saves the two
        # names then leaves the backward nothing to rerun the forward for.
        out_BTNV = checkpoint_name(out_BTNV, "attention_out")
        lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
        return (out_BTNV, lse_BTN), (q, k, v, tokens, out_BTNV, lse_BTN)

    def attend_bwd(problem: Problem, residuals, cotangents):
        *inputs, out_BTNV, lse_BTN = residuals
        dout_BTNV, dlse_BTN = cotangents
        # d lse / d s = p, so the gradient through lse only shifts FlashAttention's row constant.
        delta_BTN = (dout_BTNV.astype(jnp.float32) * out_BTNV.astype(jnp.float32)).sum(-1)
        delta_BTN -= dlse_BTN
        # What is not finite in a row stands in its lse, from where masks keep it from other
        # documents.
        lse_BTN = jnp.where(jnp.isfinite(delta_BTN), lse_BTN, jnp.nan)
        return *backward(*inputs, dout_BTNV, lse_BTN, finite(delta_BTN), problem), None

    attend.defvjp(attend_fwd, attend_bwd)
    return attend


def alibi_BNTS(
    slopes_N: jax.Array, q_positions_BT: jax.Array, k_positions_BS: jax.Array
) -> jax.Array:
    """Returns minus slope times distance (ALiBi, Press et al. 2021, arXiv 2108.12409)."""
    distance_BTS = jnp.abs(q_positions_BT[:, :, None] - k_positions_BS[:, None, :])
    return -slopes_N[:, None, None] * distance_BTS[:, None].astype(jnp.float32)
