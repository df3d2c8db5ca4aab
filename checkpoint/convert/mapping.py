"""The language of conversion tables: which of our arrays is which of theirs, told by axes.

A table is text, one row per tensor of theirs:

    layers/attention/wq: L D N H = model.layers.{L}.self_attn.q_proj.weight: (N H) D

Left our array, right theirs, each with its axes. Letters are sizes; `(N H)` is one axis that holds
both, the last one fastest; `{L}` in a name means one tensor per index. Several arrays of ours that
share one tensor of theirs are joined by `&`, and `[(N H) | (K H)]` says how they lie along an axis,
so fused projections, grouped heads, gate and up, rotary orders and stacks of layers or experts are
all the same thing. A number after the axes, `D + 1`, says that ours is theirs plus it. A letter
may be longer on our side (padded vocabulary); the rest is zeros and is dropped on the way back.

Both directions are one assignment between two views with the same axes, so there is no inverse to
write. `check` proves a table on arrays of indices, without any weights.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from sharding.errors import UsageError

BLOCK = 4 * 2**20  # bytes of a tensor held at a time on either side, where the table allows it
LARGE = 2**14  # elements
TIED = {"head": "embedding"}  # our leaf that may be missing → the one that then serves for it

Letters = tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """One axis holding several arrays of ours, one after the other."""

    parts: tuple[Letters, ...]


Axis = tuple[str | Parts, ...]
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Sizes:
    """The size of every letter; `stored` are those that are longer on our side."""

    true: Mapping[str, int]
    stored: Mapping[str, int]

    @property
    def ours(self) -> dict[str, int]:
        return {**self.true, **self.stored}


@dataclass(frozen=True)
class Pattern:
    """A name, with `{L}` where there is one tensor per index of L, and the axes of the tensor."""

    name: str
    axes: Axes

    @property
    def placeholders(self) -> Letters:
        return tuple(re.findall(r"{(\w+)}", self.name))

    def letters(self, part: int) -> list[str]:
        """Returns the letters of the axes, those of the other parts left out."""
        found = []
        for factor in itertools.chain(*self.axes):
            found += factor.parts[part] if isinstance(factor, Parts) else [factor]
        return found

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(_size(f, sizes) for f in axis) for axis in self.axes)


@dataclass(frozen=True)
class Row:
    """Arrays of ours, the tensor of theirs that holds them, ours minus theirs, and the line."""

    ours: tuple[Pattern, ...]
    theirs: Pattern
    offset: float
    text: str

    def lead(self, part: int) -> Letters:
        """Returns the first axes of our array that are indices in their name: a stack's."""
        axes = self.ours[part].axes[:-1]
        inside = [len(axis) == 1 and axis[0] in self.theirs.placeholders for axis in axes]
        count = inside.index(False) if False in inside else len(inside)
        return tuple(axis[0] for axis in axes[:count])


class TableError(UsageError):
    """A table that does not describe a one-to-one mapping; the message names the row."""


# ---------------------------------------------------------------- reading a table


