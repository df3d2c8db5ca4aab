"""What a program does that nobody asked for, with its cost, its source line and a cure if known.

Each rule reads the rows of a walk (trainer/plan/cost.py). A finding is worth a line from
`LEAST_SHARE` of the step on.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from trainer.config import Experiment
from trainer.plan.cost import Row, Setting, Timing
from trainer.plan.hlo import HBM, Module

LEAST_SHARE = 0.005  # of the step's time; below it a finding is noise
HALF = 0.5  # of peak: a matmul below it is slow
_SMALL = 1 << 20  # bytes: collectives of scalars and norms are never worth a change
# What makes a matmul of a layer again in the backward pass when the name is not kept, by the line
# that it comes from.
_REMADE = {
    "rotated_qk": "project_qkv", "v": "project_qkv", "residual": "_layer", "gate": "mlp",
    "up": "mlp",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something to mend. seconds: what it costs a step; bytes: what it moves or holds."""

    rule: str
    what: str
    seconds: float
    bytes: float
    source: str
    cure: str


def audit(
    module: Module, timing: Timing, experiment: Experiment, setting: Setting
) -> list[Finding]:
    """Returns what is worth mending, the dearest first."""
    auditor = _Auditor(module, timing, experiment, setting)
    found = [finding for rule in auditor.rules() for finding in rule()]
    least = LEAST_SHARE * timing.seconds["estimate"]
    worth = [f for f in found if f.seconds >= least or f.rule in ("padding", "full logits")]
    return sorted(worth, key=lambda finding: -finding.seconds)


