"""Plans a conversion from names, shapes and dtypes alone, then runs it one tensor at a time.

The plan refuses everything that can be refused before a byte is written. The output is made in a
folder beside the target, read back, and renamed: it appears whole or not at all, and what a killed
conversion left behind is cleared by the next one.
"""

import fcntl
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoint.convert.families import Family
from checkpoint.convert.mapping import BLOCK, Element, Row, build, to_ours, to_theirs
from checkpoint.steps import CheckpointError
from models.config import ModelConfig
from sharding.errors import MismatchError, UsageError

STAGING = ".converting"  # added to the target's name while it is being made
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


class _Renamed:
    """Reads tensors under the names of the table."""

    def __init__(self, tensors: Any, names: dict[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        return self._tensors.read(self._names[name], lead, start, stop)


def run(plan: Plan, source: Any, target: Any, advance: Callable[[int], None]) -> None:
    """Makes every tensor of the target and reads it back; `advance` is told bytes, each twice.

    Raises:
      MismatchError: a tensor that repeats another one differs from it.
      CheckpointError: what was read back is not what was written.
    """
    for copy, original in plan.copies:
        for ours, theirs in zip(
            _blocks(source, copy, (), plan.source[copy]),
            _blocks(source, original, (), plan.source[original]),
            strict=True,
        ):
            if ours.tobytes() != theirs.tobytes():
                raise MismatchError(f"`{copy}` differs from `{original}`, but the config ties them")
    digests = {}
    renamed = _Renamed(source, plan.names)
    for element in plan.elements:
        array = build(element, renamed, plan.target[element.name][0])
        digests[element.name, element.lead] = zlib.crc32(_bytes(array))
        target.put(element.name, element.lead, array)
        advance(array.nbytes)
    for element in plan.elements:
        key, digest = (element.name, element.lead), 0
        for block in _blocks(target, *key, (plan.target[element.name][0], element.shape)):
            digest = zlib.crc32(_bytes(block), digest)
            advance(block.nbytes)
        if digest != digests[key]:
            raise CheckpointError(f"`{element.name}` was not stored as it was written")


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _blocks(tensors: Any, name: str, lead: tuple, facts: tuple) -> Iterator[np.ndarray]:
    dtype, shape = facts
    rows = max(1, BLOCK // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for start in range(0, shape[0], rows):
        yield tensors.read(name, lead, start, min(start + rows, shape[0]))


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Gives a folder that becomes `target` if the body succeeds and vanishes if it does not.

    Raises:
      UsageError: there is something at `target`, another conversion is writing it, or the place
        cannot be written.
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
        yield staging
        _sync(staging)
        staging.replace(target)
        _sync_one(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


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
