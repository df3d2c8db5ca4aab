"""Which tiles a kernel visits, in which order, and what it does there: tables for the TPU kernels.

`tile_kinds` reads the arrays of one call and says per tile whether nothing, everything or a part of
it is visible; `forward_table` and `backward_table` turn that into one packed int32 per grid step.
Tiles that the mask rules out before tracing have no step; those that documents rule out at run time
are moved behind the others, where a step costs a few cycles and moves no data.

Shapes: B batch, T queries, S keys, I query tiles, J key tiles, P grid steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models.attention.mask import FAR, Mask, Reach

NOTHING, FULL, PART, DIAGONAL = range(4)
"""DIAGONAL: a block of one document, cut from corner to corner. Where key and query tile are the
same, all up to the query is seen; elsewhere a window ends there: all after its first key is."""

# One step: kind in bits 0-1, flags in 2-4, key tile in 5-16, query tile in 17-30.
_FIRST, _LAST, _EMIT, _KEYS, _QUERIES = 2, 3, 4, 5, 17
MOST_KEY_TILES, MOST_QUERY_TILES = 1 << 12, 1 << 14


def kind(step: jax.Array) -> jax.Array:
    """What is visible in the tile of a step: NOTHING, FULL, PART or DIAGONAL."""
    return step & 3


def is_first(step: jax.Array) -> jax.Array:
    """Whether the step is the first of its query tile (forward) or key tile (backward)."""
    return (step >> _FIRST) & 1 == 1


def is_last(step: jax.Array) -> jax.Array:
    """Whether the step is the last of its query tile (forward) or key tile (backward)."""
    return (step >> _LAST) & 1 == 1


def emits(step: jax.Array) -> jax.Array:
    """Whether no later step of the backward adds to the query gradient of this query tile."""
    return (step >> _EMIT) & 1 == 1


def key_tile(step: jax.Array) -> jax.Array:
    return (step >> _KEYS) & (MOST_KEY_TILES - 1)


def query_tile(step: jax.Array) -> jax.Array:
    return step >> _QUERIES


def tile_kinds(
    reach: Reach, q_block: int, k_block: int, *, causal: bool, limited: bool
) -> jax.Array:
    """Returns kind_BIJ (NOTHING, FULL or PART) from the extremes of every tile's arrays."""

    def extremes(array, block):
        tiles = array.reshape(array.shape[0], -1, block)
        return tiles.min(-1), tiles.max(-1)

    def rows(array_BT):
        return tuple(x[:, :, None] for x in extremes(array_BT, q_block))

    def columns(array_BS):
        return tuple(x[:, None, :] for x in extremes(array_BS, k_block))

    def real(segments):
        return jnp.where(segments > 0, segments, FAR)

    q_low, q_high = rows(reach.q_segments_BT)
    k_low, k_high = columns(reach.k_segments_BS)
    q_real, _ = rows(real(reach.q_segments_BT))
    k_real, _ = columns(real(reach.k_segments_BS))
    some = (q_real <= k_high) & (k_real <= q_high)
    every = (q_low == q_high) & (k_low == k_high) & (q_low == k_low) & (q_low > 0)
    if causal:
        last_low, last_high = rows(reach.q_last_BT)
        before_low, before_high = columns(reach.k_before_BS)
        some &= before_low <= last_high
        every &= before_high <= last_low
    if limited:
        first_low, first_high = rows(reach.q_first_BT)
        after_low, after_high = columns(reach.k_after_BS)
        some &= after_high >= first_low
        every &= after_low >= first_high
    return jnp.where(every, FULL, jnp.where(some, PART, NOTHING)).astype(jnp.int32)


