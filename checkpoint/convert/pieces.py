"""Tensors that lie in pieces: over ranks, over files, in boxes or in stretches of a flat buffer.

A piece is anything with `shape` and `read(start, stop)`. Rows of a tensor are put together from the
pieces that hold them, so nothing is read that was not asked for.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from checkpoint.convert.safetensors import NAME, RANK_LIMIT
from checkpoint.convert.torchfiles import Strided
from sharding.errors import MismatchError, UnsafeInputError, UsageError, shown

LARGEST = 2**62  # of any size that a file gives


class Piece(Protocol):
    """Part of a tensor, in a file."""

    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop."""


@dataclass(frozen=True)
class Pieces:
    """A tensor and its pieces, each with where it begins; `flat`: in the tensor laid out flat."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], Piece], ...]
    flat: bool = False

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop."""
        if len(self.pieces) == 1 and not self.flat:
            return self.pieces[0][1].read(start, stop)
        rows = (stop - start, *self.shape[1:]) if self.shape else ()
        inner = math.prod(self.shape[1:])
        first, last = (start * inner, stop * inner) if self.flat else (start, stop)
        out = np.empty((last - first,) if self.flat else rows, self.dtype)
        for offsets, piece in self.pieces:
            at = offsets[0]
            a, b = max(first, at), min(last, at + piece.shape[0])
            if a < b:
                sides = zip(offsets[1:], piece.shape[1:], strict=True)
                place = (slice(begin, begin + size) for begin, size in sides)
                out[(slice(a - first, b - first), *place)] = piece.read(a - at, b - at)
        return out.reshape(rows)

    def at(self, axis: int, index: int) -> "Pieces":
        """Returns one layer of a stack along `axis`; raises MismatchError if it is stored flat."""
        if self.flat:
            raise MismatchError("a tensor that is stored flat cannot be taken apart")
        found = []
        for offsets, piece in self.pieces:
            inside = index - offsets[axis]
            if 0 <= inside < piece.shape[axis]:
                rest = (*offsets[:axis], *offsets[axis + 1 :])
                found.append((rest, piece.at(axis, inside)))
        return Pieces(self.dtype, (*self.shape[:axis], *self.shape[axis + 1 :]), tuple(found))


@contextmanager
def sound(what: str) -> Iterator[None]:
    """Turns what goes wrong where values have another form than they should into a refusal.

    Raises:
      UnsafeInputError: "`what`: the reason". Refusals of the body itself pass as they are.
    """
    try:
        yield
    except UsageError:
        raise
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UnsafeInputError(f"{what}: {reason}") from error


def sizes_of(numbers: Any) -> tuple[int, ...]:
    """Returns a shape, or offsets, that a file gives; raises ValueError if it is none."""
    if not isinstance(numbers, tuple) or len(numbers) > RANK_LIMIT:
        raise ValueError(f"{shown(numbers)} are not sizes")
    if not all(type(n) is int and 0 <= n < LARGEST for n in numbers):
        raise ValueError(f"{shown(numbers)} are not sizes")
    return numbers


def count_of(value: Any) -> int:
    """Returns a count of updates, a number or a tensor of one; raises ValueError if it is none.

    torch's own optimizers keep a tensor, those of DeepSpeed and Apex an integer.
    """
    if isinstance(value, Strided) and math.prod(value.shape) == 1:
        value = value.read().reshape(()).item()
    if type(value) not in (int, float) or not 0 <= value < LARGEST or int(value) != value:
        raise ValueError(f"{shown(value)} is not a number of steps")
    return int(value)


def whole(tensor: Strided, shape: tuple[int, ...] | None = None) -> Pieces:
    """Returns a tensor that is one piece, seen as `shape` where it is stored flat."""
    if shape is None or shape == tensor.shape:
        return Pieces(tensor.dtype, tensor.shape, (((0,) * len(tensor.shape), tensor),))
    return flat_pieces([tensor], shape, "a flat tensor")


def flat_pieces(pieces: Iterable[Strided], shape: tuple[int, ...], where: str) -> Pieces:
    """Returns a tensor that lies flat in pieces one after the other, what is left over cut off.

    Raises:
      UnsafeInputError: they hold too few elements.
    """
    found, at, size = [], 0, math.prod(shape)
    kinds = set()
    for piece in pieces:
        count = min(piece.shape[0], size - at)
        if count > 0:
            found.append(((at,), piece.part(0, count)))
            kinds.add(piece.dtype)
            at += count
    if at != size or len(kinds) > 1:
        raise UnsafeInputError(f"{where}: {at} elements of {sorted(map(str, kinds))} for {shape}")
    return Pieces(kinds.pop() if kinds else np.dtype("float32"), shape, tuple(found), flat=True)


def check_grid(tensor: Pieces, where: str) -> None:
    """Proves that pieces are the cells of a grid over the tensor: no gap, no overlap.

    Raises:
      UnsafeInputError: they are not.
    """
    if 0 in tensor.shape:
        return
    axes = range(len(tensor.shape))
    if any(len(o) != len(axes) or len(p.shape) != len(axes) for o, p in tensor.pieces):
        raise UnsafeInputError(f"{where}: its pieces have other axes")
    cuts = [sorted({(o[axis], p.shape[axis]) for o, p in tensor.pieces}) for axis in axes]
    for size, cut in zip(tensor.shape, cuts, strict=True):
        end = 0
        for start, length in cut:
            if start != end:
                raise UnsafeInputError(f"{where}: its pieces leave a gap or overlap at {start}")
            end = start + length
        if end != size:
            raise UnsafeInputError(f"{where}: its pieces end at {end} of {size}")
    cells = {offsets for offsets, _ in tensor.pieces}
    if len(tensor.pieces) != math.prod(map(len, cuts)) or len(cells) != len(tensor.pieces):
        raise UnsafeInputError(f"{where}: a piece is missing, or there twice")


class PieceTensors:
    """Named tensors in pieces, some rows at a time."""

    def __init__(self, tensors: dict[str, Pieces]) -> None:
        """Raises UnsafeInputError for a name that is no string, or absurdly long."""
        for name in tensors:
            if not isinstance(name, str) or len(name) > NAME:
                raise UnsafeInputError(f"{shown(name)} is not the name of a tensor")
        self.tensors = tensors

    @property
    def facts(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name → dtype and shape."""
        return {name: (t.dtype, t.shape) for name, t in self.tensors.items()}

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop; raises UnsafeInputError if a file is damaged."""
        return self.tensors[name].read(start, stop)

    def close(self) -> None:
        """Does nothing: no file stays open."""


class WrittenTensors(PieceTensors):
    """Tensors being written, each whole: an archive carries the checksum of all of a tensor."""

    def __init__(self, write: Callable[[str, np.ndarray], Strided]) -> None:
        super().__init__({})
        self._write, self._lock = write, threading.Lock()

    def put(self, name: str, lead: tuple[int, ...], array: np.ndarray) -> None:
        """Writes a tensor."""
        with self._lock:
            self.tensors[name] = whole(self._write(name, array))
