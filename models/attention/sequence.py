"""Attention whose rows are spread over the `seq` mesh axis: moving heads and keys between devices.

Everything runs inside `jax.shard_map` on local rows. The strategy and the order of the columns are
`sequence_plan.py`'s to say; the arithmetic on one device is `dispatch.attention`'s. Positions and
segment ids travel with the keys, so that the mask never depends on where a block came from.

The ring has a gradient of its own: it keeps the local rows, the output and the log-sum-exp, and
sends keys round once more, so memory is O(length / devices). Partial results merge by log-sum-exp.

Shapes: B batch, T local rows, S rows of a block of keys, N query heads, K kv heads, J = 2 K, H head
dim, P pieces of local rows.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from models.attention.dispatch import attention, merge, target
from models.attention.mask import EMPTY_LSE, Mask
from models.attention.sequence_plan import SequencePlan, Sizes, sequence_plan
from models.config import ModelConfig
from sharding.hardware import chip_for
from sharding.rules import BATCH, SEQ

F32 = jnp.float32

# Rows of queries and of keys that are attended to, or skipped, at once. Small enough that a causal
# mask skips nearly half, large enough that a tile outweighs the reading and writing of its sums.
# The TPU kernels skip blocks themselves: 1,024 rows there take 31 us of v5e's memory for the sums
# beside 44 us of products (16 heads of 128), 8,192 rows 0.25 ms beside 2.8.
PIECE, KERNEL_PIECE = 1024, 8192


class Rows(NamedTuple):
    """Positions and segment ids of some columns."""

    positions_BT: jax.Array
    segments_BT: jax.Array


# (q_BTNH, k_BSKH, v_BSKH, rows of q, rows of k, **more) → (out_BTNH, lse_BTN) on one device.
Local = Callable[..., tuple[jax.Array, jax.Array]]


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
    what = f"{plan.strategy}, {plan.order} order ({plan.reason})"
    logging.info("attention over seq = %d: %s", plan.devices, what)


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

    spec, stacked_MBT = P(None, BATCH, SEQ), jnp.stack(list(batch.values()))
    move = jax.shard_map(move, in_specs=spec, out_specs=spec, check_vma=False)
    return dict(zip(batch, move(stacked_MBT), strict=True))


def sequence_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rows: Rows, mask: Mask,
    plan: SequencePlan, *, scale: float, softcap: float | None, backend: str,
) -> jax.Array:  # fmt: skip
    """Returns out_BTNH of local queries over the keys of all devices of the seq axis.

    `rows` are the local columns, in the order of `plan`. Under rematerialisation the names
    `attention_out` and `attention_lse` keep what the backward pass needs of the forward ring.

    Raises:
      UsageError: as `dispatch.attention`.
    """
    u = plan.head_devices
    stations = np.arange(plan.devices).reshape(plan.ring, u).tolist()
    moved = partial(lax.all_to_all, axis_name=SEQ, tiled=True, axis_index_groups=stations)

    def local(q_BTNH, k_BSKH, v_BSKH, q: Rows, k: Rows, **more):
        return attention(
            q_BTNH, k_BSKH, v_BSKH, mask,
            q_positions_BT=q.positions_BT, k_positions_BS=k.positions_BT,
            q_segments_BT=q.segments_BT, k_segments_BS=k.segments_BT,
            scale=scale, softcap=softcap, backend=backend, **more,
        )  # fmt: skip

    if u > 1:
        copies = u // math.gcd(k_BTKH.shape[2], u)  # the fewest that give every device a KV head
        k_BTKH, v_BTKH = (jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))
        q_BTNH, k_BTKH, v_BTKH = (
            moved(x, split_axis=2, concat_axis=1) for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        gathered = partial(lax.all_gather, axis_name=SEQ, axis=1, axis_index_groups=stations)
        rows = Rows(*(gathered(x, tiled=True) for x in rows))
    if plan.ring == 1:
        out_BTNH, _ = local(q_BTNH, k_BTKH, v_BTKH, rows, rows, rows_aligned=True, needs_lse=False)
    else:
        kv_BTJH = jnp.concatenate([k_BTKH, v_BTKH], axis=2)
        out_BTNH, _ = _ring(plan, mask, local)(q_BTNH, kv_BTJH, rows)
    return moved(out_BTNH, split_axis=1, concat_axis=2) if u > 1 else out_BTNH


# ---------------------------------------------------------------- the ring


def _ring(plan: SequencePlan, mask: Mask, local: Local):
    """Returns the function from (q_BTNH, kv_BTJH, rows) to (out_BTNH, lse_BTN) over all stations.

    A stream is a block of keys on its way round, as two arrays, kv_BSJH and (positions, segments)
    in one, because XLA keeps few transfers in flight.
    """
    passes = 0 if plan.strategy == "gather" else plan.hops(mask.window) - 1

    @jax.custom_vjp
    def ring(q_BTNH, kv_BTJH, rows: Rows):
        def compute(total, streams):
            for kv_BSJH, ids in streams:
                total = _absorb(total, q_BTNH, rows, kv_BSJH, _rows(ids), plan, mask, local)
            return total

        def hop(carry, _):
            streams, total = carry
            coming = _sent(streams, plan)  # under way while this hop computes
            return (coming, compute(total, streams)), None

        zero = jnp.zeros(q_BTNH.shape, F32), jnp.full(q_BTNH.shape[:3], EMPTY_LSE, F32)
        carry, _ = lax.scan(hop, (_streams(kv_BTJH, rows, plan), zero), length=passes)
        out_BTNH, lse_BTN = compute(carry[1], carry[0])
        return out_BTNH.astype(q_BTNH.dtype), lse_BTN

    def forward(q_BTNH, kv_BTJH, rows: Rows):
        out_BTNH, lse_BTN = ring(q_BTNH, kv_BTJH, rows)
        out_BTNH = checkpoint_name(out_BTNH, "attention_out")
        lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
        return (out_BTNH, lse_BTN), (q_BTNH, kv_BTJH, rows, (out_BTNH, lse_BTN))

    def backward(saved, cotangents):
        q_BTNH, kv_BTJH, rows, given = saved

        def compute(dq_BTNH, streams):
            own = []
            for kv_BSJH, ids in streams:
                start = dq_BTNH, jnp.zeros(kv_BSJH.shape, F32)
                dq_BTNH, dkv_BSJH = _absorb_gradient(
                    start, (q_BTNH, given, cotangents), rows, kv_BSJH, _rows(ids), plan, mask, local
                )
                own.append(dkv_BSJH)
            return dq_BTNH, own

        def hop(carry, _):
            streams, sums, dq_BTNH = carry
            # The sums of a block follow it a hop later, so nothing that travels waits for the work.
            coming, arriving = _sent(streams, plan), _sent(sums, plan)
            dq_BTNH, own = compute(dq_BTNH, streams)
            return (coming, jax.tree.map(jnp.add, arriving, own), dq_BTNH), None

        streams = _streams(kv_BTJH, rows, plan)
        sums = [jnp.zeros(kv_BSJH.shape, F32) for kv_BSJH, _ in streams]
        carry = (streams, sums, jnp.zeros(q_BTNH.shape, F32))
        (streams, sums, dq_BTNH), _ = lax.scan(hop, carry, length=passes)
        arriving = _sent(sums, plan) if passes else sums
        dq_BTNH, own = compute(dq_BTNH, streams)
        own = jax.tree.map(jnp.add, arriving, own)
        dkv_BTJH = _home(own, passes, plan)
        return dq_BTNH.astype(q_BTNH.dtype), dkv_BTJH.astype(kv_BTJH.dtype), None

    ring.defvjp(forward, backward)
    return ring


def _streams(kv_BTJH: jax.Array, rows: Rows, plan: SequencePlan) -> list:
    """The blocks that set out from here: all keys of the axis, the local ones, or halves of them.

    Halves are taken from each stretch of columns, so that both directions have the same work.
    """
    keys = kv_BTJH, jnp.concatenate(rows)
    if plan.strategy == "gather":
        return [jax.tree.map(lambda x: lax.all_gather(x, SEQ, axis=1, tiled=True), keys)]
    if plan.streams == 1:
        return [keys]

    def half(x, i):
        B, T, *rest = x.shape
        return x.reshape(B, plan.parts, 2, -1, *rest)[:, :, i].reshape(B, T // 2, *rest)

    return [jax.tree.map(partial(half, i=i), keys) for i in range(2)]


def _rows(ids: jax.Array) -> Rows:
    return Rows(*jnp.split(ids, 2))


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

    def send(x, step):
        n = plan.devices
        return lax.ppermute(x, SEQ, [(i, (i + step * plan.head_devices) % n) for i in range(n)])

    steps = (stations, -stations)[: len(streams)]
    return [jax.tree.map(partial(send, step=s), x) for x, s in zip(streams, steps, strict=True)]


# ---------------------------------------------------------------- one block of keys


def _absorb(total, q_BTNH, rows: Rows, kv_BSJH, k_rows: Rows, plan, mask: Mask, local: Local):
    """Merges attention to one block of keys into total, (out_BTNH float32, lse_BTN)."""

    def tile(total, q0, q_size, k0, k_size):
        q, q_ids, old = _cut((q_BTNH, rows, total), q0, q_size)
        kv, k_ids = _cut((kv_BSJH, k_rows), k0, k_size)
        return _put(total, merge(old, local(q, *jnp.split(kv, 2, axis=2), q_ids, k_ids)), q0)

    return _over_tiles(tile, total, rows, k_rows, plan, mask)


def _absorb_gradient(sums, queries, rows: Rows, kv_BSJH, k_rows: Rows, plan, mask, local: Local):
    """Adds the gradients by one block of keys to sums, (dq_BTNH, dkv_BSJH), both float32.

    queries: q_BTNH, (out, lse) over all keys, and their cotangents.
    """

    def tile(sums, q0, q_size, k0, k_size):
        (q, given, cotangents), q_ids = _cut((queries, rows), q0, q_size)
        kv, k_ids = _cut((kv_BSJH, k_rows), k0, k_size)

        def part(q, kv):
            return local(q, *jnp.split(kv, 2, axis=2), q_ids, k_ids, given=given)

        dq, dkv = jax.vjp(part, q, kv)[1](cotangents)
        dq_BTNH = _put(sums[0], _cut(sums[0], q0, q_size) + dq, q0)
        return dq_BTNH, _put(sums[1], _cut(sums[1], k0, k_size) + dkv, k0)

    return _over_tiles(tile, sums, rows, k_rows, plan, mask)


def _over_tiles(tile, carry, q: Rows, k: Rows, plan: SequencePlan, mask: Mask):
    """Calls `tile(carry, q start, q size, k start, k size)` for the tiles that the mask leaves.

    Which those are is found from positions and segment ids when the program runs: which block of
    keys a device holds in a hop is not known to the program.
    """
    stretch = plan.length // plan.ring // plan.parts
    q_size, k_size = _piece(stretch), _piece(stretch // plan.streams)
    needed_PP = _may_see(mask, _extent(q, q_size), _extent(k, k_size))
    tiles = jnp.nonzero(needed_PP.ravel(), size=needed_PP.size)[0]

    def body(i, carry):
        row, column = tiles[i] // needed_PP.shape[1], tiles[i] % needed_PP.shape[1]
        return tile(carry, row * q_size, q_size, column * k_size, k_size)

    return lax.fori_loop(0, needed_PP.sum(), body, carry)


def _piece(stretch: int) -> int:
    """The rows of equal pieces of a stretch, as large as they may be."""
    most = -(-stretch // (KERNEL_PIECE if target()[0] == "tpu" else PIECE))
    return stretch // max(count for count in range(1, most + 1) if stretch % count == 0)


def _extent(rows: Rows, size: int) -> tuple[jax.Array, ...]:
    """The least and the greatest (segment, position) of each piece of each row, padding aside.

    Returns low segment, its first position, high segment and its last position, each (B, P).
    """
    none = jnp.iinfo(jnp.int32).max
    positions, segments = (x.reshape(x.shape[0], -1, size) for x in rows)
    low, high = jnp.where(segments > 0, segments, none).min(-1), segments.max(-1)
    first = jnp.where(segments == low[..., None], positions, none).min(-1)
    last = jnp.where(segments == high[..., None], positions, -1).max(-1)
    return low, first, high, last


def _may_see(mask: Mask, q: tuple[jax.Array, ...], k: tuple[jax.Array, ...]) -> jax.Array:
    """Returns needed_PP: whether a query of the piece may see a key of the piece, in any row.

    Exact where segment ids grow along the row, never False for a visible pair anywhere.
    """
    q_low, q_first, q_high, q_last = (x[:, :, None] for x in q)
    k_low, k_first, k_high, k_last = (x[:, None, :] for x in k)
    seen_BPP = (k_low <= q_high) & (k_high >= q_low)
    if mask.causal:
        seen_BPP &= (k_low != q_high) | (k_first <= q_last)
    if mask.window is not None:
        seen_BPP &= (k_high != q_low) | (q_first - k_last < mask.window)
    return seen_BPP.any(0)


def _cut(tree, start: jax.Array, size: int):
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), tree)


def _put(tree, new, start: jax.Array):
    put = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    return jax.tree.map(put, tree, new)
