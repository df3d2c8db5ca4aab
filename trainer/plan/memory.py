"""What the memory of a device holds when the program needs most: a walk over buffers' lifetimes.

The compiler tells its peak but not what makes it up. The text does: it is in the order in which it
runs, so a buffer lives from the op that makes it to the last op that reads it. What is updated in
place (loop carries, donated arguments, slices written into stacks) takes no second buffer.
The sum is compared with the compiler's own peak; the difference is shown as such.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from trainer.plan.hlo import HBM, Computation, Module, Op

_SAME = ("bitcast", "copy", "convert", "reshape", "transpose")


@dataclass(eq=False, slots=True)
class Buffer:
    """Bytes in device memory, and the op that says what they are."""

    bytes: int
    op: Op
    dims: tuple[int, ...]
    dtype: str
    layers: int = 0  # above 0: a stack that a loop of so many turns fills


@dataclass(frozen=True)
class Held:
    """One line of the table: what holds memory at the peak."""

    holder: str  # parameters | optimizer | gradients | activations | logits | weights | temporaries
    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    peak: int
    held: list[Held]  # largest first

    def by_holder(self) -> dict[str, int]:
        """Returns holder → bytes, largest first."""
        sums: dict[str, int] = defaultdict(int)
        for held in self.held:
            sums[held.holder] += held.bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def memory_course(module: Module) -> dict[tuple[str, str], int]:
    """Returns (computation, op) → the most bytes that are held while it runs."""
    walker = _Lifetimes(module)
    walker.peak(module.entry, None)
    return walker.course(module.entry, 0)


def memory_at_peak(module: Module) -> Memory:
    """Returns what is held when most is."""
    walker = _Lifetimes(module)
    peak, live = walker.peak(module.entry, None)
    namer = _Names(module)
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for buffer in live:
        sums[namer.of(buffer)] += buffer.bytes
    held = [Held(holder, name, size) for (holder, name), size in sums.items() if size]
    return Memory(peak, sorted(held, key=lambda h: -h.bytes))


Parts = list[list[Buffer]]  # per element of an op's result, the buffers in it


class _Lifetimes:
    def __init__(self, module: Module) -> None:
        self.module = module
        self._held: dict[str, list[int]] = {}  # computation → bytes of its own buffers, by op

    def course(self, computation: Computation, base: int) -> dict[tuple[str, str], int]:
        """Returns what is held at each op after `peak`, with `base` bytes of who called."""
        found = {}
        for op, held in zip(computation.ops.values(), self._held[computation.name], strict=True):
            found[computation.name, op.name] = base + held
            called = {"while": "body", "call": "to_apply"}.get(op.opcode)
            body = self.module.called(op, called) if called else None
            if body is not None:
                inside = self.course(body, base + held)
                found |= inside
                found[computation.name, op.name] = max(inside.values(), default=base + held)
        return found

    def peak(self, computation: Computation, carried: Parts | None) -> tuple[int, list[Buffer]]:
        """Returns the largest sum of living bytes and the buffers of that moment.

        `carried` are the buffers of a loop body's parameter, which its caller counts; what the
        body ends with lies in their place. None: the entry, whose parameters count themselves.
        """
        ops = list(computation.ops.values())
        values: dict[str, Parts] = {}
        made: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        inside: dict[int, tuple[int, list[Buffer]]] = {}
        for index, op in enumerate(ops):
            if op.opcode != "get-tuple-element":  # which reads one part, not all of them
                for name in op.operands:
                    for buffer in _all(values.get(name, [])):
                        last[buffer] = index
            if op.opcode == "parameter" and carried is not None:
                values[op.name] = carried
                continue
            values[op.name] = self._result(computation, op, values, last, index)
            for buffer in _all(values[op.name]):
                made.setdefault(buffer, index)
                last[buffer] = max(last.get(buffer, index), index)
            if op.opcode == "while":
                body = self.module.called(op, "body")
                inside[index] = self.peak(body, values[op.name])
            elif op.opcode == "call" and (body := self.module.called(op, "to_apply")):
                inside[index] = self.peak(body, [b for n in op.operands for b in values[n]])
        owned = set(_all(carried or []))
        result = values[computation.root.name]
        if carried is None:
            for parameter in (op for op in ops if op.opcode == "parameter"):
                for buffer in _all(values[parameter.name]):
                    made[buffer], last[buffer] = 0, len(ops)
            self._donate(result, made)
        else:
            for part in result:
                owned.update(part)  # lies in the carry's place
        changes: dict[int, int] = defaultdict(int)
        for buffer, start in made.items():
            if buffer not in owned:
                changes[start] += buffer.bytes
                changes[last[buffer] + 1] -= buffer.bytes
        total = best = at = 0
        held = self._held[computation.name] = []
        for index in range(len(ops)):
            total += changes[index]
            held.append(total)
            if (here := total + inside.get(index, (0, []))[0]) > best:
                best, at = here, index
        live = [b for b, start in made.items() if b not in owned and start <= at <= last[b]]
        return best, live + inside.get(at, (0, []))[1]

    def _donate(self, result: Parts, made: dict[Buffer, int]) -> None:
        """Results of the entry are written over donated arguments of the same shape."""
        free = defaultdict(int)
        for buffer in made:
            if buffer.op.opcode == "parameter" and "state" in buffer.op.op_name:
                free[buffer.dims, buffer.dtype] += 1
        # In their order, each once: a set's would make another peak of the same program.
        for buffer in dict.fromkeys(b for b in _all(result) if b.op.opcode != "parameter"):
            if free[buffer.dims, buffer.dtype] > 0:
                free[buffer.dims, buffer.dtype] -= 1
                buffer.bytes = 0

    def _result(
        self, computation: Computation, op: Op, values: dict[str, Parts], last, index: int
    ) -> Parts:
        operands = [values.get(name, []) for name in op.operands]
        if op.opcode == "get-tuple-element":
            at = int(op.attribute("index"))
            return [operands[0][at]] if at < len(operands[0]) else []
        if op.opcode == "tuple":
            return [_all(parts) for parts in operands]
        if op.opcode in ("bitcast", "opt-barrier"):
            return operands[0]
        if op.opcode == "while":
            self._name_stacks(op, operands[0])
            return operands[0]
        if op.opcode.endswith(("-done", "-update")):
            dims = [shape.dims for shape in op.shapes]
            kept = [b for b in _all(operands[0]) if b.dims in dims]
            return [[b] for b in kept[-len(op.parts) :]] or operands[0]
        if op.opcode == "constant" or (op.opcode == "custom-call" and not op.shapes):
            return [[] for _ in op.parts]
        mine = _all([part for parts in operands for part in parts])
        in_place = self._updated(op, operands)
        parts: Parts = []
        for number, part in enumerate(op.parts):
            buffers = []
            for shape in part:
                if shape.space != HBM or shape.dtype in ("token", "opaque"):
                    continue
                same = next((b for b in mine if b.dims == shape.dims and b in in_place), None)
                if same is None and op.opcode.endswith("-start"):
                    same = next((b for b in mine if b.dims == shape.dims), None) if number else None
                buffers.append(same or Buffer(shape.padded, op, shape.dims, shape.dtype))
            parts.append(buffers)
        return parts

    def _updated(self, op: Op, operands: list[Parts]) -> set[Buffer]:
        """Operands that an op writes a part of, in place."""
        if op.opcode == "dynamic-update-slice":
            return set(_all(operands[0]))
        body = self.module.called(op) if op.opcode == "fusion" else None
        found: set[Buffer] = set()
        for inner in body.ops.values() if body is not None else ():
            target = inner
            if inner.opcode == "dynamic-update-slice":
                target = body.ops[inner.operands[0]]
                while target.opcode in _SAME:
                    target = body.ops[target.operands[0]]
            elif inner.opcode != "parameter" or not self._passed(body, inner):
                continue
            if target.opcode == "parameter":
                found.update(_all(operands[int(target.value)]))
        return found

    def _passed(self, body: Computation, parameter: Op) -> bool:
        """Whether a fusion hands an operand on as it is, as those that carry collectives do."""
        users = [op for op in body.ops.values() if parameter.name in op.operands]
        return any(
            op.is_root and (op.opcode == "tuple" or "AsyncCollective" in op.text) for op in users
        )

    def _name_stacks(self, loop: Op, carried: Parts) -> None:
        """Lets a stack that a loop fills be known by what is written into it."""
        body, trips = self.module.called(loop, "body"), self.module.trips(loop) or 0
        for part, name in zip(carried, body.root.operands, strict=False):
            written = self._written(body, body.ops[name])
            for buffer in part:
                if written is not None and buffer.dims[:1] == (trips,) and not buffer.layers:
                    buffer.op, buffer.layers = written, trips

    def _written(self, body: Computation, op: Op) -> Op | None:
        """The op whose result a stack receives, seen through slices, views and fusions."""
        while op.opcode in _SAME:
            op = body.ops[op.operands[0]]
        if op.opcode == "get-tuple-element":
            op = body.ops[op.operands[0]]
        if op.opcode == "fusion" and (inner := self.module.called(op)) is not None:
            updates = [o for o in inner.ops.values() if o.opcode == "dynamic-update-slice"]
            if not updates:
                return None
            source = inner.ops[updates[0].operands[1]]
            while source.opcode in _SAME:
                source = inner.ops[source.operands[0]]
            if source.opcode != "parameter":
                return source if source.op_name else op
            return self._made(body, op.operands[int(source.value)])
        if op.opcode == "dynamic-update-slice":
            return self._made(body, op.operands[1])
        return None

    def _made(self, body: Computation, name: str) -> Op:
        op = body.ops[name]
        while op.opcode in (*_SAME, "get-tuple-element") or op.opcode.endswith("-done"):
            before = body.ops.get(op.operands[0]) if op.operands else None
            if before is None or before.opcode == "parameter":
                break
            op = before
        return op


class _Names:
    """From a buffer to who holds it and under which name."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.weights = {
            _sizes(op.shapes[0].dims)
            for op in module.entry.ops.values()
            if op.opcode == "parameter" and "params" in op.op_name
        }

    def of(self, buffer: Buffer) -> tuple[str, str]:
        op, path = buffer.op, buffer.op.op_name
        if op.opcode == "parameter":
            name = ".".join(re.findall(r"'([^']+)'", path)) or path
            if "opt_state" in path:
                return "optimizer", "moments"
            return ("parameters" if "params" in path else "batch"), name
        source = self.module.source(op)
        inner = self.module.inside(op)
        if not source and inner:
            source = next((s for o in reversed(inner) if (s := self.module.source(o))), "")
            path = path or next((o.op_name for o in reversed(inner) if o.op_name), "")
        name = f"{source or op.opcode}: {path.rpartition('/')[2] or op.name}"
        if "models/loss.py" in source:
            return "logits and loss", name
        if _sizes(buffer.dims) in self.weights:
            back = "transpose(" in path
            return ("gradients" if back else "weights in compute type"), name
        if buffer.layers and "transpose(" not in path:
            what = name if path else "what goes into a layer"
            return "activations", f"{buffer.layers} x {what}"
        if any(o.collective for o in (op, *inner)):
            return "gathered and reduced", name
        return "temporaries", name


def _sizes(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size > 1))


def _all(parts: Parts) -> list[Buffer]:
    return [buffer for part in parts for buffer in part]