class _Auditor:
    def __init__(self, module, timing, experiment, setting) -> None:
        self.module: Module = module
        self.timing: Timing = timing
        self.experiment: Experiment = experiment
        self.setting: Setting = setting

    def rules(self):
        return (
            self.recompute, self.synchronous, self.all_reduce, self.resharding, self.one_core,
            self.slow_matmuls, self.padding, self.full_logits,
        )  # fmt: skip

    def _path(self, row: Row) -> str:
        inside = (row.op, *reversed(self.module.inside(row.op)))
        return next((op.op_name for op in inside if op.op_name), "")

    def _by_source(self, rows) -> dict[str, list[Row]]:
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            groups[self.module.line_of(row.op)].append(row)
        return groups

    def recompute(self):
        """Matmuls and kernels of the forward pass that run again, beyond what remat asks for."""
        names = self.experiment.model.remat_names()
        kept = {name for part in names for name in part} if names is not None else None
        again = [r for r in self.timing.rows if r.flops and "rematted" in self._path(r)]
        for source, rows in self._by_source(again).items():
            function = source.rpartition(" ")[2]
            names = [n for n, where in _REMADE.items() if where == function]
            attention = rows[0].kind == "attention"
            planned = kept is not None and (
                "attention" not in kept if attention else any(n not in kept for n in names)
            )
            if planned:
                continue
            yield Finding(
                "recompute", "runs again in the backward pass, though what it makes is kept",
                sum(r.exposed for r in rows), sum(r.bytes for r in rows), source,
                "its inputs are not kept: keep them too (config.model.remat)",
            )  # fmt: skip

    def _collectives(self):
        return (
            r for r in self.timing.rows if r.kind == "collective" and r.bytes > _SMALL * r.times
        )

    def synchronous(self):
        """Collectives for which the step stands still."""
        waiting = [r for r in self._collectives() if r.exposed > 0.9 * r.seconds["estimate"]]
        for source, rows in self._by_source(waiting).items():
            labels = ", ".join(sorted({r.label for r in rows}))
            cure = "--config.perf=fast may overlap it, by options that are untested on hardware"
            if self.experiment.perf.startswith("fast"):
                cure = "no option for it is known; a larger microbatch makes it a smaller share"
            yield Finding(
                "synchronous", f"{labels}: nothing runs meanwhile", sum(r.exposed for r in rows),
                sum(r.bytes for r in rows), source, cure,
            )  # fmt: skip

    def all_reduce(self):
        """Gradients that every device gets whole where each needs a part."""
        gradients = [
            r for r in self._collectives()
            if r.label.startswith("all-reduce") and "fsdp" in r.label
            and "transpose(" in self._path(r)
        ]  # fmt: skip
        whole = len(self.setting.torus) and self.setting.mesh["fsdp"] >= (
            self.setting.devices // self.setting.slices
        )
        for source, rows in self._by_source(gradients).items():
            cure = "config.mesh.zero=2 or 3 lets each device keep its part"
            if self.experiment.mesh.zero >= 2:
                cure = (
                    "none: libtpu spells a reduce-scatter over a whole slice so; it can be hidden"
                )
                cure = cure if whole else "reduce over the whole slice: config.mesh.data=1"
            half = sum(r.exposed for r in rows) / 2
            yield Finding(
                "all-reduce", "twice the bytes of a reduce-scatter", half,
                sum(r.bytes for r in rows) / 2, source, cure,
            )  # fmt: skip

    def resharding(self):
        """Activations that change their layout inside a layer."""
        for row in self._collectives():
            path, source = self._path(row), self.module.line_of(row.op)
            moved = row.label.startswith(("all-to-all", "all-gather", "collective-permute"))
            asked = re.search(r"\b(leaf|_local|gathered)$", source) or "attention/" in source
            asked = asked or "all_tokens" in path
            if moved and "while/body" in path and not asked and not self._windowed(row):
                yield Finding(
                    "resharding", f"{row.label} of activations inside a layer", row.exposed,
                    row.bytes, source,
                    "give both sides one layout (sharding/rules.py), or reshard before the layer",
                )  # fmt: skip

    def _windowed(self, row: Row) -> bool:
        """A matmul cut into steps that permute weights: a choice of XLA's, not a layout."""
        return row.label.startswith("collective-permute") and "dot_general" in self._path(row)

    def one_core(self):
        """Kernels whose work cannot be split over the two cores of a chip."""
        if self.setting.chip.name not in ("v4", "v5p"):
            return
        for row in self.timing.rows:
            if row.kind != "attention":
                continue
            heads = [s.dims[0] for s in row.op.shapes if len(s.dims) >= 3][:1]
            if heads and heads[0] % 2:
                yield Finding(
                    "one core", f"{heads[0]} head(s) cannot be split over two cores",
                    row.exposed / 2, row.bytes, self.module.line_of(row.op),
                    "an even number of rows times KV heads per device: a smaller "
                    "config.mesh.tensor or a larger batch",
                )  # fmt: skip

    def slow_matmuls(self):
        """Matmuls under half of the chip's peak by XLA's cycles, and not bound by memory."""
        peak = self.setting.chip.flops_bf16
        slow = [
            r for r in self.timing.rows
            if r.kind == "matmul" and r.flops < HALF * peak * r.seconds["estimate"]
            and r.seconds["roofline"] < HALF * r.seconds["estimate"]
        ]  # fmt: skip
        for source, rows in self._by_source(slow).items():
            seconds, flops = sum(r.seconds["estimate"] for r in rows), sum(r.flops for r in rows)
            yield Finding(
                "slow matmul", f"{flops / seconds / peak:.0%} of peak", seconds - flops / peak,
                sum(r.bytes for r in rows), source,
                "elementwise work fused into it, or a dimension that is too small",
            )  # fmt: skip

    def padding(self):
        """Large arrays that tiles make much larger."""
        seen = set()
        for op in self.module.entry.ops.values():
            for shape in op.shapes:
                waste = shape.padded - shape.bytes
                if (
                    shape.space != HBM
                    or waste < max(64 * _SMALL, shape.bytes)
                    or shape.dims in seen
                ):
                    continue
                seen.add(shape.dims)
                yield Finding(
                    "padding", f"{shape.dtype}{list(shape.dims)} takes "
                    f"{shape.padded / shape.bytes:.1f} times its size", 0.0, waste,
                    self.module.source(op) or op.op_name,
                    "multiples of 128 in the last dimension and of 8 before it",
                )  # fmt: skip

    def full_logits(self):
        """Logits of the whole batch at once, where chunks would do."""
        vocab = self.experiment.model.padded_vocab // self.setting.mesh["tensor"]
        # Twice what models/loss.py takes at once: the head's float32 gradient, or 32 MiB.
        limit = 2 * max(vocab * self.experiment.model.width * 4, 32 * _SMALL)
        seen = set()
        loops = [
            self.module.called(op, "body")
            for computation in self.module.computations.values()
            for op in computation.ops.values()
            if op.opcode == "while"
        ]
        for computation in (self.module.entry, *loops):  # inside a fusion nothing is stored
            for op in computation.ops.values():
                for shape in op.shapes:
                    if vocab not in shape.dims or shape.padded <= limit or shape.dims in seen:
                        continue
                    if shape.space != HBM or op.opcode == "parameter":
                        continue
                    seen.add(shape.dims)
                    yield Finding(
                        "full logits", f"{shape.dtype}{list(shape.dims)}, of a whole microbatch",
                        0.0, shape.padded, self.module.source(op),
                        "config.model.loss_chunks=0 chooses chunks by size",
                    )  # fmt: skip
