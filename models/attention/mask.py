"""Who may attend to whom: the static rule, its evaluation on arrays, and the tiles it rules out.

The static part is `Mask`. The arrays travel beside it: positions (restarting at 0 in every
document) and segment ids (one per document in a row, 0 = padding). A dense mask is only ever built
for one tile at a time, except in the reference.

Shapes: B batch, T queries, S keys.
"""

from dataclasses import dataclass

import jax
import numpy as np

from sharding.errors import UsageError

EMPTY_LSE = -1e30
"""The log-sum-exp of a row that sees no key. Finite, so that merging partial results and their
gradients never meets `inf - inf`, and low enough that `exp(EMPTY_LSE - any real lse)` is 0."""


@dataclass(frozen=True)
class Mask:
    """The static rule; hashable, so it can be a static argument of jit.

    Two tokens are only ever connected when their segment ids are equal and not 0. On top of that:

    causal: a query at position p sees keys at positions <= p.
    window: a query at position p sees keys at positions p - window + 1 .. p, itself included
        (`sliding_window` in Hugging Face configs). Needs `causal`. None: no limit.

    Raises UsageError for a window without causal or below 1.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is None:
            return
        if self.window < 1:
            raise UsageError(
                f"attention window is {self.window}; it counts the query itself, so "
                "the smallest is 1 (None for no window)"
            )
        if not self.causal:
            raise UsageError(
                f"attention window {self.window} needs a causal mask: it spans "
                "positions p - window + 1 .. p; set causal=True or window=None"
            )


def visible_BTS(
    mask: Mask,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
) -> jax.Array:
    """Evaluates `mask`: True where the query (row) may attend to the key (column)."""
    q_segments_BT1, k_segments_B1S = q_segments_BT[:, :, None], k_segments_BS[:, None, :]
    seen_BTS = (q_segments_BT1 == k_segments_B1S) & (k_segments_B1S > 0)
    distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    if mask.causal:
        seen_BTS &= distance_BTS >= 0
    if mask.window is not None:
        seen_BTS &= distance_BTS < mask.window
    return seen_BTS


def tiles(
    mask: Mask, queries: int, keys: int, q_block: int, k_block: int, rows_aligned: bool
) -> np.ndarray:
    """Returns (query start, key start) of each tile that may hold a visible pair: int32 (P, 2).

    With `rows_aligned`, query row i and key row i are the same token, so inside a document the
    distance in rows is the distance in positions and the mask rules tiles out before tracing.
    """
    q_start_I1 = np.arange(0, queries, q_block)[:, None]
    k_start_1J = np.arange(0, keys, k_block)[None, :]
    needed_IJ = np.ones((q_start_I1.size, k_start_1J.size), bool)
    if rows_aligned and mask.causal:
        needed_IJ &= k_start_1J <= q_start_I1 + q_block - 1
    if rows_aligned and mask.window is not None:
        needed_IJ &= q_start_I1 - (k_start_1J + k_block - 1) < mask.window
    q_index_P, k_index_P = np.nonzero(needed_IJ)
    return np.stack([q_index_P * q_block, k_index_P * k_block], axis=1).astype(np.int32)