def parse_rows(text: str) -> tuple[Row, ...]:
    """Returns the rows of a table; raises TableError naming the line that is not one."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return tuple(_parse_row(line) for line in lines if line)


def _parse_row(line: str) -> Row:
    ours, equals, theirs = line.partition(" = ")
    offset = re.search(r" ([+-]) ([\d.]+)$", theirs)
    if offset:
        theirs = theirs[: offset.start()]
    if not equals:
        raise TableError(f"table row `{line}`: expected `ours: axes = theirs: axes`")
    return Row(
        tuple(_parse_pattern(part, line) for part in ours.split("&")),
        _parse_pattern(theirs, line),
        float("".join(offset.groups())) if offset else 0.0,
        " ".join(line.split()),
    )


def _parse_pattern(text: str, line: str) -> Pattern:
    name, colon, axes = text.strip().partition(":")
    tokens = re.findall(r"[\w]+|\S", axes)
    parsed = tuple(_parse_axis(tokens, line) for _ in iter(lambda: bool(tokens), False))
    if not colon or not parsed or " " in name:
        raise TableError(f"table row `{line}`: `{text.strip()}` is not `name: axes`")
    return Pattern(name, parsed)


def _parse_axis(tokens: list[str], line: str) -> Axis:
    """Takes one axis off the front of `tokens`."""

    def until(closing: str) -> list[list[str | Parts]]:
        groups: list[list[str | Parts]] = [[]]
        while tokens and tokens[0] != closing:
            if tokens[0] == "|":
                groups.append([])
                tokens.pop(0)
            else:
                groups[-1] += _parse_axis(tokens, line)
        if not tokens:
            raise TableError(f"table row `{line}`: `{closing}` is missing")
        tokens.pop(0)
        return groups

    token = tokens.pop(0)
    if token == "[":
        return (Parts(tuple(tuple(group) for group in until("]"))),)
    if token == "(":
        return tuple(itertools.chain(*until(")")))
    if not re.fullmatch(r"\w+", token):
        raise TableError(f"table row `{line}`: unexpected `{token}`")
    return (token,)


def _size(factor: str | Parts, sizes: Mapping[str, int]) -> int:
    if isinstance(factor, Parts):
        return sum(math.prod(sizes[x] for x in part) for part in factor.parts)
    return sizes[factor]


# ---------------------------------------------------------------- views


@dataclass(frozen=True)
class Layout:
    """The axes of one tensor, which of its parts is meant, and the sizes on its side."""

    axes: Axes
    part: int
    sizes: Mapping[str, int]
    true: Mapping[str, int]

    def view(self, tensor: np.ndarray, index: Mapping[str, int], order: Letters) -> np.ndarray:
        """Returns the part of `tensor` at `index` with its axes in `order`, sharing its memory."""
        factors = list(itertools.chain(*self.axes))
        tensor = tensor.reshape([_size(f, self.sizes) for f in factors], copy=False)
        for place, factor in enumerate(factors):
            if isinstance(factor, Parts):
                sizes = [math.prod(self.sizes[x] for x in part) for part in factor.parts]
                start, chosen = sum(sizes[: self.part]), factor.parts[self.part]
                inside = (slice(None),) * place + (slice(start, start + sizes[self.part]),)
                shape = [self.sizes[x] for x in chosen]
                before, after = tensor.shape[:place], tensor.shape[place + 1 :]
                tensor = tensor[inside].reshape([*before, *shape, *after], copy=False)
                factors[place : place + 1] = chosen
                break
        tensor = tensor[tuple(index.get(x, slice(self.true[x])) for x in factors)]
        left = [x for x in factors if x not in index]
        return tensor.transpose([left.index(x) for x in order])

    def slowest(self) -> str:
        """Returns the letter that varies slowest in the part."""
        first = self.axes[0][0]
        return first.parts[self.part][0] if isinstance(first, Parts) else first

    def some(self, letter: str, stored: int, true: int) -> "Layout":
        """Returns the layout of as many indices of a letter."""
        sizes, real = {**self.sizes, letter: stored}, {**self.true, letter: true}
        return replace(self, sizes=sizes, true=real)

    def blocks(
        self, row_bytes: int, index: Mapping[str, int], within: tuple[int, int] | None
    ) -> Iterator[tuple]:
        """Yields (letter, first, last, start row, stop row, layout of these rows) of the part.

        A block is some indices of the letter that varies slowest, at least one and otherwise at
        most BLOCK bytes: a big tensor is never held whole on both sides. `within` are the first
        and last index that are asked for, None for all.
        """
        (first, *inner), rest, offset = self.axes[0], self.axes[1:], 0
        part = self.part
        if isinstance(first, Parts):
            sizes = [math.prod(self.sizes[x] for x in p) for p in first.parts]
            below = math.prod(_size(x, self.sizes) for x in inner)
            offset = sum(sizes[:part]) * below
            first, *others = first.parts[part]
            inner = [*others, *inner]
        step = math.prod(_size(x, self.sizes) for x in inner)
        at, end = within or (0, self.true[first])
        if first in index:
            at, end = index[first], index[first] + 1
        count = max(1, BLOCK // max(1, step * row_bytes))
        for a in range(at, end, count):
            b = min(a + count, end)
            layout = replace(self, axes=((first, *inner), *rest)).some(first, b - a, b - a)
            yield first, a, b, offset + a * step, offset + b * step, layout


# ---------------------------------------------------------------- elements: what is moved


class Tensors(Protocol):
    """Named arrays that can be read some rows at a time, from several threads."""

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop of array[lead]."""


@dataclass(frozen=True)
class Piece:
    """One source of an element: where it is, how it lies there and in the element."""

    name: str
    lead: tuple[int, ...]
    source: Layout
    target: Layout
    index: Mapping[str, int]
    order: Letters
    within: tuple[int, int] | None = None  # of the source's slowest letter; None: all of it


