"""Reads the text of a compiled, scheduled TPU program; needs neither JAX nor libtpu.

Owns what the text means: computations and their ops in the order in which they run, shapes with
layout, tiles and memory space, how often a loop runs, which devices a collective joins, which axes
of the torus it uses, and which line of the source an op came from. Texts of libtpu 0.0.42 and
0.0.51 are stored with the tests.
"""

import functools
import math
import re
from dataclasses import dataclass, field

import numpy as np

HBM, VMEM, HOST = 0, 1, 5  # memory spaces, as S(n) in a layout
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # else the number in the name: bf16, s32, f8e4m3fn
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_OP = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


@dataclass(frozen=True, slots=True)
class Shape:
    """One array: its logical dimensions, and the bytes that it takes once padded to tiles."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    bytes: int
    padded: int  # 0 for what takes no memory of the device's (tokens)

    @property
    def elements(self) -> int:
        return math.prod(self.dims)


@functools.lru_cache(maxsize=65536)
def parse_shape(text: str) -> Shape:
    """Reads `bf16[16,4096]{1,0:T(8,128)(2,1)S(1)}`."""
    dtype, sizes, layout = _SHAPE.fullmatch(text).groups()
    dims = tuple(int(size) for size in sizes.split(",") if size)
    digits = re.match(r"[a-z]+(\d+)", dtype)
    bits = _BITS.get(dtype, int(digits[1]) if digits else 8)
    order, _, detail = (layout or "").partition(":")
    space = re.search(r"S\((\d+)\)", detail)
    tiles = re.search(r"T\(([\d,]+)\)", detail)
    padded = list(dims)
    if tiles and dims:
        minor_first = [int(axis) for axis in order.split(",")]
        sizes = [int(size) for size in tiles[1].split(",")]
        for axis, tile in zip(minor_first, reversed(sizes), strict=False):
            padded[axis] = -(-padded[axis] // tile) * tile
    return Shape(
        dtype,
        dims,
        int(space[1]) if space else HBM,
        math.prod(dims) * bits // 8,
        math.prod(padded) * bits // 8,
    )


@dataclass(slots=True)
class Op:
    """One instruction. `parts` are the elements of a tuple, each with the shapes inside it."""

    name: str
    opcode: str
    parts: tuple[tuple[Shape, ...], ...]
    operands: tuple[str, ...]
    text: str  # everything after the operands: attributes, metadata, backend configuration
    is_root: bool
    value: str = ""  # what stands in the brackets of a constant or a parameter

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(shape for part in self.parts for shape in part)

    @property
    def collective(self) -> str:
        """The kind of collective, without "-start" and "-done"; "" for other ops."""
        return next((kind for kind in COLLECTIVES if self.opcode.startswith(kind)), "")

    def attribute(self, name: str) -> str:
        """Returns what follows `name=`: a computation without its "%", a number, a quoted text."""
        match = re.search(rf'\b{name}=(?:"([^"]*)"|\{{?%?([\w.\-]+))', self.text)
        return (match[1] if match[1] is not None else match[2]) if match else ""

    @property
    def op_name(self) -> str:
        """The path of JAX names that this came from, without the outermost jit."""
        path = self.attribute("op_name").replace("\\'", "'")
        return path.partition("/")[2] or path

    @property
    def cycles(self) -> int:
        """XLA's own estimate; 0 where it makes none (kernels, copies, collectives)."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(match[1]) if match else 0

    @property
    def torus_axes(self) -> int | None:
        """Torus axes that a collective uses at once, from its algorithm; None if not printed."""
        match = re.search(r'"strategy":"\w+","debug":"[^"]*?phases:(\d+)', self.text)
        return int(match[1]) if match else None


@dataclass(slots=True)
class Computation:
    """A list of ops in the order in which they run."""

    name: str
    ops: dict[str, Op] = field(default_factory=dict)

    @property
    def root(self) -> Op:
        return next(op for op in reversed(self.ops.values()) if op.is_root)

    def parameter(self, index: int) -> Op:
        return next(
            op for op in self.ops.values() if op.opcode == "parameter" and op.value == str(index)
        )


