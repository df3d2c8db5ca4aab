"""The trainer's side of snapshots: when one is due, and how it gets off the devices into slots.

The copy to the host is dispatched right after a step, before the next one, which may then reuse
(be given) the buffers that are being copied. A thread waits for the copy, moves it into shared
memory and tells the keeper. The loop waits for nothing but the dispatch.

Every part of an array is written once: by one of the hosts that hold it, or, where two hosts or
more hold every part, once by each host, so that they back each other up without a code.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from checkpoint.fingerprint import box_program, box_sums
from checkpoint.memory import restore
from checkpoint.memory.rounds import furthest
from checkpoint.memory.slots import HEADER, Slots, round_up
from checkpoint.memory.wire import Directory, Refused
from checkpoint.tree import flatten
from sharding.errors import UsageError

Tree = Any

_ALIGNED = 64
_PIECE_TEXT = 200  # bytes of the index for a piece, and its name besides
_SPARE_TEXT = 2**16  # and for what changes from step to step
_SIZE_TEXT = 40  # bytes of the index for the size of an array, and its name besides
# Sums in flight. XLA:CPU lets 32 programs per device be in flight: with all 32 taken by sums, a
# training step on that device cannot start, and the sums wait for that step. A deadlock.
_SUMS = 4
_PATIENCE = 20.0  # seconds for the keeper to be there
_ANEW = 5.0  # seconds without news after which it is told again that we are ready
_GONE = 1.0  # and if its memory is gone


class _Piece(NamedTuple):
    name: str
    device: jax.Device
    start: tuple[int, ...]  # index of its first element in the array
    shape: tuple[int, ...]
    offset: int  # in the slot
    size: int  # bytes


class Snapshots:
    """The snapshots of one process of a run; does nothing without a keeper."""

    def __init__(self, every: int) -> None:
        """every: steps between snapshots; 0 takes none."""
        self._directory = Directory.of_environment() if every else None
        self._every = every
        self._slots: Slots | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._ready: Future[None] | None = None
        self._drain: Future[None] | None = None
        self._step = self._tried = -1  # where the loop is, and the step last asked for
        self._told = 0.0
        self._path = ""  # of the slots, as long as their keeper lives

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def restore_newest(
        self,
        abstract: Tree,
        disk: int | None,
        given_up: Callable[[int, dict[str, Any]], bool] = lambda step, meta: False,
    ) -> restore.Snapshot | None:
        """Returns the newest snapshot that is intact and wanted (see `restore`), or None."""
        if self._directory is None:
            return None
        return restore.restore_newest(self._directory, abstract, disk, given_up)

    def start(self, step: int, state: Tree, *, held: bool) -> None:
        """Makes room for snapshots of `state`; `held`: step `step` is in memory already.

        Every process of the run must call this.

        Raises:
          UsageError: the memory of the host does not suffice.
        """
        if self._directory is None:
            return
        if not self._directory.takes:  # hosts are missing: the keepers only give back
            if jax.process_index() == 0:
                self._release()
            return
        rank = jax.process_index()
        self._pieces, self._coded = _plan(state, self._directory)
        self._arrays = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in flatten(state).items()
        }
        names = sum(len(piece.name) + _PIECE_TEXT for piece in self._pieces)
        names += sum(len(name) + _SIZE_TEXT for name in self._arrays)  # also those of the others
        pages = round_up(_end(self._pieces) + names + _SPARE_TEXT) // round_up(1)
        mine = np.asarray([pages, time.time_ns() % 2**31], np.int32)
        told = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2)
        self._ask_for = {
            "rank": rank, "every": self._every, "coded": self._coded,
            "sizes": [int(count) * round_up(1) for count in told[:, 0]],
            "run": f"{told[0, 1]}", "committed": step if held else -1,
        }  # fmt: skip
        self._step = step
        self._ready = self._worker.submit(self._prepare)  # while the step is compiled
        try:
            self._reserve()
        except OSError as error:
            logging.warning("snapshots: the keeper does not answer: %s", error)

    def due(self, step: int) -> bool:
        """Whether to take a snapshot of the state after `step` updates; for every step, cheap."""
        self._step = step
        if self._ready is None or not self._ready.done():
            return False
        self._ready.result()
        idle = self._drain is None or self._drain.done()
        if idle and self._drain is not None:
            self._drain.result()  # what went wrong there is told here
        wanted = self._slots.next if self._slots is not None else -1
        # A step that is further ahead than the rounds name any is a mistake, and no news.
        if wanted <= self._tried or wanted > step + furthest(self._every):
            patience = _ANEW if os.path.exists(self._path) else _GONE
            if idle and time.monotonic() - self._told > patience:
                self._drain = self._worker.submit(self._begin_anew)
            return False
        if step < wanted:
            return False
        self._tried = wanted
        if idle and (step == wanted or jax.process_count() == 1):
            return True
        self._worker.submit(self._tell, "missed", wanted)
        return False

    def take(self, step: int, state: Tree, meta: Callable[[], dict[str, Any]]) -> None:
        """Starts to copy `state`, whose buffers may be donated at once, and `meta` (JSON).

        meta: called in the thread, once the step is done.
        """
        parts = {
            (name, shard.device): shard.data
            for name, leaf in flatten(state).items()
            for shard in leaf.addressable_shards
        }
        parts = [parts[piece.name, piece.device] for piece in self._pieces]
        there = [part.sharding.with_memory_kind("pinned_host") for part in parts]
        copies = jax.device_put(parts, there)
        self._drain = self._worker.submit(self._write, step, copies, meta)

    # ------------------------------------------------------------ in the thread

    def _prepare(self) -> None:
        for piece in self._pieces:
            array = self._arrays[piece.name]
            box_program(piece.shape, array.dtype, array.shape)

    def _write(
        self, step: int, copies: list[jax.Array], meta: Callable[[], dict[str, Any]]
    ) -> None:
        slots, described, sums = self._slots, [], []
        slot = slots.begin(step)
        for piece, copy in zip(self._pieces, copies, strict=True):
            part = np.ascontiguousarray(copy)
            if len(sums) >= _SUMS:
                sums[-_SUMS].block_until_ready()
            # Summed while it is copied.
            sums.append(box_sums(part, piece.start, self._arrays[piece.name].shape))
            slots.put(slot, piece.offset, memoryview(part.reshape(-1).view(np.uint8)))
            described.append([piece.name, part.dtype.name, piece.start, piece.shape, piece.offset])
        pieces = [[*d, np.asarray(s).tolist()] for d, s in zip(described, sums, strict=True)]
        sizes = {name: array.size for name, array in self._arrays.items()}
        index = {"meta": meta(), "sizes": sizes, "pieces": pieces}
        try:
            slots.commit(slot, step, _end(self._pieces), index)
        except ValueError as error:  # what changes from step to step has grown too large
            logging.log_every_n_seconds(logging.WARNING, "snapshots: step %d: %s", 60, step, error)
            self._tell("missed", step)
            return
        self._tell("written", step)

    def _tell(self, event: str, step: int) -> None:
        """Tells the keeper what happened; one that does not answer is asked for room anew later."""
        message = {"op": "report", "event": event, "step": step, "at": self._step}
        message |= {"run": self._ask_for["run"], "ranks": [self._ask_for["rank"]]}
        self._told = time.monotonic()
        try:
            self._directory.ask(self._directory.host, message)
        except (OSError, Refused) as error:
            self._told = 0.0
            logging.warning("snapshots: step %d does not count: %s", step, error)

    def _reserve(self) -> None:
        host = self._directory.host
        try:
            answer = self._directory.ask(host, {"op": "reserve", **self._ask_for}, _PATIENCE)
        except Refused as error:
            raise UsageError(str(error)) from error
        self._path = answer["path"]
        self._slots = Slots.attach(self._path)
        self._tell("ready", self._ask_for["committed"])

    def _release(self) -> None:
        """Has the keepers give back what was computed for lost hosts and is on the devices now."""
        for host in range(self._directory.hosts):
            with contextlib.suppress(OSError, Refused):  # a lost host has nothing to give back
                self._directory.ask(host, {"op": "release"})

    def _begin_anew(self) -> None:
        """For a keeper that was replaced, and for news that were lost."""
        self._told = time.monotonic()
        if self._slots is not None:
            self._ask_for["committed"] = self._slots.committed
        try:
            self._reserve()
        except (OSError, UsageError) as error:
            logging.warning("snapshots: none are taken: %s", error)


def _plan(state: Tree, directory: Directory) -> tuple[list[_Piece], bool]:
    """Returns what this process writes, and whether a code is needed to survive a lost host."""

    def host(device: jax.Device) -> int:
        return device.process_index // directory.processes

    arrays = flatten(state)
    boxes = [(name, box) for name, leaf in arrays.items() for box in _boxes(leaf).items()]
    alone = any(len({host(device) for device in devices}) < 2 for _, (_, devices) in boxes)
    pieces, offset, me = [], HEADER, jax.process_index()
    for number, (name, (start, devices)) in enumerate(boxes):
        here = [d for d in devices if alone or host(d) == directory.host]
        owners = sorted({device.process_index for device in here})
        if not owners or owners[number % len(owners)] != me:
            continue
        device = min((d for d in here if d.process_index == me), key=lambda d: d.id)
        leaf = arrays[name]
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(shape) * leaf.dtype.itemsize
        pieces.append(_Piece(name, device, start, shape, offset, size))
        offset += -(-size // _ALIGNED) * _ALIGNED
    return pieces, alone and directory.hosts > 1


def _boxes(leaf: jax.Array) -> dict[tuple[int, ...], list[jax.Device]]:
    """Returns where each part of an array begins, and the devices of all hosts that hold it."""
    found: dict[tuple[int, ...], list[jax.Device]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        found.setdefault(tuple(s.start or 0 for s in index), []).append(device)
    return found


def _end(pieces: list[_Piece]) -> int:
    return pieces[-1].offset + pieces[-1].size if pieces else HEADER
