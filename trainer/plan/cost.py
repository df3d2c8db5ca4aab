"""How long one step takes: a walk over the program's schedule, op by op.

Three models of an op's time give an estimate and its range:
  roofline   matmuls at peak FLOP/s, everything else at the memory's full bandwidth: a lower bound;
  estimate   matmuls as long as XLA's cycle model says, everything else by its bytes;
  cycles     XLA's cycles for everything, which are 2.4 to 2.8 times too slow for elementwise work.
A collective that starts and ends in two places hides only behind what runs between them; one that
rides in fusions ("async collective fusion") only behind those. Everything here is a compiler's
estimate, not a measurement.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from models.attention.tpu_cost import kernel_seconds
from sharding.hardware import Chip
from trainer.plan.hlo import (
    HBM,
    Computation,
    Module,
    Op,
    convolution_flops,
    group_of,
    mesh_axes,
)

MODELS = ("roofline", "estimate", "cycles")
LINK_SHARE = 0.9  # of a link's datasheet bandwidth that collectives are taken to reach

# Ops that name or regroup what is there, or cost nothing worth counting.
_FREE = frozenset((
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain", "iota", "add-dependency",
))  # fmt: skip
_VIEWS = frozenset(("bitcast", "copy", "reshape", "convert", "transpose"))


@dataclass(frozen=True)
class Setting:
    """What a program runs on and what the text does not say.

    mesh: axis → size, all axes, in the order of the program's devices.
    torus: chips along each dimension of a slice; wrap: whether its rings close.
    slices: how many slices there are. GPUs: (GPUs of a host,), True, and how many hosts.
    network: bytes/s between hosts, of one GPU.
    visible: mean keys that a query sees, per kind of layer, for the attention kernels.
    """

    chip: Chip
    mesh: dict[str, int]
    torus: tuple[int, ...]
    wrap: bool
    slices: int = 1
    visible: tuple[float, ...] = ()
    network: float = 0.0

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())


@dataclass
class Row:
    """One op of the program, over the whole step. Times are seconds."""

    op: Op
    computation: str
    times: int  # how often it runs in a step
    kind: str  # matmul | attention | elementwise | collective | copy
    label: str  # the kind; of a collective which one and over which axes of the mesh
    flops: float
    bytes: float  # moved in device memory; of a collective over the links
    seconds: dict[str, float]  # by model, as if nothing were hidden
    exposed: float  # of the estimate: what the step waits for


@dataclass(frozen=True)
class Span:
    """When an op runs in one turn of its computation, in seconds of the estimate.

    stream: compute, links, memory or sparsecore; wait: nothing computes until a transfer is there.
    """

    op: Op
    label: str  # as of a Row; of a loop, how many turns it makes
    stream: str
    start: float
    end: float


@dataclass
class Timing:
    """A step's time and where it goes."""

    seconds: dict[str, float]  # of the step, by model
    rows: list[Row]
    spans: dict[str, list[Span]]  # of each computation that runs by itself: entry, loops, calls
    flops: float  # of matmuls and attention kernels, recomputation included
    notes: list[str] = field(default_factory=list)

    def shares(self) -> dict[str, tuple[float, float]]:
        """Returns kind (collectives: kind and axis) → (seconds that the step waits, hidden)."""
        shares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in self.rows:
            shares[row.label][0] += row.exposed
            shares[row.label][1] += max(0.0, row.seconds["estimate"] - row.exposed)
        return {k: (a, b) for k, (a, b) in sorted(shares.items(), key=lambda s: -sum(s[1]))}

    def work(self) -> dict[str, tuple[float, float]]:
        """Returns the same kinds → (FLOPs, bytes)."""
        work: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in self.rows:
            work[row.label][0] += row.flops
            work[row.label][1] += row.bytes
        return {label: (flops, moved) for label, (flops, moved) in work.items()}


