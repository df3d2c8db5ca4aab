"""What a compiled program says about a run: time, speed, where both go, and what is held.

One call from the program's text to the numbers that `torus plan` shows; it compiles nothing, so a
stored text serves as well. Times are a compiler's estimate.
"""

from dataclasses import asdict, dataclass

from models.flops import train_flops_per_token, visible_keys
from sharding.hardware import CHIPS
from sharding.topology import Slice
from trainer.config import Experiment
from trainer.plan.audit import Finding, audit
from trainer.plan.cost import Setting, time_step
from trainer.plan.hlo import parse
from trainer.plan.memory import Held, memory_at_peak

LINES = 24  # of the memory table that are kept by name


@dataclass(frozen=True)
class Forecast:
    """One step of one program. Seconds per step; bytes per device.

    seconds: by model of trainer/plan/cost.py: roofline, estimate, cycles.
    shares: what the time goes to → (seconds that the step waits for it, seconds hidden).
    work: the same → (FLOPs of one device, bytes through its memory or over its links).
    mfu: by model: model FLOPs (models/flops.py) over peak, for these seconds.
    tokens_per_second: of one chip, for the estimate.
    executed_flops: of one device, recomputation included.
    """

    seconds: dict[str, float]
    shares: dict[str, tuple[float, float]]
    work: dict[str, tuple[float, float]]
    mfu: dict[str, float]
    tokens_per_second: float
    executed_flops: float
    walked_peak: int
    holders: dict[str, int]
    held: list[Held]
    findings: list[Finding]
    notes: list[str]

    def to_json(self) -> dict:
        return asdict(self)


def setting_of(experiment: Experiment, target: Slice, mesh: dict[str, int]) -> Setting:
    """Returns what the walk must know beside the program."""
    model, length = experiment.model, experiment.data.seq_len
    visible = tuple(sorted({visible_keys(model, kind, length) for kind in model.pattern}))
    wrap = any(target.wrap[: len(target.shape)])
    chip = CHIPS[target.chip]
    return Setting(chip, mesh, target.shape, wrap, target.count, visible, target.network)


def forecast(text: str, experiment: Experiment, target: Slice, mesh: dict[str, int]) -> Forecast:
    """Returns the forecast of the program `text` of the experiment's train step.

    Args:
      experiment: with its remat chosen, because the audit compares with it.
      mesh: axis → size, all axes.

    Raises:
      ValueError: the text is not that of a scheduled program.
    """
    module, setting = parse(text), setting_of(experiment, target, mesh)
    timing, memory = time_step(module, setting), memory_at_peak(module)
    tokens = experiment.train.batch_size * experiment.data.seq_len
    needed = tokens * train_flops_per_token(experiment.model, experiment.data.seq_len)
    peak = setting.chip.flops_bf16 * target.devices
    return Forecast(
        seconds=timing.seconds,
        shares=timing.shares(),
        work=timing.work(),
        mfu={model: needed / seconds / peak for model, seconds in timing.seconds.items()},
        tokens_per_second=tokens / timing.seconds["estimate"] / target.chips,
        executed_flops=timing.flops,
        walked_peak=memory.peak,
        holders=memory.by_holder(),
        held=memory.held[:LINES],
        findings=audit(module, timing, experiment, setting),
        notes=timing.notes,
    )
