"""Brings a snapshot back from the memory of the hosts, onto any mesh.

The first process asks all keepers what they hold and tells the others, so that all agree. A host
that came back with empty memory has it computed from the others, or is done without where they hold
the same parts. Then every process fetches the pieces that its devices need: from its own host's
memory, else from another keeper.
"""

import functools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from checkpoint.agreement import first
from checkpoint.fingerprint import as_text, fingerprints, sums_text
from checkpoint.memory.slots import Slots
from checkpoint.memory.wire import Directory, Message, Refused
from checkpoint.steps import listing
from checkpoint.tree import flatten

Tree = Any


class Snapshot(NamedTuple):
    """A state from memory. `source`: "memory", or how a lost host's was had: "peer", "parity"."""

    step: int
    state: Tree
    meta: dict[str, Any]
    source: str
    same_layout: bool  # what the keepers hold of it can stay as it is


class _Piece(NamedTuple):
    """One part of an array, and where it is."""

    host: int
    rank: int
    dtype: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    sums: tuple[int, int]  # what it adds to the fingerprint of the array


class _Unusable(RuntimeError):
    """Why a snapshot cannot be restored."""


def restore_newest(
    directory: Directory,
    abstract: Tree,
    disk: int | None,
    given_up: Callable[[int, dict[str, Any]], bool],
) -> Snapshot | None:
    """Returns the newest snapshot that is whole and has the bits that were written, or None.

    Every process of the run must call this; all return the same.

    Args:
      abstract: nested dict of jax.ShapeDtypeStruct with shardings.
      disk: only a snapshot of this step or a newer one is wanted.
      given_up: told step and meta; whether the run has gone back past the snapshot.
    """
    survey = _Survey(directory) if jax.process_index() == 0 else None  # `first` asks there alone
    for step in first(lambda: [s for s in survey.steps() if disk is None or s >= disk]):
        plan = first(lambda step=step: survey.plan(step))
        if "meta" in plan and given_up(step, plan["meta"]):
            continue
        found, problem = None, plan.get("problem", "")
        if not problem:
            try:
                pieces = _pieces(plan, directory.host)
                found = _load(directory, step, pieces, abstract)
            except Exception as error:  # all must hear of it: they wait in `_first_text`
                problem = _reason(error)
            problem = _first_text(problem)
        if not problem:
            problem = _verify(found, pieces)
        if not problem:
            return Snapshot(step, found, plan["meta"], plan["source"], plan["same_layout"])
        logging.warning("snapshots: step %d in memory cannot be used: %s", step, problem)
    return None


