"""One attention call as backends see it: what is known before tracing, and the optional arrays.

Shapes: B batch, T queries, S keys, N query heads.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.attention.mask import Mask


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


def alibi_BNTS(
    slopes_N: jax.Array, q_positions_BT: jax.Array, k_positions_BS: jax.Array
) -> jax.Array:
    """Returns minus slope times distance (ALiBi, Press et al. 2021, arXiv 2108.12409)."""
    distance_BTS = jnp.abs(q_positions_BT[:, :, None] - k_positions_BS[:, None, :])
    return -slopes_N[:, None, None] * distance_BTS[:, None].astype(jnp.float32)
