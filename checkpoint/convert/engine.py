"""Plans a conversion from names, shapes and dtypes alone, then runs it within a bound of memory.

The plan refuses everything that can be refused before a byte is written. Threads read, transform
and write at once, as many bytes as the bound allows. The output is made in a folder beside the
target, read back, and renamed: it appears whole or not at all, and what a killed conversion left
behind is cleared by the next one.
"""

import fcntl
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from xxhash import xxh3_64_digest

from checkpoint.convert.families import Family
from checkpoint.convert.mapping import BLOCK, Element, Row, build, to_ours, to_theirs
from checkpoint.fingerprint import rows_sums
from checkpoint.inflight import MEMORY, InFlight, Job
from checkpoint.steps import CheckpointError, reason
from models.config import ModelConfig
from sharding.errors import MismatchError, UsageError

STAGING = ".converting"  # added to the target's name while it is being made
_FORCE_EVERY = 0.5  # seconds
FLOATS = {str(np.dtype(d)): np.dtype(d)
          for d in (np.float32, np.float16, ml_dtypes.bfloat16)}  # fmt: skip

Facts = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name → dtype, shape


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do: what is made of what, and what the target then holds."""

    family: Family
    model: ModelConfig
    rows: tuple[Row, ...]
    elements: tuple[Element, ...]
    names: dict[str, str]  # name in the table → name in the source
    copies: tuple[tuple[str, str], ...]  # names in the source whose tensors must be equal
    buffers: tuple[str, ...]  # read by nobody
    source: Facts
    target: Facts
    overflows: Counter = field(default_factory=Counter)  # name → values made infinite; by `run`

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.target.values())

    @property
    def casts(self) -> dict[str, str]:
        """Target names whose dtype changes → "float32 → bfloat16"."""
        found = {}
        for element in self.elements:
            was, now = self.source_dtype(element), self.target[element.name][0]
            if was != now:
                found[element.name] = f"{was} → {now}"
        return found

    def source_dtype(self, element: Element) -> np.dtype:
        return self.source[self.names[element.pieces[0].name]][0]


def plan_to_ours(family: Family, model: ModelConfig, source: Facts, dtype: str | None) -> Plan:
    """Plans parameters of ours from tensors of theirs.

    Raises:
      MismatchError: a tensor is missing, left over, or of the wrong shape or dtype.
    """
    rows, sizes = family.rows_for(model), family.sizes(model)
    wanted = sum(math.prod(sizes.true[x] for x in r.theirs.placeholders) for r in rows)
    if wanted > len(source):
        raise MismatchError(f"{wanted} tensors are needed, the source holds {len(source)}")
    shapes = {e.name: e.shape for row in rows for e in to_theirs(row, sizes)}
    bare = not any(name.startswith(family.prefix) for name in source)
    names = {name: family.bare(name) if bare else name for name in shapes}
    copies, left = [], set(source) - set(names.values())
    if tied := family.tied_name(model):
        copy, original = tied
        for name in left & {copy, family.prefix + copy}:
            copies.append((name, names[original]))
    buffers = {name for name in left if family.is_buffer(name)}
    left -= buffers | {copy for copy, _ in copies}
    if left:
        raise MismatchError(
            f"the source holds `{min(left)}`, which the {family.model_type} table does not read"
        )
    _check_shapes({names[name]: shape for name, shape in shapes.items()}, source)
    elements = tuple(e for row in rows for e in to_ours(row, sizes))
    full = {o.name: o.shape(sizes.ours) for row in rows for o in row.ours}
    return _plan(family, model, rows, elements, names, copies, buffers, source, full, dtype)


def plan_to_theirs(family: Family, model: ModelConfig, source: Facts, dtype: str | None) -> Plan:
    """Plans tensors of theirs from parameters of ours; raises MismatchError as `plan_to_ours`."""
    rows, sizes = family.rows_for(model), family.sizes(model)
    shapes = {o.name: o.shape(sizes.ours) for row in rows for o in row.ours}
    if left := set(source) - set(shapes):
        raise MismatchError(f"the source holds `{min(left)}`, which the model does not have")
    _check_shapes(shapes, source)
    elements = tuple(e for row in rows for e in to_theirs(row, sizes))
    names = {name: name for name in shapes}
    full = {e.name: e.shape for e in elements}
    return _plan(family, model, rows, elements, names, [], set(), source, full, dtype)


def of_moments(plan: Plan) -> Plan:
    """Returns the plan for moments of Adam: the same moves, but nothing is added to them."""
    return replace(plan, elements=tuple(replace(e, offset=0.0) for e in plan.elements))


def _check_shapes(wanted: dict[str, tuple[int, ...]], source: Facts) -> None:
    for name, shape in wanted.items():
        if name not in source:
            raise MismatchError(f"the source lacks `{name}` {list(shape)}")
        dtype, found = source[name]
        if found != shape:
            raise MismatchError(
                f"`{name}` has shape {list(found)}; by the config it should be {list(shape)}"
            )
        if str(dtype) not in FLOATS:
            raise MismatchError(f"`{name}` is {dtype}; only {', '.join(FLOATS)} are read")


def _plan(family, model, rows, elements, names, copies, buffers, source, full, dtype) -> Plan:
    target: Facts = {}
    for element in elements:
        kinds = {p.name: source[names[p.name]][0] for p in element.pieces}
        kind = FLOATS[dtype] if dtype else next(iter(kinds.values()))
        known = target.setdefault(element.name, (kind, full[element.name]))[0]
        other = [name for name, found in kinds.items() if not dtype and found != known]
        if other:
            raise MismatchError(
                f"`{names[other[0]]}` is {kinds[other[0]]}, what goes with it into "
                f"`{element.name}` is {known}; name one with --dtype"
            )
    return Plan(family, model, rows, elements, names, tuple(copies), tuple(sorted(buffers)),
                source, target)  # fmt: skip


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Renamed:
    """Reads tensors under other names; `names` gives those that they have in `tensors`."""

    tensors: Any
    names: dict[str, str]

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        return self.tensors.read(self.names[name], lead, start, stop)


@dataclass(frozen=True)
class Moved:
    """What a conversion did: sums of the fingerprints asked for, and its most bytes at once."""

    sums: dict[str, np.ndarray]
    in_flight: int


def memory_limit(plan: Plan, wanted: int | None) -> int:
    """Returns how many bytes `run` may hold: `wanted`, or what the largest tensor needs and MEMORY.

    Raises:
      UsageError: `wanted` is less than the largest tensor needs.
    """
    needed = max(_held(plan, part) for e in plan.elements for part in _split(plan, e, 1))
    if wanted is not None and wanted < needed:
        raise UsageError(
            f"--max-memory {wanted / 2**20:g}: the largest tensor needs {-(-needed // 2**20)} MiB"
        )
    return wanted or needed + MEMORY


def _held(plan: Plan, part: Element) -> int:
    """What building a part holds: itself, a block of its source and the storage's copy of that."""
    nbytes = math.prod(part.shape) * plan.target[part.name][0].itemsize
    return nbytes + 2 * min(nbytes, BLOCK)


