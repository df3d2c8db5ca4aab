"""Attention whose rows are spread over the `seq` mesh axis: moving heads and keys between devices.

Everything runs inside `jax.shard_map` on local rows. The strategy and the order of the columns are
`sequence_plan.py`'s to say; the arithmetic on one device is `dispatch.attention`'s. Positions and
segment ids travel with the keys, so that the mask never depends on where a block came from.

The ring has a gradient of its own: it keeps the local rows, the output and the log-sum-exp, and
sends keys round once more, so memory is O(length / devices). Partial results merge by log-sum-exp.

Shapes: B batch, T local rows, S rows of a block of keys, N query heads, K kv heads, H head dim,
P pieces of the local rows.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from models.attention.dispatch import attention
from models.attention.mask import EMPTY_LSE, Mask
from models.attention.sequence_plan import SequencePlan, Sizes, sequence_plan
from models.config import ModelConfig
from sharding.hardware import chip_for
from sharding.rules import BATCH, SEQ

F32 = jnp.float32

# Rows of queries and of keys that are attended to, or skipped, at once. Small enough that a causal
# mask skips nearly half, large enough that a tile outweighs the reading and writing of its sums.
PIECE = 1024


class Rows(NamedTuple):
    """Positions and segment ids of some columns."""

    positions_BT: jax.Array
    segments_BT: jax.Array


class Keys(NamedTuple):
    """A block of keys on its way round, in two arrays: XLA keeps few transfers in flight."""

    kv_BSJH: jax.Array  # keys' heads, then values': J = 2 K
    rows_RS: jax.Array  # positions of each row, then segment ids: R = 2 B


@dataclass(frozen=True)
class _Call:
    """What is static about one call; hashable because custom_vjp compares it."""

    plan: SequencePlan
    mask: Mask
    scale: float
    softcap: float | None
    backend: str

    def options(self, q: Rows, k: Rows) -> dict[str, Any]:
        """The arguments by name of the local call."""
        return dict(
            q_positions_BT=q.positions_BT, k_positions_BS=k.positions_BT,
            q_segments_BT=q.segments_BT, k_segments_BS=k.segments_BT,
            scale=self.scale, softcap=self.softcap, backend=self.backend,
        )  # fmt: skip


# ---------------------------------------------------------------- what others call


def plan_for(config: ModelConfig, length: int) -> SequencePlan:
    """Returns the plan for rows of `length` columns on the mesh of the context."""
    mesh = jax.sharding.get_abstract_mesh()
    chip = chip_for(mesh.abstract_device)
    plan = sequence_plan(config, Sizes.of(config, dict(mesh.shape), length, chip))
    if plan.devices > 1:
        _log(plan)
    return plan


@cache  # a plan is asked for by every kind of layer, and by every program
def _log(plan: SequencePlan) -> None:
    logging.info(
        "attention over seq = %d: %s, %s order (%s)",
        plan.devices, plan.strategy, plan.order, plan.reason,
    )  # fmt: skip


def in_order(batch: dict[str, jax.Array], plan: SequencePlan) -> dict[str, jax.Array]:
    """Returns a batch of (B, T) int32 arrays with its columns in the order of `plan`.

    All arrays move together, so a loss summed over columns stays what it is.
    """
    if plan.order == "contiguous":
        return batch
    rows = plan.length // plan.devices

    def move(a_MBT):  # the integers of a row are few: every device takes its own from all of them
        whole_MBT = lax.all_gather(a_MBT, SEQ, axis=2, tiled=True)
        mine_T = lax.dynamic_slice_in_dim(plan.columns(), lax.axis_index(SEQ) * rows, rows)
        return jnp.take(whole_MBT, mine_T, axis=2)

    spec = P(None, BATCH, SEQ)
    moved_MBT = jax.shard_map(move, in_specs=spec, out_specs=spec, check_vma=False)(
        jnp.stack(list(batch.values()))
    )
    return dict(zip(batch, moved_MBT, strict=True))


def sequence_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    rows: Rows,
    mask: Mask,
    plan: SequencePlan,
    *,
    scale: float,
    softcap: float | None,
    backend: str,
) -> jax.Array:
    """Returns out_BTNH of local queries over the keys of all devices of the seq axis.

    `rows` are the local columns, in the order of `plan`. Under rematerialisation the names
    `attention_out` and `attention_lse` keep what the backward pass needs of the forward ring.

    Raises:
      UsageError: as `dispatch.attention`.
    """
    u = plan.head_devices
    if u > 1:
        copies = u // math.gcd(k_BTKH.shape[2], u)  # the fewest that give every device a KV head
        k_BTKH, v_BTKH = (jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))
        q_BTNH, k_BTKH, v_BTKH = (
            lax.all_to_all(x, SEQ, 2, 1, tiled=True, axis_index_groups=_neighbours(plan))
            for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        rows = Rows(*(
            lax.all_gather(x, SEQ, axis=1, tiled=True, axis_index_groups=_neighbours(plan))
            for x in rows
        ))  # fmt: skip
    call = _Call(plan, mask, scale, softcap, backend)
    if plan.ring == 1:
        out_BTNH, _ = attention(
            q_BTNH, k_BTKH, v_BTKH, mask, rows_aligned=True, **call.options(rows, rows)
        )
    else:
        out_BTNH, _ = _around(q_BTNH, jnp.concatenate([k_BTKH, v_BTKH], axis=2), rows, call)
    if u > 1:
        out_BTNH = lax.all_to_all(
            out_BTNH, SEQ, 1, 2, tiled=True, axis_index_groups=_neighbours(plan)
        )
    return out_BTNH


def _neighbours(plan: SequencePlan) -> list[list[int]]:
    """The devices of each station, among which heads are exchanged."""
    return np.arange(plan.devices).reshape(plan.ring, plan.head_devices).tolist()


# ---------------------------------------------------------------- the ring


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _around(q_BTNH, kv_BTJH, rows: Rows, call: _Call):
    """Returns (out_BTNH, lse_BTN) over the keys of all stations."""
    zero = jnp.zeros(q_BTNH.shape, F32), jnp.full(q_BTNH.shape[:3], EMPTY_LSE, F32)

    def compute(total, streams):
        for keys in streams:
            total = _absorb(total, q_BTNH, rows, keys, call)
        return total

    def hop(carry, _):
        streams, total = carry
        coming = _sent(streams, call.plan)  # under way while this hop computes
        return (coming, compute(total, streams)), None

    carry = (_streams(kv_BTJH, rows, call.plan), zero)
    (streams, total), _ = lax.scan(hop, carry, length=_passes(call))
    out_BTNH, lse_BTN = compute(total, streams)
    return out_BTNH.astype(q_BTNH.dtype), lse_BTN


def _around_fwd(q_BTNH, kv_BTJH, rows: Rows, call: _Call):
    out_BTNH, lse_BTN = _around(q_BTNH, kv_BTJH, rows, call)
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
    return (out_BTNH, lse_BTN), (q_BTNH, kv_BTJH, rows, out_BTNH, lse_BTN)


def _around_bwd(call: _Call, saved, cotangents):
    q_BTNH, kv_BTJH, rows, out_BTNH, lse_BTN = saved
    queries = (q_BTNH, (out_BTNH, lse_BTN), cotangents)

    def compute(dq_BTNH, streams, arriving):
        sums = []
        for keys, dkv_BSJH in zip(streams, arriving, strict=True):
            dq_BTNH, own_BSJH = _absorb_gradient(dq_BTNH, queries, rows, keys, call)
            sums.append(dkv_BSJH + own_BSJH)
        return dq_BTNH, sums

    def hop(carry, _):
        streams, sums, dq_BTNH = carry
        # The sums of a block follow it a hop later: nothing that travels waits for this hop's work.
        coming, arriving = _sent(streams, call.plan), _sent(sums, call.plan)
        dq_BTNH, sums = compute(dq_BTNH, streams, arriving)
        return (coming, sums, dq_BTNH), None

    streams = _streams(kv_BTJH, rows, call.plan)
    sums = [jnp.zeros(keys.kv_BSJH.shape, F32) for keys in streams]
    passes = _passes(call)
    carry = (streams, sums, jnp.zeros(q_BTNH.shape, F32))
    (streams, sums, dq_BTNH), _ = lax.scan(hop, carry, length=passes)
    dq_BTNH, sums = compute(dq_BTNH, streams, _sent(sums, call.plan) if passes else sums)
    dkv_BTJH = _home(sums, passes, call.plan)
    return dq_BTNH.astype(q_BTNH.dtype), dkv_BTJH.astype(kv_BTJH.dtype), None


_around.defvjp(_around_fwd, _around_bwd)

def _passes(call: _Call) -> int:
    """How often keys are passed on."""
    return 0 if call.plan.strategy == "gather" else call.plan.hops(call.mask.window) - 1


def _streams(kv_BTJH: jax.Array, rows: Rows, plan: SequencePlan) -> list[Keys]:
    """The blocks that set out from here: all keys of the axis, the local ones, or halves of them.

    Halves are taken from each stretch of columns, so that both directions have the same work.
    """
    keys = Keys(kv_BTJH, jnp.concatenate(rows))
    if plan.strategy == "gather":
        return [jax.tree.map(lambda x: lax.all_gather(x, SEQ, axis=1, tiled=True), keys)]
    if plan.streams == 1:
        return [keys]

    def half(x, i):
        B, T, *rest = x.shape
        return x.reshape(B, plan.parts, 2, -1, *rest)[:, :, i].reshape(B, T // 2, *rest)

    return [jax.tree.map(partial(half, i=i), keys) for i in range(2)]


def _home(sums: list[jax.Array], passes: int, plan: SequencePlan) -> jax.Array:
    """Brings gradients back to where their blocks set out and undoes `_streams`."""
    if plan.strategy == "gather":
        return lax.psum_scatter(sums[0], SEQ, scatter_dimension=1, tiled=True)
    sums = _sent(sums, plan, -passes)
    if plan.streams == 1:
        return sums[0]
    B, S, *rest = sums[0].shape
    halves = [x.reshape(B, plan.parts, 1, -1, *rest) for x in sums]
    return jnp.concatenate(halves, axis=2).reshape(B, 2 * S, *rest)


def _sent(streams: list, plan: SequencePlan, stations: int = 1) -> list:
    """Passes the first stream on by so many stations, the second one the other way."""
    n = plan.devices

    def send(stream, step):
        pairs = [(i, (i + step * plan.head_devices) % n) for i in range(n)]
        return jax.tree.map(lambda x: lax.ppermute(x, SEQ, pairs), stream)

    return [send(s, step) for s, step in zip(streams, (stations, -stations), strict=False)]


# ---------------------------------------------------------------- one block of keys


def _absorb(total, q_BTNH: jax.Array, rows: Rows, keys: Keys, call: _Call):
    """Merges attention to one block of keys into (out_BTNH float32, lse_BTN)."""

    def tile(q0, q_size, k0, k_size, total):
        k, v, k_rows = _unpacked(_cut(keys, k0, k_size))
        q, q_rows, (old_BTNH, old_lse_BTN) = _cut((q_BTNH, rows, total), q0, q_size)
        out_BTNH, lse_BTN = attention(q, k, v, call.mask, **call.options(q_rows, k_rows))
        new_lse_BTN = jnp.logaddexp(old_lse_BTN, lse_BTN)
        old_part, part = (jnp.exp(x - new_lse_BTN)[..., None] for x in (old_lse_BTN, lse_BTN))
        return _put(total, (old_part * old_BTNH + part * out_BTNH, new_lse_BTN), q0)

    return _over_tiles(tile, total, rows, keys, call)


def _absorb_gradient(dq_BTNH: jax.Array, queries: tuple, rows: Rows, keys: Keys, call: _Call):
    """Returns dq_BTNH with what one block of keys adds to it, and the block's own gradient."""

    def tile(q0, q_size, k0, k_size, sums):
        k, v, k_rows = _unpacked(_cut(keys, k0, k_size))
        (q, given, cotangents), q_rows = _cut((queries, rows), q0, q_size)
        options = call.options(q_rows, k_rows)
        _, pull = jax.vjp(lambda *qkv: attention(*qkv, call.mask, given=given, **options), q, k, v)
        dq, dk, dv = pull(cotangents)
        old_dq, old_dkv = _cut(sums[0], q0, q_size), _cut(sums[1], k0, k_size)
        dkv = jnp.concatenate([dk, dv], axis=2)
        return _put(sums[0], old_dq + dq, q0), _put(sums[1], old_dkv + dkv, k0)

    start = jnp.zeros(keys.kv_BSJH.shape, F32)
    return _over_tiles(tile, (dq_BTNH, start), rows, keys, call)