class _Survey:
    """What all keepers hold, as the first process sees it."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._hosts: dict[int, dict[str, Any]] = {}
        for host in range(directory.hosts):
            try:
                self._hosts[host] = directory.ask(host, {"op": "survey"}, 2.0)
            except (OSError, ValueError, Refused) as error:
                logging.warning("snapshots: the keeper of host %d does not answer: %s", host, error)
        self._sizes = next((f["sizes"] for f in self._hosts.values() if f["sizes"]), [])

    def steps(self) -> list[int]:
        """Returns the steps of which anything is held, newest first."""
        held = (rank["steps"] for facts in self._hosts.values() for rank in facts["ranks"].values())
        return sorted({step for steps in held for step in steps}, reverse=True)

    def plan(self, step: int) -> dict[str, Any]:
        """Returns where the pieces of `step` are, or a `problem`."""
        try:
            indexes, lost = self._indexes(step)
            source = "memory"
            if lost:
                source = "peer"
                try:
                    _check_whole(indexes)
                except _Unusable as error:
                    source = "parity"
                    if not self._coded(lost, step):
                        raise _Unusable(f"lost with hosts {listing(map(str, lost))}") from error
                    indexes |= self._rebuild(lost[0], step)
            _check_whole(indexes)
        except Exception as error:  # the other processes wait for what this one says
            return {"problem": _reason(error)}
        pieces = [
            (host, rank, *piece) for (host, rank), i in indexes.items() for piece in i["pieces"]
        ]
        meta = next(iter(indexes.values()))["meta"]
        whole = len(indexes) == len(self._sizes) == jax.process_count()
        return {"pieces": pieces, "meta": meta, "source": source, "same_layout": whole}

    def _indexes(self, step: int) -> tuple[dict, list[int]]:
        """Returns (host, rank) → index of all that hold `step`, and the hosts that do not."""
        found, lost = {}, []
        for host in range(len(self._sizes) // self._directory.processes):
            first = host * self._directory.processes
            ranks = range(first, first + self._directory.processes)
            try:
                own = {(host, rank): self._index(host, rank, step) for rank in ranks}
            except (OSError, Refused):
                lost.append(host)
                continue
            found |= own
        return found, lost

    def _coded(self, lost: list[int], step: int) -> bool:
        """Whether what the lost hosts held of `step` can be computed."""
        others = set(range(len(self._sizes) // self._directory.processes)) - set(lost)
        coded = (step in self._hosts.get(host, {}).get("parity", ()) for host in others)
        return len(lost) == 1 and bool(others) and all(coded)

    def _rebuild(self, owner: int, step: int) -> dict:
        """Has the keeper of a lost host, or the first one that answers, compute what it held."""
        here = owner if owner in self._hosts else min(self._hosts)
        ask = {"op": "rebuild", "owner": owner, "step": step, "sizes": self._sizes}
        with self._directory.connect(here) as connection:
            connection.ask(ask, progress=functools.partial(_tell_progress, owner))
        first = owner * self._directory.processes
        ranks = range(first, first + self._directory.processes)
        return {(here, rank): self._index(here, rank, step) for rank in ranks}

    def _index(self, host: int, rank: int, step: int) -> dict[str, Any]:
        return self._directory.ask(host, {"op": "index", "rank": rank, "step": step})["index"]


def _tell_progress(owner: int, message: Message) -> None:
    done, total = (message["progress"].get(name, 0) / 2**30 for name in ("done", "of"))
    text = "snapshots: computing what host %d held: %.1f of %.1f GiB"
    logging.log_every_n_seconds(logging.WARNING, text, 20, owner, done, total)


def _check_whole(indexes: dict) -> None:
    """Raises _Unusable unless every element of every array is in a piece."""
    have, sizes = {}, {}
    for index in indexes.values():
        sizes |= index["sizes"]
        for name, _, start, shape, *_ in index["pieces"]:
            have.setdefault(name, {})[tuple(start)] = math.prod(shape)
    short = [name for name, size in sizes.items() if sum(have.get(name, {}).values()) != size]
    if short or not sizes:
        raise _Unusable(f"parts are missing of {listing(short) or 'everything'}")


def _pieces(plan: dict, here: int) -> dict[str, list[_Piece]]:
    """Returns array → its parts, each once: the one that is `here` where several hosts have it."""
    found: dict[str, dict[tuple, _Piece]] = {}
    for host, rank, name, dtype, start, shape, offset, sums in plan["pieces"]:
        piece = _Piece(host, rank, dtype, tuple(start), tuple(shape), offset, tuple(sums))
        parts = found.setdefault(name, {})
        if host == here or piece.start not in parts:
            parts[piece.start] = piece
    return {name: list(parts.values()) for name, parts in found.items()}


def _load(directory: Directory, step: int, pieces: dict[str, list[_Piece]], abstract: Tree) -> Tree:
    """Returns the state on the devices. Raises OSError, Refused, _Unusable."""
    reader = _Reader(directory, step)
    wanted = flatten(abstract)
    if pieces.keys() != wanted.keys():
        raise _Unusable(f"it holds other arrays: {listing(pieces.keys() ^ wanted.keys())}")

    def placed_array(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        parts = pieces[name]
        if jnp.dtype(parts[0].dtype) != leaf.dtype:
            raise _Unusable(f"`{name}` is {parts[0].dtype}, wanted {leaf.dtype}")
        whole = {}
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        shape = leaf.sharding.shard_shape(leaf.shape)
        placed = []
        for device, index in indices.items():
            start = tuple(s.start or 0 for s in index)
            if start not in whole:
                whole[start] = reader.box(parts, start, shape)
            # A copy: the box may be the keeper's memory itself, which later steps are written to.
            placed.append(jax.device_put(whole[start], device, may_alias=False))
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)

    with ThreadPoolExecutor() as pool:  # copies take all cores of the host
        arrays = list(pool.map(placed_array, wanted, wanted.values()))
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _verify(state: Tree, pieces: dict[str, list[_Piece]]) -> str:
    """Compares the fingerprints of the arrays with what was written; returns a problem."""
    found = as_text(fingerprints(state), list(flatten(state)))
    sums = {name: np.asarray([p.sums for p in parts], np.uint32) for name, parts in pieces.items()}
    wrong = [n for n, s in sums.items() if sums_text(s.sum(axis=0, dtype=np.uint32)) != found[n]]
    return f"arrays are not the bits that were written: {listing(wrong)}" if wrong else ""


class _Reader:
    """Reads pieces of one step: those of this host where they lie, others through their keeper."""

    def __init__(self, directory: Directory, step: int) -> None:
        self._directory, self._step = directory, step
        self._near: dict[int, memoryview] = {}
        self._read: dict[tuple[int, int], np.ndarray] = {}
        for rank, facts in directory.ask(directory.host, {"op": "survey"}, 2.0)["ranks"].items():
            slots = Slots.attach(facts["path"])
            slot = slots.held().get(step)
            if slot is not None:
                self._near[int(rank)] = slots.data(slot)

    def piece(self, piece: _Piece) -> np.ndarray:
        """Returns a piece, read once. Raises OSError, Refused."""
        key = piece.rank, piece.offset
        if key not in self._read:
            count = math.prod(piece.shape) * jnp.dtype(piece.dtype).itemsize
            if piece.host == self._directory.host and piece.rank in self._near:
                content = self._near[piece.rank][piece.offset : piece.offset + count]
            else:
                ask = {"op": "read", "rank": piece.rank, "step": self._step}
                with self._directory.connect(piece.host) as connection:
                    ask |= {"start": piece.offset, "count": count}
                    content = connection.take(connection.ask(ask)[1])
            self._read[key] = np.frombuffer(content, jnp.dtype(piece.dtype)).reshape(piece.shape)
        return self._read[key]

    def box(
        self, pieces: Iterable[_Piece], start: tuple[int, ...], shape: tuple[int, ...]
    ) -> np.ndarray:
        """Returns a box of an array: the piece that is all of it, or copied out of several."""
        content = None
        for piece in pieces:
            if (piece.start, piece.shape) == (start, shape):
                return self.piece(piece)
            low = [max(a, b) for a, b in zip(start, piece.start, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(start, shape, piece.start, piece.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            if content is None:
                content = np.empty(shape, jnp.dtype(piece.dtype))
            into = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            out = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, piece.start, strict=True))
            content[into] = self.piece(piece)[out]
        return content


def _first_text(problem: str) -> str:
    """Returns the problem of the first process that has one, in all processes."""
    if jax.process_count() == 1:
        return problem
    text = np.frombuffer(problem.encode()[:200].ljust(200), np.uint8)
    told = np.asarray(multihost_utils.process_allgather(text))
    texts = (bytes(row).decode(errors="replace").strip() for row in told)  # perhaps cut in a letter
    return next(filter(None, texts), "")


def _reason(error: Exception) -> str:
    """Returns what is wrong, never empty; a mistake of ours with its type."""
    known = isinstance(error, _Unusable | OSError | Refused)
    return (str(error) if known else "") or f"{type(error).__name__}: {error}"