def _split(plan: Plan, element: Element, together: int) -> Iterator[Element]:
    """Yields parts of about BLOCK bytes whose rows are multiples of `together`, if it can be."""
    row = math.prod(element.shape[1:]) * plan.target[element.name][0].itemsize
    return element.split(max(1, BLOCK // max(1, row) // together) * together)


def run(
    plan: Plan,
    source: Any,
    target: Any,
    advance: Callable[[int], None],
    memory: int | None = None,
    *,
    fingerprints: bool = False,
    far: bool = False,
) -> Moved:
    """Makes every tensor of the target and reads it back; `advance` is told bytes, each twice.

    Args:
      source: reads by `read` (mapping.Tensors); must bear several threads, as must the target.
      target: reads likewise; takes whole elements by put(name, lead, array). One that also takes
        rows, put(name, lead, array, start), says by part_rows(name, lead) how many at least.
      memory: bytes that may be in flight, as `memory_limit` has it.
      fingerprints: sum up those of the target's tensors.
      far: the source is asked over a network.

    Raises:
      UsageError: `memory` is too little.
      MismatchError: a tensor that repeats another one differs from it.
      CheckpointError: what was read back is not what was written.
    """
    crew = InFlight(memory_limit(plan, memory), far=far)
    crew.run(_comparing(plan, source))
    sums: dict[str, np.ndarray] = {}
    adding = threading.Lock()
    made: list[tuple[Element, int, int, int, bytes]] = []
    renamed = Renamed(source, plan.names)

    def overflowed(name: str, count: int) -> None:
        with adding:
            plan.overflows[name] += count

    def make(part: Element) -> Job:
        dtype, shape = plan.target[part.name]
        array = build(part, renamed, dtype, partial(overflowed, part.name))
        for start, stop, nbytes in _blocks((dtype, array.shape)):
            digest = xxh3_64_digest(array[start:stop].view(np.uint8))
            made.append((part, part.start + start, part.start + stop, nbytes, digest))
        if fingerprints:
            more = rows_sums(array, part.lead, part.start, shape)
            with adding:
                sums[part.name] = sums.get(part.name, 0) + more

        def store() -> None:
            target.put(part.name, part.lead, array, *([part.start] if rows else []))
            advance(array.nbytes)

        return store

    rows = getattr(target, "part_rows", None)
    parts = (
        part
        for e in plan.elements
        for part in (_split(plan, e, rows(e.name, e.lead)) if rows else [e])
    )
    crew.run((_held(plan, part), partial(make, part)) for part in parts)

    def check(part: Element, start: int, stop: int, nbytes: int, digest: bytes) -> None:
        stored = target.read(part.name, part.lead, start, stop)
        if xxh3_64_digest(np.ascontiguousarray(stored).view(np.uint8)) != digest:
            raise CheckpointError(f"`{part.name}` was not stored as it was written")
        advance(nbytes)

    crew.run((2 * block[3], partial(check, *block)) for block in made)
    return Moved(sums, crew.peak)


def _comparing(plan: Plan, source: Any) -> Iterator[tuple[int, Callable[[], None]]]:
    """Yields the jobs that compare tensors that repeat others with these."""

    def compare(copy: str, original: str, start: int, stop: int) -> None:
        pair = (source.read(name, (), start, stop).view(np.uint8) for name in (copy, original))
        if not np.array_equal(*pair):
            raise MismatchError(f"`{copy}` differs from `{original}`, but the config ties them")

    for copy, original in plan.copies:
        for start, stop, nbytes in _blocks(plan.source[copy]):
            yield 2 * nbytes, partial(compare, copy, original, start, stop)


def _blocks(facts: tuple[np.dtype, tuple[int, ...]]) -> Iterator[tuple[int, int, int]]:
    """Yields (start, stop, bytes) of the rows of a tensor."""
    dtype, shape = facts
    row = math.prod(shape[1:]) * dtype.itemsize
    rows = max(1, BLOCK // max(1, row))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield start, stop, (stop - start) * row


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Gives a folder that becomes `target` if the body succeeds and vanishes if it does not.

    Raises:
      UsageError: there is something at `target`, another conversion is writing it, or the place
        cannot be written.
      CheckpointError: it cannot be written any more, or the source not be read.
    """
    target = target.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already; name a folder that does not")
    staging = target.with_name(target.name + STAGING)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UsageError(f"{target} is being written by another conversion") from error
    try:
        for left in staging.iterdir():  # by one that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        with _forced(staging):
            yield staging
        _sync(staging)
        staging.replace(target)
        _sync_one(target.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, UsageError):
            raise CheckpointError(f"converting to {target} failed: {reason(error)}") from error
        raise
    finally:
        os.close(descriptor)


@contextmanager
def _forced(folder: Path) -> Iterator[None]:
    """Forces what is in `folder` to disk again and again, so that the end has little to wait for.

    Raises:
      OSError: the disk failed; who asks later may not be told again.
    """
    done = threading.Event()

    def force() -> None:
        while not done.wait(_FORCE_EVERY):
            with suppress(FileNotFoundError):  # a file that was only there for a moment
                _sync(folder)

    with ThreadPoolExecutor(1, "force") as pool:
        forcing = pool.submit(force)
        try:
            yield
        finally:
            done.set()
        forcing.result()


def _sync(folder: Path) -> None:
    for place, _, files in os.walk(folder, topdown=False):
        for file in files:
            _sync_one(Path(place) / file)
        _sync_one(Path(place))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