def _unpacked(keys: Keys) -> tuple[jax.Array, jax.Array, Rows]:
    return *jnp.split(keys.kv_BSJH, 2, axis=2), Rows(*jnp.split(keys.rows_RS, 2))


def _over_tiles(tile, carry, rows: Rows, keys: Keys, call: _Call):
    """Calls `tile(q start, q size, k start, k size, carry)` for the tiles that the mask leaves.

    Which those are is found from positions and segment ids when the program runs: which block of
    keys a device holds in a hop is not known to the program.
    """
    plan = call.plan
    stretch = plan.length // plan.ring // plan.parts
    q_size, k_size = _piece(stretch), _piece(stretch // plan.streams)
    k_rows = Rows(*jnp.split(keys.rows_RS, 2))
    needed_PP = _may_see(call.mask, _extent(rows, q_size), _extent(k_rows, k_size))
    columns = needed_PP.shape[1]
    tiles = jnp.nonzero(needed_PP.ravel(), size=needed_PP.size)[0]

    def body(i, carry):
        row, column = tiles[i] // columns, tiles[i] % columns
        return tile(row * q_size, q_size, column * k_size, k_size, carry)

    return lax.fori_loop(0, needed_PP.sum(), body, carry)


def _piece(stretch: int) -> int:
    """The rows of equal pieces of a stretch, near PIECE."""
    most = -(-stretch // PIECE)
    return stretch // max(count for count in range(1, most + 1) if stretch % count == 0)


class _Extent(NamedTuple):
    """The least and the greatest (segment, position) in each piece of each row, padding aside."""

    low_segment_BP: jax.Array
    low_position_BP: jax.Array
    high_segment_BP: jax.Array
    high_position_BP: jax.Array


def _extent(rows: Rows, size: int) -> _Extent:
    none = jnp.iinfo(jnp.int32).max
    positions, segments = (x.reshape(x.shape[0], -1, size) for x in rows)
    low = jnp.where(segments > 0, segments, none).min(-1)
    high = segments.max(-1)
    first = jnp.where(segments == low[..., None], positions, none).min(-1)
    last = jnp.where(segments == high[..., None], positions, -1).max(-1)
    return _Extent(low, first, high, last)


def _may_see(mask: Mask, q: _Extent, k: _Extent) -> jax.Array:
    """Returns needed_PP: whether a query of the piece may see a key of the piece, in any row.

    Exact where segment ids grow along the row, never False for a visible pair anywhere.
    """
    q = _Extent(*(x[:, :, None] for x in q))
    k = _Extent(*(x[:, None, :] for x in k))
    seen = (k.low_segment_BP <= q.high_segment_BP) & (k.high_segment_BP >= q.low_segment_BP)
    if mask.causal:
        touching = k.low_segment_BP == q.high_segment_BP
        seen &= ~(touching & (k.low_position_BP > q.high_position_BP))
    if mask.window is not None:
        touching = k.high_segment_BP == q.low_segment_BP
        seen &= ~(touching & (q.low_position_BP - k.high_position_BP >= mask.window))
    return seen.any(0)


def _cut(tree, start: jax.Array, size: int):
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), tree)


def _put(tree, update, start: jax.Array):
    return jax.tree.map(
        lambda x, u: lax.dynamic_update_slice_in_dim(x, u, start, axis=1), tree, update
    )