@dataclass
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: Computation
    frames: dict[int, tuple[str, str, int, int]]  # id → file, function, line, parent
    _inside: dict[int, list[Op]] = field(default_factory=dict)  # by identity, as asked for

    def called(self, op: Op, attribute: str = "calls") -> Computation | None:
        return self.computations.get(op.attribute(attribute))

    def inside(self, op: Op) -> list[Op]:
        """Returns all ops of a fusion, those of fusions inside it included."""
        if (found := self._inside.get(id(op))) is None:
            found = self._inside[id(op)] = []
            if (body := self.called(op)) is not None:
                for inner in body.ops.values():
                    found += [inner, *self.inside(inner)]
        return found

    def trips(self, loop: Op) -> int | None:
        """How often a while loop runs: the bound in its condition over the counter's step.

        XLA unrolls loops, so the step need not be 1. None where the bound is not a constant.
        """
        if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(match[1])
        condition, body = (self.called(loop, name) for name in ("condition", "body"))
        inside = [i for op in condition.ops.values() for i in (op, *self.inside(op))]
        limit = max((int(op.value) for op in inside if _is_integer(op)), default=None)
        if limit is None:
            return None
        counters = {
            int(op.attribute("index"))
            for op in condition.ops.values()
            if op.opcode == "get-tuple-element" and op.shapes[0].dims == ()
        }
        steps = [self._step(body, body.ops.get(body.root.operands[i])) for i in counters]
        return -(-limit // max([s for s in steps if s] or [1]))

    def _step(self, body: Computation, update: Op | None) -> int:
        """What an `add` of a constant adds, seen through copies; 0 for anything else."""
        while update is not None and update.opcode in ("copy", "bitcast"):
            update = body.ops.get(update.operands[0])
        if update is None or update.opcode != "add":
            return 0
        constants = [body.ops[name] for name in update.operands if name in body.ops]
        return max((int(c.value) for c in constants if _is_integer(c)), default=0)

    def source(self, op: Op) -> str:
        """Returns "models/layers.py:197 mlp", the innermost line of ours; "" when unknown."""
        frame = int(op.attribute("stack_frame_id") or 0)
        while frame in self.frames:
            file, function, line, frame_parent = self.frames[frame]
            if match := re.search(r"(?:^|/)((?:models|trainer|sharding|tests)/[\w/]+\.py)$", file):
                return f"{match[1]}:{line} {function.rpartition('.')[2]}"
            frame = frame_parent
        file, line = op.attribute("source_file"), op.attribute("source_line")
        if match := re.search(r"((?:models|trainer|sharding|tests)/[\w/]+\.py)$", file):
            return f"{match[1]}:{line}"
        return ""

    def line_of(self, op: Op) -> str:
        """Returns `source` of an op, or of the last op fused into it that has one."""
        inside = (op, *reversed(self.inside(op)))
        return next((found for one in inside if (found := self.source(one))), "")


def _is_integer(op: Op) -> bool:
    return op.opcode == "constant" and not op.shapes[0].dims and op.value.lstrip("-").isdigit()


# ---------------------------------------------------------------- the text


def parse(text: str) -> Module:
    """Reads a program (`compiled.as_text()`).

    Raises:
      ValueError: this is no scheduled program, so that the order of its ops would mean nothing.
    """
    head = text.partition("\n")[0]
    if not head.startswith("HloModule") or "is_scheduled=true" not in head:
        raise ValueError("not the text of a scheduled program (HloModule …, is_scheduled=true)")
    computations: dict[str, Computation] = {}
    current = entry = None
    for line in text.splitlines():
        if (match := _OP.match(line)) and current is not None:
            op = _parse_op(match[2], match[3], bool(match[1]))
            current.ops[op.name] = op
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], Computation(match[2]))
            entry = current if match[1] else entry
    if entry is None:
        raise ValueError("the program has no ENTRY computation")
    return Module(computations, entry, _frames(text))


def _parse_op(name: str, text: str, is_root: bool) -> Op:
    end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest, 0) - 1
    inside, after = rest[:close], rest[close + 1 :]
    operands = () if opcode in ("constant", "parameter") else re.findall(r"%([\w.\-]+)", inside)
    return Op(name, opcode, _parts(kind), tuple(operands), after, is_root, inside)


def _closing(text: str, start: int) -> int:
    """Returns the place of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced brackets: {text[start : start + 80]}")


def _parts(kind: str) -> tuple[tuple[Shape, ...], ...]:
    """Returns the elements of a type: of an array one, of a tuple one for each at its top level."""
    if kind[0] != "(":
        return ((parse_shape(kind),),)
    parts, current, depth = [], [], 0
    for match in re.finditer(rf"\(|\)|{_SHAPE.pattern}", kind[1:-1]):
        if match[0] in "()":
            depth += 1 if match[0] == "(" else -1
            if depth == 0:
                parts.append(tuple(current))
                current = []
        elif depth:
            current.append(parse_shape(match[0]))
        else:
            parts.append((parse_shape(match[0]),))
    return tuple(parts)


def _frames(text: str) -> dict[int, tuple[str, str, int, int]]:
    """Reads the tables of files, functions, places and frames before the first computation."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] = {}
    for line in text.splitlines()[1:]:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line, {})
        elif match := re.match(r"(\d+) (.*)", line):
            current[int(match[1])] = match[2]
        elif line:
            break

    def number(record: str, name: str) -> int:
        match = re.search(rf"\b{name}=(\d+)", record)
        return int(match[1]) if match else 0

    frames = {}
    for key, record in tables.get("StackFrames", {}).items():
        place = tables["FileLocations"].get(number(record, "file_location_id"), "")
        file = tables["FileNames"].get(number(place, "file_name_id"), "")
        function = tables["FunctionNames"].get(number(place, "function_name_id"), "")
        parent = number(record, "parent_frame_id") - 1  # written one too high: 1 means none
        frames[key] = (file.strip('"'), function.strip('"'), number(place, "line"), parent)
    return frames


