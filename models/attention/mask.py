"""Who may attend to whom: the static rule, its evaluation on arrays, and the tiles it rules out.

The static part is `Mask`. The arrays travel beside it: positions (restarting at 0 in every
document) and segment ids (one per document in a row, 0 = padding). `reach` turns both into one span
of positions per query, and every backend tests keys against that span. A dense mask is only ever
built for one tile at a time, except in the reference.

Shapes: B batch, T queries, S keys, I query tiles, J key tiles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.errors import UsageError

EMPTY_LSE = -1e30
"""The log-sum-exp of a row that sees no key. Finite, so that merging partial results and their
gradients never meets `inf - inf`, and low enough that `exp(EMPTY_LSE - any real lse)` is 0."""

FAR = 2**30
"""A position beyond every real one."""


@dataclass(frozen=True)
class Mask:
    """The static rule; hashable, so it can be a static argument of jit.

    Two tokens are only ever connected when their segment ids are equal and not 0. On top of that:

    causal: a query at position p sees keys at positions <= p.
    window: a query at position p sees keys at positions p - window + 1 .. p, itself included
        (`sliding_window` in Hugging Face configs). Needs `causal`. None: no limit.
    chunk: a query sees keys of its own chunk only, chunks being `chunk` positions long from the
        start of the document (Llama 4's local layers). Needs `causal`. None: no chunks.

    Keys flagged as prefix (an array, see `attention`) are seen by every query of their segment,
    whatever these say.

    Raises UsageError for a window or a chunk without causal or below 1.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("window", self.window), ("chunk", self.chunk)):
            if size is None:
                continue
            if size < 1:
                raise UsageError(
                    f"attention {name} is {size}; it counts the query itself, so "
                    f"the smallest is 1 (None for no {name})"
                )
            if not self.causal:
                raise UsageError(
                    f"attention {name} {size} needs a causal mask: it ends at the query; "
                    f"set causal=True or {name}=None"
                )

    @property
    def limited(self) -> bool:
        """Whether some keys before the query are out of its reach."""
        return self.window is not None or self.chunk is not None


class Reach(NamedTuple):
    """The mask on arrays: a query sees the keys of its segment between its `first` and `last`.

    A prefix key counts as lying at -FAR when compared with `last` and at FAR when compared with
    `first`: that is `k_before` and `k_after`. Padding is out of every reach.
    """

    q_segments_BT: jax.Array
    q_last_BT: jax.Array
    q_first_BT: jax.Array
    k_segments_BS: jax.Array
    k_before_BS: jax.Array
    k_after_BS: jax.Array


def reach(
    mask: Mask,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    prefix_BS: jax.Array | None = None,
) -> Reach:
    """Returns the span of positions that each query sees; `prefix_BS` flags keys all may see."""
    first_BT = jnp.full_like(q_positions_BT, -FAR)
    if mask.window is not None:
        first_BT = jnp.maximum(first_BT, q_positions_BT - mask.window + 1)
    if mask.chunk is not None:
        first_BT = jnp.maximum(first_BT, q_positions_BT // mask.chunk * mask.chunk)
    before_BS = after_BS = k_positions_BS
    if prefix_BS is not None:
        before_BS = jnp.where(prefix_BS, -FAR, before_BS)
        after_BS = jnp.where(prefix_BS, FAR, after_BS)
    q_real_BT, k_real_BS = q_segments_BT > 0, k_segments_BS > 0
    return Reach(
        q_segments_BT,
        jnp.where(q_real_BT, q_positions_BT if mask.causal else FAR, -FAR),
        jnp.where(q_real_BT, first_BT, FAR),
        k_segments_BS,
        jnp.where(k_real_BS, before_BS, FAR),
        jnp.where(k_real_BS, after_BS, -FAR),
    )


def visible_BTS(mask: Mask, reach: Reach) -> jax.Array:
    """Evaluates the mask: True where the query (row) may attend to the key (column)."""
    q_segments_BT1, k_segments_B1S = reach.q_segments_BT[:, :, None], reach.k_segments_BS[:, None]
    seen_BTS = (q_segments_BT1 == k_segments_B1S) & (k_segments_B1S > 0)
    if mask.causal:
        seen_BTS &= reach.k_before_BS[:, None] <= reach.q_last_BT[:, :, None]
    if mask.limited:
        seen_BTS &= reach.k_after_BS[:, None] >= reach.q_first_BT[:, :, None]
    return seen_BTS


def finite(x: jax.Array) -> jax.Array:
    """Puts 0 where a value is NaN or infinite: times a probability of 0 it would be NaN."""
    wide = x.astype(jnp.float32)
    return jnp.where(jnp.abs(wide) < jnp.inf, wide, 0.0).astype(x.dtype)


def needed_IJ(
    mask: Mask, queries: int, keys: int, q_block: int, k_block: int, rows_aligned: bool
) -> np.ndarray:
    """Returns which tiles may hold a visible pair, as far as is known before tracing.

    With `rows_aligned`, query row i and key row i are the same token, so inside a document the
    distance in rows is the distance in positions and the mask rules tiles out. The caller says
    False where keys are flagged as prefix.
    """
    q_start_I1 = np.arange(0, queries, q_block)[:, None]
    k_start_1J = np.arange(0, keys, k_block)[None, :]
    needed = np.ones((q_start_I1.size, k_start_1J.size), bool)
    if rows_aligned and mask.causal:
        needed &= k_start_1J <= q_start_I1 + q_block - 1
    for size in (mask.window, mask.chunk):  # a chunk reaches back no further than a window
        if rows_aligned and size is not None:
            needed &= q_start_I1 - (k_start_1J + k_block - 1) < size
    return needed


def tiles(
    mask: Mask, queries: int, keys: int, q_block: int, k_block: int, rows_aligned: bool
) -> np.ndarray:
    """Returns (query start, key start) of each tile of `needed_IJ`: int32 (P, 2)."""
    q_index_P, k_index_P = np.nonzero(
        needed_IJ(mask, queries, keys, q_block, k_block, rows_aligned)
    )
    return np.stack([q_index_P * q_block, k_index_P * k_block], axis=1).astype(np.int32)
