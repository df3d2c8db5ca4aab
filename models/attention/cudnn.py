"""Attention by cuDNN, NVIDIA's own kernels, through `jax.nn.dot_product_attention`.

It takes no segment ids: rows of one document each need none, and for packed rows the whole mask is
given as a bias that all heads share, 2 bytes for each query and key of a row. No gradient passes
through its log-sum-exp, so it serves callers that need none. Its gradient keeps what it needs under
no name: a rematerialisation policy by names runs its forward again.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models.attention.mask import Reach, visible_BTS
from models.attention.problem import Extras, Problem

_LARGEST_HEAD = 128  # before Hopper; above, JAX allows 256
LARGEST_MASK = 2 * 2**30  # bytes of a mask: 32 rows of 4,096 tokens, 8 of 8,192, 2 of 16,384


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
    mask, lengths_B, mask_B1TS = problem.mask, None, None
    if not _of_one_document(problem):
        mask_B1TS = visible_BTS(mask, reach)[:, None]
    elif not mask.causal:  # else padding, which follows the document, is in nobody's past
        lengths_B = (reach.k_segments_BS > 0).sum(1, dtype=jnp.int32)
    window = mask.window if mask_B1TS is None else None
    out_BTNV = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKV,
        mask=mask_B1TS,
        scale=problem.scale,
        # Rows as a whole are causal too where documents are, and cuDNN then skips half of them.
        is_causal=mask.causal and problem.rows_aligned,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    if mask_B1TS is not None:  # a query that sees no key would get the mean of all values
        out_BTNV = jnp.where(mask_B1TS[:, 0].any(-1)[:, :, None, None], out_BTNV, 0)
    return checkpoint_name(out_BTNV, "attention_out"), None


def _of_one_document(problem: Problem) -> bool:
    """Whether cuDNN's own masks can say what the problem's mask says."""
    return problem.one_document and problem.rows_aligned and problem.mask.chunk is None


def mask_bytes(problem: Problem) -> int:
    """Bytes of the mask that a call holds."""
    if _of_one_document(problem):
        return 0
    return 2 * problem.batch * problem.queries * problem.keys


def refusal(problem: Problem) -> str | None:
    """Returns why cuDNN cannot do a problem exactly, or None."""
    reasons = {
        "it runs on NVIDIA GPUs only": problem.platform != "cuda",
        "its log-sum-exp has no gradient (needs_lse=False does without)": problem.needs_lse,
        f"its mask of packed rows would take {mask_bytes(problem) / 2**30:.1f} GiB, more than "
        f"{LARGEST_MASK / 2**30:g}": mask_bytes(problem) > LARGEST_MASK,
        f"with a mask it takes even lengths, not {problem.queries} and {problem.keys}": (
            mask_bytes(problem) > 0 and (problem.queries % 2 or problem.keys % 2) > 0
        ),
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
