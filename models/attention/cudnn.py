"""Attention by cuDNN, NVIDIA's own kernels, through `jax.nn.dot_product_attention`.

It takes no segment ids, so it serves rows of one document each; no gradient passes through its
log-sum-exp, so it serves callers that need none. Its gradient keeps what it needs under no name: a
rematerialisation policy by names runs its forward again.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models.attention.mask import Reach
from models.attention.problem import Extras, Problem

_LARGEST_HEAD = 128  # before Hopper; above, JAX allows 256


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    reach: Reach,
    extras: Extras,
    problem: Problem,
    given: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, None]:
    """Returns (out_BTNV in q's dtype, None): the contract is `dispatch.attention`'s."""
    del extras, given  # `refusal` lets none pass
    mask = problem.mask
    # Padding follows the document, where a causal mask hides it and the door blanks its rows.
    lengths_B = None if mask.causal else (reach.k_segments_BS > 0).sum(1, dtype=jnp.int32)
    out_BTNV = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKV,
        scale=problem.scale,
        is_causal=mask.causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    return checkpoint_name(out_BTNV, "attention_out"), None


def refusal(problem: Problem) -> str | None:
    """Returns why cuDNN cannot do a problem exactly, or None."""
    reasons = {
        "it runs on NVIDIA GPUs only": problem.platform != "cuda",
        "its log-sum-exp has no gradient (needs_lse=False does without)": problem.needs_lse,
        "it knows rows of one aligned document only": not (
            problem.one_document and problem.rows_aligned
        ),
        "it has no chunks": problem.mask.chunk is not None,
        "it has no soft-cap": problem.softcap is not None,
        "it adds no ALiBi to the scores": problem.alibi,
        "it adds no bias to the scores": problem.bias,
        f"it takes bfloat16 and float16, not {problem.dtype}": (
            problem.dtype not in (jnp.bfloat16, jnp.float16)
        ),
        f"head sizes are {problem.head_dim} and {problem.value_dim}, not equal": (
            problem.head_dim != problem.value_dim
        ),
        f"head size {problem.head_dim} is no multiple of 8 up to {_LARGEST_HEAD}": (
            problem.head_dim % 8 != 0 or problem.head_dim > _LARGEST_HEAD
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