# ---------------------------------------------------------------- who takes part in a collective


def group_of(op: Op, devices: int) -> tuple[int, ...]:
    """Returns the devices that a collective joins with its first one; () where nothing is printed.

    All forms that XLA prints: `{{0,1},{2,3}}`, `{}` for all, `[4,2]<=[2,4]T(1,0)`, and
    `mesh['a'=4,'b'=2] {'a'}` with an optional order of devices. A permutation counts the devices
    of one of its cycles.
    """
    text = op.text
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{([^}]*)\}",
        text,
    ):
        names = re.findall(r"'([^']+)'=(\d+)", match[1])
        dims = [int(size) for _, size in names]
        ids = _order(match[2] or str(math.prod(dims)), match[3]).reshape(dims)
        taken = [
            (name, ids.ndim) for name in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[4])
        ]
        axes, sizes = [n for n, _ in names], dims
        keep: list[slice | int | np.ndarray] = [0] * len(dims)
        for (name, before, size), _ in taken:
            at = axes.index(name)
            whole = np.arange(sizes[at])
            if size:  # a part of an axis, as 'x':(2)4: of x cut into 2, 4 and the rest
                rest = sizes[at] // (int(before) * int(size))
                whole = whole.reshape(int(before), int(size), rest)[0, :, 0]
            keep[at] = whole
        picked = ids[np.ix_(*[np.atleast_1d(k) for k in keep])]
        return tuple(int(i) for i in picked.reshape(-1))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = _order(match[3], match[4]).reshape(int(match[1]), int(match[2]))
        return tuple(int(i) for i in ids[0])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(i) for i in match[1].split(","))
    if "replica_groups={}" in text:
        return tuple(range(devices))
    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        pairs = dict(re.findall(r"(\d+),(\d+)", match[1]))
        start = at = next(iter(pairs))
        cycle = [int(at)]
        while (at := pairs.get(at, start)) != start:
            cycle.append(int(at))
        return tuple(cycle)
    return ()


def _order(dims: str, transposed: str | None) -> np.ndarray:
    sizes = [int(size) for size in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if transposed:
        ids = ids.transpose([int(axis) for axis in transposed.split(",")])
    return ids.reshape(-1)


def mesh_axes(group: tuple[int, ...], mesh: dict[str, int]) -> str:
    """Returns the axes of `mesh` that the devices of a group differ in, joined by "+"."""
    if not group:
        return "?"
    places = np.unravel_index(np.array(group), tuple(mesh.values()))
    names = [name for name, at in zip(mesh, places, strict=True) if len(set(at)) > 1]
    return "+".join(names) or "one device"


# ---------------------------------------------------------------- arithmetic


def convolution_flops(op: Op, shapes: dict[str, Shape]) -> float:
    """FLOPs of a convolution, as which TPU programs write matmuls.

    Counts the pairs of positions that meet, because batch dimensions of a matmul become dilated
    and padded windows of which most positions fall outside.
    """
    left, right = (shapes[name].dims for name in op.operands[:2])
    out = op.shapes[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.text).groups()
    window = re.search(r"window=\{([^}]*)\}", op.text)
    fields = dict(item.split("=") for item in window[1].split(" ")) if window else {}
    spatial = sum(label.isdigit() for label in labels[0])

    def numbers(name: str, default: int) -> list[int]:
        if name not in fields:
            return [default] * spatial
        return [int(item.partition("_")[0]) for item in fields[name].split("x")]

    stride, pad = numbers("stride", 1), numbers("pad", 0)
    left_dilation, right_dilation = numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)
    flops = 2.0 * out[labels[2].index("b")] * out[labels[2].index("f")]
    flops *= right[labels[1].index("i")]
    for d in range(spatial):
        size, kernel, result = (
            dims[label.index(str(d))]
            for dims, label in zip((left, right, out), labels, strict=True)
        )
        at = np.arange(result)[:, None] * stride[d] - pad[d]
        at = at + np.arange(kernel)[None] * right_dilation[d]
        inside = (at >= 0) & (at % left_dilation[d] == 0) & (at // left_dilation[d] < size)
        flops *= int(inside.sum())
    return flops