def time_step(module: Module, setting: Setting) -> Timing:
    """Returns the time of one run of the program's entry."""
    walker = _Walker(module, setting)
    seconds = {model: walker.run(module.entry, 1, model) for model in MODELS}
    rows = list(walker.rows.values())
    flops = sum(row.flops for row in rows)
    return Timing(seconds, rows, walker.spans, flops, sorted(walker.notes))


def guessed_axes(setting: Setting, size: int) -> int:
    """Torus axes that a collective among `size` devices uses, where the program does not say."""
    whole = size >= setting.devices // setting.slices
    return max(1, sum(n > 1 for n in setting.torus)) if whole else 1


def link_bandwidth(setting: Setting, axes: int, *, one_way: bool = False) -> float:
    """Bytes/s that each device sends in a collective over so many torus axes."""
    bandwidth = setting.chip.ici_bandwidth * LINK_SHARE * axes
    return bandwidth / 2 if one_way or not setting.wrap else bandwidth  # one way round only


class _Walker:
    """The state of a walk. Ops are costed once and shared by the three models."""

    def __init__(self, module: Module, setting: Setting) -> None:
        self.module, self.setting = module, setting
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.spans: dict[str, list[Span]] = {}
        self.notes: set[str] = set()
        self._costs: dict[tuple[str, str], Row] = {}

    def run(self, computation: Computation, times: int, model: str) -> float:
        """Returns the seconds of one run of `computation`, which happens `times` times a step."""
        now, streams = 0.0, defaultdict(float)  # when each engine is free again
        pending: dict[str, tuple[str, float, Row]] = {}  # started op → engine, end, row
        riding: dict[tuple[str, ...], list] = {}  # chain → [row, seconds covered so far, start]
        spans: list[Span] = []
        if model == "estimate":
            self.spans[computation.name] = spans
        for op in computation.ops.values():
            before = now
            if op.opcode in _FREE:
                continue
            if op.opcode == "while":
                trips = self.module.trips(op)
                if trips is None:
                    self.notes.add(f"a loop of unknown length counted once: {op.op_name}")
                body = self.module.called(op, "body")
                now += (trips or 1) * self.run(body, times * (trips or 1), model)
                spans.append(Span(op, f"{trips or 1} turns", "compute", before, now))
            elif op.opcode == "conditional":
                names = re.findall(r"%([\w.\-]+)", op.text.partition("metadata=")[0])
                called = [
                    self.module.computations[n] for n in names if n in self.module.computations
                ]
                now += max((self.run(c, times, model) for c in called), default=0.0)
                spans.append(Span(op, "conditional", "compute", before, now))
            elif op.opcode == "call":
                now += self.run(self.module.called(op, "to_apply"), times, model)
                spans.append(Span(op, "call", "compute", before, now))
            elif op.opcode.endswith(("-done", "-update")) and op.operands:
                started = pending.pop(op.operands[0], None)
                if started is None:
                    continue
                engine, end, row = started
                if op.opcode.endswith("-update"):
                    if engine == "sparsecore":  # its data comes with the update
                        end = streams["links"] = max(now, streams["links"]) + row.seconds[model]
                        spans.append(Span(row.op, row.label, engine, end - row.seconds[model], end))
                    pending[op.name] = (engine, end, row)
                    continue
                self._expose(row, times, max(0.0, end - now), model)
                now = max(now, end)
                spans.append(Span(row.op, row.label, "wait", before, now))
            elif op.opcode.endswith("-start"):
                row = self._cost(computation, op)
                engine = "memory" if row.kind == "copy" else "links"
                if op.opcode == "custom-call-start":
                    engine = "sparsecore" if row.kind == "collective" else "memory"
                end = streams[engine] = max(now, streams[engine]) + row.seconds[model]
                pending[op.name] = (engine, end, row)
                self._count(row, times, 0.0, model)
                if engine != "sparsecore":
                    spans.append(Span(op, row.label, engine, end - row.seconds[model], end))
            else:
                now += self._run_op(computation, op, times, model, riding, now, spans)
                cost = self._costs.get((computation.name, op.name))
                waits = cost is None or cost.kind == "collective"
                label = cost.label if cost else "collective"
                spans.append(Span(op, label, "wait" if waits else "compute", before, now))
        return now

    def _run_op(
        self, computation, op: Op, times: int, model: str, riding: dict, now: float, spans: list
    ) -> float:
        """Returns the seconds for which an op that begins `now` holds up the schedule."""
        inner = self.module.inside(op) if op.opcode == "fusion" else [op]
        carried = [i for i in inner if i.collective and i.attribute("chain_id")]
        plain = next((i for i in inner if i.collective and not i.attribute("chain_id")), None)
        if plain is not None:
            row = self._cost(computation, op)
            self._count(row, times, row.seconds[model], model)
            return row.seconds[model]
        targets = {i.attribute("custom_call_target") for i in inner if i.opcode == "custom-call"}
        waited = 0.0
        ends = targets & {"AsyncCollectiveStart", "AsyncCollectiveDone"}
        bare = carried and ends and not any(i.opcode == "convolution" for i in inner)
        own = None if bare else self._cost(computation, op)
        for collective in carried:
            chain = (collective.attribute("channel_id"), collective.attribute("chain_id"))
            if chain not in riding:
                row = self._collective(computation, op, collective)
                riding[chain] = [row, 0.0, now]
                self._count(row, times, 0.0, model)
            if own is not None:
                riding[chain][1] += own.seconds[model] / len(carried)
            if "AsyncCollectiveDone" in targets:
                row, covered, start = riding.pop(chain)
                waited = max(0.0, row.seconds[model] - covered)
                self._expose(row, times, waited, model)
                end = now + waited + (own.seconds[model] if own is not None else 0.0)
                spans.append(Span(op, row.label, "links", start, end))
        if own is None:
            return waited
        self._count(own, times, own.seconds[model], model)
        return waited + own.seconds[model]

    def _count(self, cost: Row, times: int, exposed: float, model: str) -> None:
        if model != "estimate":
            return
        key = (cost.computation, cost.op.name, cost.label)
        if key not in self.rows:
            self.rows[key] = Row(
                cost.op, cost.computation, 0, cost.kind, cost.label, 0.0, 0.0,
                dict.fromkeys(MODELS, 0.0), 0.0,
            )  # fmt: skip
        row = self.rows[key]
        row.times += times
        row.flops += times * cost.flops
        row.bytes += times * cost.bytes
        row.exposed += times * exposed
        for name in MODELS:
            row.seconds[name] += times * cost.seconds[name]

    def _expose(self, cost: Row, times: int, seconds: float, model: str) -> None:
        if model == "estimate":
            self.rows[cost.computation, cost.op.name, cost.label].exposed += times * seconds

    # ------------------------------------------------------------ one op

    def _cost(self, computation: Computation, op: Op) -> Row:
        key = (computation.name, op.name)
        if key not in self._costs:
            self._costs[key] = self._new_cost(computation, op)
        return self._costs[key]

    def _new_cost(self, computation: Computation, op: Op) -> Row:
        chip = self.setting.chip
        inner = self._wrapped(op)
        alone = (i for i in inner if i.collective and not i.attribute("chain_id"))
        if (collective := next(alone, None)) is not None:
            return self._collective(computation, op, collective)
        shapes = {o.name: o.shapes[0] for o in computation.ops.values() if o.shapes}
        if op.attribute("custom_call_target") == "tpu_custom_call":
            operands = [(s.dtype, s.dims) for n in op.operands for s in computation.ops[n].shapes]
            bytes_ = float(
                sum(s.padded for n in op.operands for s in self._hbm(computation.ops[n]))
            )
            bytes_ += sum(s.padded for s in self._hbm(op))
            stream = bytes_ / chip.hbm_bandwidth
            try:
                flops, seconds = kernel_seconds(
                    f"{op.name} {op.op_name}", operands, self.setting.visible, chip
                )
            except IndexError:  # no array with heads: another kernel than attention
                self.notes.add(f"a kernel without a cost, timed by its bytes: {op.op_name}")
                return _row(computation, op, "elementwise", 0.0, bytes_, (stream,) * 3)
            roof = max(flops / chip.flops_bf16, stream)
            times = (roof, max(seconds, stream), max(seconds, stream))
            return _row(computation, op, "attention", flops, bytes_, times)
        flops = sum(
            convolution_flops(i, {o.name: o.shapes[0] for o in body.ops.values() if o.shapes})
            for i, body in self._convolutions(op)
        )
        if op.opcode == "convolution":
            flops = convolution_flops(op, shapes)
        bytes_ = self._bytes(computation, op)
        stream, cycles = bytes_ / chip.hbm_bandwidth, op.cycles / chip.clock
        if op.opcode.endswith("-start"):
            return _row(computation, op, "copy", 0.0, bytes_, (stream,) * 3)
        if flops:
            roof = max(flops / chip.flops_bf16, stream)
            times = (roof, max(roof, cycles), max(cycles, roof))
            return _row(computation, op, "matmul", flops, bytes_, times)
        return _row(computation, op, "elementwise", 0.0, bytes_, (stream, stream, cycles or stream))

    def _wrapped(self, op: Op) -> list[Op]:
        """The op itself and what it calls, for fusions and the starts of asynchronous ops."""
        called = self.module.called(op) or self.module.called(op, "called_computations")
        return [op, *(called.ops.values() if called is not None else ()), *self.module.inside(op)]

    def _convolutions(self, op: Op):
        if (body := self.module.called(op)) is None:
            return
        for inner in body.ops.values():
            if inner.opcode == "convolution":
                yield inner, body
            yield from self._convolutions(inner)

    def _hbm(self, op: Op):
        return [shape for shape in op.shapes if shape.space == HBM]

    def _bytes(self, computation: Computation, op: Op) -> float:
        """Bytes that an op moves in device memory; slices of larger arrays count as such."""
        if op.opcode.endswith("-start"):  # a copy between memories: one side is read or written
            spaces = [shape for part in op.parts[:2] for shape in part]
            hbm = [s.padded for s in spaces if s.space == HBM]
            size = min((s.padded for s in spaces), default=0)
            return float(size * len(hbm))
        body = self.module.called(op)
        total = 0.0
        for index, name in enumerate(op.operands):
            operand = computation.ops.get(name)
            if operand is None or not operand.shapes or operand.shapes[0].space != HBM:
                continue
            full = float(sum(shape.padded for shape in operand.shapes))
            total += min(full, self._read(body, index)) if body is not None else full
        if op.opcode in ("dynamic-slice", "slice", "gather"):
            return 2.0 * sum(s.padded for s in self._hbm(op))
        if op.opcode == "dynamic-update-slice":
            return 2.0 * computation.ops[op.operands[1]].shapes[0].padded
        written = self._written(body) if body is not None else None
        return total + sum(
            shape.padded if written is None else min(shape.padded, size)
            for shape, size in zip(op.shapes, written or [0] * len(op.shapes), strict=False)
            if shape.space == HBM
        )

    def _read(self, body: Computation, index: int) -> float:
        """Bytes that a fusion reads of its operand: only the slices, if it only takes slices."""
        try:
            parameter = body.parameter(index)
        except StopIteration:
            return float("inf")
        total, names = 0.0, [parameter.name]
        for name in names:  # grows while it is walked: what merely renames is followed
            for user in body.ops.values():
                if name not in user.operands:
                    continue
                if user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += user.shapes[0].padded
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    continue  # written in place
                elif user.opcode == "tuple" or _carries(user):
                    continue  # passed on; a collective's bytes are its own
                elif user.opcode in _VIEWS:
                    names.append(user.name)
                elif user.opcode == "fusion" and (nested := self.module.called(user)):
                    index = user.operands.index(name)
                    if _seen_through(nested, nested.root) is nested.parameter(index):
                        names.append(user.name)
                    else:
                        total += self._read(nested, index)
                else:
                    return float("inf")
        return total

    def _written(self, body: Computation) -> list[float]:
        """Bytes that a fusion writes per result: only the update, where it updates in place."""
        root = body.root
        results = [body.ops[n] for n in root.operands] if root.opcode == "tuple" else [root]
        sizes = []
        for result in results:
            result = _seen_through(body, result)
            size = float("inf")
            if result.opcode in ("parameter", "get-tuple-element") or _carries(result):
                size = 0.0
            elif result.opcode == "dynamic-update-slice":
                size = float(body.ops[result.operands[1]].shapes[0].padded)
            elif result.opcode == "fusion" and (nested := self.module.called(result)):
                size = self._written(nested)[0]
            sizes.append(size)
        return sizes

    # ------------------------------------------------------------ collectives

    def _collective(self, computation: Computation, op: Op, inner: Op) -> Row:
        """The row of a collective, which may sit inside a fusion with what belongs to it."""
        setting, kind = self.setting, inner.collective
        group = group_of(inner, setting.devices) or group_of(op, setting.devices)
        size, axis = max(len(group), 1), mesh_axes(group, setting.mesh)
        around = {i.opcode for i in self._wrapped(op)} if op is not inner else set()
        full = float(max(sum(s.bytes for s in inner.shapes), 0))
        if inner.opcode.endswith("-start"):  # (operands, results, …): results are the larger
            full = float(max(sum(s.bytes for s in part) for part in inner.parts[:2]))
        elif kind == "reduce-scatter":
            full *= size
        if kind == "all-reduce" and "dynamic-slice" in around:
            kind = "reduce-scatter"  # libtpu spells it as an all-reduce fused with a slice
        label = f"{kind} over {axis}"
        per_full = {"all-reduce": 2.0, "collective-permute": 1.0}.get(kind, 1.0)
        share = 1.0 if kind == "collective-permute" else (size - 1) / size
        wire = full * per_full * share
        per_slice = setting.devices // setting.slices
        if setting.slices > 1 and len({device // per_slice for device in group}) > 1:
            self.notes.add(f"{kind} over {axis} crosses slices: its time is not in the estimate")
            return _row(computation, op, "collective", 0.0, wire, (0.0,) * 3, label)
        axes, one_way = inner.torus_axes or op.torus_axes, kind == "collective-permute"
        if axes is None:
            axes = 1 if one_way else guessed_axes(setting, size)
        bandwidth = link_bandwidth(setting, max(axes, 1), one_way=one_way)
        if "all-to-all" in kind:
            wire *= max(1.0, size / (4 if setting.wrap else 3) / max(axes, 1))  # mean distance
        return _row(computation, op, "collective", 0.0, wire, (wire / bandwidth,) * 3, label)


def _seen_through(body: Computation, op: Op) -> Op:
    """Returns what an op is a view of; inside a fusion views are never written out."""
    while op.opcode in _VIEWS:
        op = body.ops[op.operands[0]]
    return op


def _carries(op: Op) -> bool:
    """Whether an op inside a fusion is a step of a collective that the fusion carries."""
    return bool(op.collective) or op.attribute("custom_call_target").startswith("AsyncCollective")


def _row(
    computation: Computation, op: Op, kind: str, flops: float, bytes_: float,
    seconds: Sequence[float], label: str = "",
) -> Row:  # fmt: skip
    times = dict(zip(MODELS, seconds, strict=True))
    return Row(op, computation.name, 1, kind, label or kind, flops, bytes_, times, 0.0)