def block_kinds(
    mask: Mask, reach: Reach, block: tuple[int, int], sub: tuple[int, int], diagonal: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns (kind_BIJ of blocks, bits_BIJ of the visible sub-tiles in each, row by row).

    `diagonal`: rows are aligned and no key is a prefix, so a block on the diagonal whose tokens are
    of one document and in reach of each other but for their order is DIAGONAL. So is one that is
    `window_edge` blocks before it.
    """
    fine = tile_kinds(reach, *sub, causal=mask.causal, limited=mask.limited)
    B, rows, columns = fine.shape
    q_subs, k_subs = block[0] // sub[0], block[1] // sub[1]
    fine = fine.reshape(B, rows // q_subs, q_subs, columns // k_subs, k_subs)
    fine = fine.transpose(0, 1, 3, 2, 4).reshape(B, rows // q_subs, columns // k_subs, -1)
    seen = fine != NOTHING
    kind_BIJ = jnp.where((fine == FULL).all(-1), FULL, jnp.where(seen.any(-1), PART, NOTHING))
    bits_BIJ = (seen * jnp.asarray(1 << np.arange(q_subs * k_subs), jnp.int32)).sum(-1)
    if diagonal:
        within = tile_kinds(reach, *block, causal=False, limited=mask.limited) == FULL
        within &= np.eye(within.shape[1], dtype=bool)
        if edge := window_edge(mask, block):
            alone = tile_kinds(reach, *block, causal=False, limited=False) == FULL
            within |= alone & np.eye(within.shape[1], k=-edge, dtype=bool)
        kind_BIJ = jnp.where(within, DIAGONAL, kind_BIJ)
    return kind_BIJ, bits_BIJ


def window_edge(mask: Mask, block: tuple[int, int]) -> int:
    """Returns how many blocks before the diagonal a window ends, 0 where it ends amid blocks."""
    whole = mask.window and not mask.chunk and mask.window % block[0] == 0
    return mask.window // block[0] if whole and block[0] == block[1] else 0


def forward_table(
    kind_BIJ: jax.Array, bits_BIJ: jax.Array, needed_IJ: np.ndarray, diagonal_first: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns (step_BP, bits_BP): for every query tile its key tiles, at least one."""
    i_P, j_P = np.nonzero(needed_IJ)
    # The diagonal block is sure to see something in every row, so it can start the sums.
    order = np.lexsort((j_P, (j_P != i_P) if diagonal_first else j_P, i_P))
    i_P, j_P = i_P[order], j_P[order]
    kind_BIJ = jnp.where(needed_IJ, kind_BIJ, NOTHING)
    anchor_P = np.append(True, i_P[1:] != i_P[:-1])
    idle_BI = ~(kind_BIJ != NOTHING).any(2)
    keep_BP = (kind_BIJ[:, i_P, j_P] != NOTHING) | (anchor_P & idle_BI[:, i_P])
    step_BP = kind_BIJ[:, i_P, j_P] | (j_P << _KEYS) | (i_P << _QUERIES)
    step_BP, bits_BP = _kept_first(keep_BP, step_BP, bits_BIJ[:, i_P, j_P])
    return _flag_runs(step_BP, query_tile(step_BP), keep_BP.sum(1)), bits_BP


def backward_table(
    kind_BIJ: jax.Array, bits_BIJ: jax.Array, needed_IJ: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (step_BP, bits_BP, target_BP): for every key tile its query tiles, at least one.

    A query tile is emitted at its last step; `target` is the tile of the next emission, so that one
    output block stays in place until it is written.
    """
    j_P, i_P = np.nonzero(needed_IJ.T)
    needed_BIJ = jnp.broadcast_to(needed_IJ, kind_BIJ.shape)
    keep_BIJ = needed_BIJ & (kind_BIJ != NOTHING)
    J = needed_IJ.shape[1]
    first_I, first_J = needed_IJ.argmax(1), needed_IJ.argmax(0)
    idle_BI1, idle_B1J = ~keep_BIJ.any(2, keepdims=True), ~keep_BIJ.any(1, keepdims=True)
    keep_BIJ |= idle_BI1 & (first_I[:, None] == np.arange(J))
    keep_BIJ |= idle_B1J & (first_J == np.arange(needed_IJ.shape[0])[:, None])
    last_BI = J - 1 - keep_BIJ[:, :, ::-1].argmax(2)
    emit_BP = (last_BI[:, i_P] == j_P).astype(jnp.int32)
    kind_BP = jnp.where(needed_BIJ, kind_BIJ, NOTHING)[:, i_P, j_P]
    step_BP = kind_BP | (emit_BP << _EMIT) | (j_P << _KEYS) | (i_P << _QUERIES)
    keep_BP = keep_BIJ[:, i_P, j_P]
    step_BP, bits_BP = _kept_first(keep_BP, step_BP, bits_BIJ[:, i_P, j_P])
    step_BP = _flag_runs(step_BP, key_tile(step_BP), keep_BP.sum(1))
    P = i_P.size
    emission_BP = jnp.where(emits(step_BP), np.arange(P, dtype=np.int32), P)
    next_BP = lax.cummin(emission_BP, axis=1, reverse=True)
    next_BP = jnp.minimum(next_BP, (keep_BP.sum(1, dtype=jnp.int32) - 1)[:, None])
    return step_BP, bits_BP, query_tile(jnp.take_along_axis(step_BP, next_BP, axis=1))


def _kept_first(keep_BP, *tables_BP):
    """Moves the steps to keep before the others, in their order."""
    return lax.sort((~keep_BP, *tables_BP), dimension=1, is_stable=True, num_keys=1)[1:]


def _flag_runs(step_BP: jax.Array, run_BP: jax.Array, count_B: jax.Array) -> jax.Array:
    """Flags the ends of runs of equal `run_BP`; steps from `count_B` on repeat the last, idle."""
    P = step_BP.shape[1]
    p = np.arange(P)
    change_BP = run_BP[:, 1:] != run_BP[:, :-1]
    first_BP = jnp.pad(change_BP, ((0, 0), (1, 0)), constant_values=True)
    last_BP = jnp.pad(change_BP, ((0, 0), (0, 1)), constant_values=True)
    last_BP |= p == count_B[:, None] - 1
    idle_BP = jnp.take_along_axis(step_BP, count_B[:, None] - 1, axis=1) >> _KEYS << _KEYS
    step_BP |= (first_BP.astype(jnp.int32) << _FIRST) | (last_BP.astype(jnp.int32) << _LAST)
    return jnp.where(p < count_B[:, None], step_BP, idle_BP).astype(jnp.int32)