@dataclass(frozen=True)
class Element:
    """What is made in one go: a tensor of theirs, or one layer (and expert) of an array of ours."""

    name: str
    lead: tuple[int, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    offset: float
    start: int = 0  # the first of its rows, where it is a part of an element

    def split(self, rows: int) -> Iterator["Element"]:
        """Yields parts of at most `rows` rows, or itself where rows of ours are not rows of theirs.

        Parts are possible where both sides have the same letter outermost. They begin at multiples
        of `rows`, and all but the last have that many.
        """
        piece = self.pieces[0]
        letter = piece.source.slowest()
        first, *inner = piece.target.axes[0]
        step = math.prod(piece.target.sizes[x] for x in inner if isinstance(x, str))
        whole = len(self.pieces) > 1 or first != letter or letter in piece.index or rows % step
        if whole or rows >= self.shape[0]:
            yield self
            return
        true = piece.target.true[letter]
        for start in range(0, self.shape[0], rows):
            shape = (min(rows, self.shape[0] - start), *self.shape[1:])
            a = min(start // step, true)
            b = min((start + shape[0]) // step, true)
            target = piece.target.some(letter, shape[0] // step, b - a)
            made = replace(piece, target=target, within=(a, b))
            yield replace(self, shape=shape, pieces=(made,), start=start)


def to_theirs(row: Row, sizes: Sizes) -> Iterator[Element]:
    """Yields the elements that make every tensor of theirs of one row."""
    theirs = row.theirs
    for index in _indices(theirs.placeholders, sizes.true):
        pieces = []
        for part, ours in enumerate(row.ours):
            lead = row.lead(part)
            pieces.append(Piece(
                ours.name, tuple(index[x] for x in lead),
                Layout(ours.axes[len(lead) :], 0, sizes.ours, sizes.true),
                Layout(theirs.axes, part, sizes.true, sizes.true),
                index, _order(ours, index),
            ))  # fmt: skip
        name = theirs.name.format_map(index)
        yield Element(name, (), theirs.shape(sizes.true), tuple(pieces), -row.offset)


def to_ours(row: Row, sizes: Sizes) -> Iterator[Element]:
    """Yields the elements that make every array of ours of one row."""
    theirs = row.theirs
    for part, ours in enumerate(row.ours):
        lead = row.lead(part)
        inside = replace(ours, axes=ours.axes[len(lead) :])
        for at in _indices(lead, sizes.true):
            pieces = []
            rest = tuple(x for x in theirs.placeholders if x not in lead)
            for index in ({**at, **more} for more in _indices(rest, sizes.true)):
                pieces.append(Piece(
                    theirs.name.format_map(index), (),
                    Layout(theirs.axes, part, sizes.true, sizes.true),
                    Layout(inside.axes, 0, sizes.ours, sizes.true),
                    index, _order(ours, index),
                ))  # fmt: skip
            yield Element(
                ours.name, tuple(at.values()), inside.shape(sizes.ours), tuple(pieces), row.offset
            )


def _order(ours: Pattern, index: Mapping[str, int]) -> Letters:
    return tuple(x for x in ours.letters(0) if x not in index)


def _indices(letters: Letters, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    for values in itertools.product(*(range(sizes[x]) for x in letters)):
        yield dict(zip(letters, values, strict=True))


def build(
    element: Element, sources: Tensors, dtype: np.dtype, overflow: Callable = lambda count: None
) -> np.ndarray:
    """Returns the element's array; `overflow` is told how many values a cast made infinite.

    Raises:
      UsageError: an offset that could not be undone bit for bit.
    """
    covered = sum(math.prod(p.target.true[x] for x in p.order) for p in element.pieces)
    whole = covered == math.prod(element.shape)
    out = aligned(element.shape, dtype)
    if not whole:
        out.view(np.uint8)[...] = 0
    for piece in element.pieces:
        row_bytes = dtype.itemsize * math.prod(
            math.prod(_size(f, piece.source.sizes) for f in axis) for axis in piece.source.axes[1:]
        )
        target = piece.target.view(out, piece.index, piece.order)
        begin = piece.within[0] if piece.within else 0
        blocks = piece.source.blocks(row_bytes, piece.index, piece.within)
        for letter, a, b, start, stop, layout in blocks:
            rows = sources.read(piece.name, piece.lead, start, stop)
            if letter in piece.index:
                inside, place = {**piece.index, letter: 0}, target
            else:
                inside = piece.index
                place = target[
                    (slice(None),) * piece.order.index(letter) + (slice(a - begin, b - begin),)
                ]
            values = layout.view(rows, inside, piece.order)
            if element.offset:
                values = _shifted(values, element)
            if place.dtype == values.dtype:  # NumPy moves integers faster than ml_dtypes' floats
                bits = np.dtype(f"u{min(dtype.itemsize, 8)}")
                place, values = place.view(bits), values.view(bits)
            place, values = _as_it_lies(place, values)
            if place.size == out.size and place.flags.c_contiguous and place.dtype == values.dtype:
                # One block is all of it: no second copy.
                return np.ascontiguousarray(values).view(dtype).reshape(element.shape)
            with np.errstate(over="ignore", invalid="ignore"):  # of a cast that was asked for
                place[...] = values
            if place.dtype != values.dtype and (became := np.isinf(place).sum()):
                overflow(int(became - np.isinf(values).sum()))
    return out


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array that XLA takes without copying it: it begins at 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 4096, np.uint8)  # XLA asks for a little more: what is freed fits it
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _as_it_lies(target: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both with their axes in the order in which the target lies in memory.

    Large values that this transposes are moved by XLA, which is 3 to 9 times as fast as NumPy.
    """
    axes = sorted(range(target.ndim), key=lambda axis: -target.strides[axis])
    target, values = target.transpose(axes), values.transpose(axes)
    moved = values.dtype == target.dtype and values.itemsize <= 4 and not values.flags.c_contiguous
    if values.size > LARGE and moved:
        import jax  # not for the proof of a table, which comes before anything is read

        values = np.asarray(jax.device_put(values))
    return target, values


def _shifted(values: np.ndarray, element: Element) -> np.ndarray:
    shifted = (values.astype(np.float32) + np.float32(element.offset)).astype(values.dtype)
    back = (shifted.astype(np.float32) - np.float32(element.offset)).astype(values.dtype)
    if back.tobytes() != values.tobytes():
        raise UsageError(
            f"`{element.name}`: adding {element.offset:+g} in {values.dtype} loses bits, so it "
            "could not be undone"
        )
    return shifted


# ---------------------------------------------------------------- the proof


class _Memory:
    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(self.arrays[name][lead][start:stop])


def check(rows: Iterable[Row], sizes: Sizes, shapes: Mapping[str, tuple] | None = None) -> None:
    """Proves that rows map ours to theirs one to one, both ways, on arrays of indices.

    Args:
      rows: the rows in force.
      sizes: small ones will do; what holds for them holds for all, as rows know letters only.
      shapes: name → shape of every array of ours; None where there is no model to compare with.

    Raises:
      TableError: naming the row and what is wrong with it.
    """
    rows = tuple(rows)
    _check_letters(rows, sizes)
    names = [o.name for row in rows for o in row.ours]
    if shapes is not None:
        if missing := sorted(set(shapes) - set(names)):
            raise TableError(f"no row of the table makes `{missing[0]}`")
        for row, made in [(r, o) for r in rows for o in r.ours]:
            have, want = made.shape(sizes.ours), tuple(shapes.get(made.name, ()))
            if have != want:
                raise TableError(
                    f"row `{row.text}`: `{made.name}` would be {have}, the model has {want}"
                )
    start, ours, theirs = 1, {}, {}
    for pattern in (o for row in rows for o in row.ours):
        shape = pattern.shape(sizes.ours)
        values = np.arange(start, start + math.prod(shape)).reshape(shape)
        start += values.size
        for axis, letters in enumerate(pattern.axes):  # padding holds nothing
            if len(letters) == 1 and letters[0] in sizes.stored:
                values = values.copy()
                values[(slice(None),) * axis + (slice(sizes.true[letters[0]], None),)] = 0
        ours[pattern.name] = values
    for row in rows:
        plain = replace(row, offset=0.0)
        for element in to_theirs(plain, sizes):
            if element.name in theirs:
                raise TableError(
                    f"row `{row.text}`: `{element.name}` is made by another row as well"
                )
            theirs[element.name] = build(element, _Memory(ours), np.dtype(np.int64))
    used = np.sort(np.concatenate([t.ravel() for t in theirs.values()]))
    kept = np.sort(np.concatenate([o[o > 0].ravel() for o in ours.values()]))
    if not np.array_equal(used, kept):
        raise TableError("the table drops or repeats elements of our arrays")
    for row in rows:
        for element in to_ours(replace(row, offset=0.0), sizes):
            back = build(element, _Memory(theirs), np.dtype(np.int64))
            if not np.array_equal(back, ours[element.name][element.lead]):
                raise TableError(f"row `{row.text}` does not lead back to `{element.name}`")


def _check_letters(rows: tuple[Row, ...], sizes: Sizes) -> None:
    seen: set[str] = set()
    for row in rows:
        parts = [f for f in itertools.chain(*row.theirs.axes) if isinstance(f, Parts)]
        count = len(parts[0].parts) if parts else 1
        if len(parts) > 1 or count != len(row.ours):
            raise TableError(f"row `{row.text}`: {len(row.ours)} arrays of ours for {count} parts")
        for part, ours in enumerate(row.ours):
            if ours.name in seen:
                raise TableError(f"row `{row.text}`: `{ours.name}` is made by another row as well")
            seen.add(ours.name)
            left = ours.letters(0)
            right = [*row.theirs.letters(part), *row.theirs.placeholders]
            if unknown := sorted({*left, *right} - set(sizes.true)):
                raise TableError(f"row `{row.text}`: letter {unknown[0]} has no size")
            if sorted(left) != sorted(right) or len(set(left)) != len(left):
                both = f"our letters {' '.join(left)} are not theirs {' '.join(right)}"
                raise TableError(f"row `{row.text}`: {both}")
