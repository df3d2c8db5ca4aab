"""What counts as a healthy step, and where a run goes back to when its steps are not: pure rules.

A step is unhealthy when its update was left out as not finite, or when its loss or gradient norm
lies far above the median of recent healthy steps, measured in their median absolute deviations.
Every process is told the same replicated numbers in the same order, so all of them decide alike;
what the rules remember goes into each checkpoint, so a run that resumes decides as if it had not
stopped. A rewind is one file, `rewinds.json`, and otherwise a resume: from an older checkpoint, at
a later row. Nothing here imports JAX.
"""

import collections
import dataclasses
import json
import math
import statistics
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from checkpoint.steps import write_whole
from sharding.errors import UsageError
from sharding.fields import Fields

DIVERGED, SUSPECT = 71, 77
"""Exit statuses: all rewinds are spent; a device or host gave other bits than it must."""

_SIGMA = 1.4826  # median absolute deviations in a standard deviation of a normal distribution
_LEAST = 0.01, 0.05  # spread of losses (as a share of the median) and of log gradient norms


@dataclass
class HealthConfig(Fields, at="config.health"):
    """When a step is unhealthy, and what follows from it.

    A step that is not finite is always left out. After an unhealthy stretch the run is rewound to
    its newest good checkpoint, past the data read since; after `rewinds` of them it ends with
    status 71.
    """

    window: int = 128  # recent healthy steps that each is compared with; 0 = judge nothing
    factor: float = 6.0  # robust standard deviations above their median that make a step unhealthy
    skip_spikes: bool = False  # leave out the updates of unhealthy steps, not only record them
    sustained: int = 8  # unhealthy steps among twice as many that rewind the run
    good_after: int = 50  # healthy steps that follow a checkpoint before it counts as good
    rewinds: int = 3  # rewinds after which the run ends
    compare_every: int = 1000  # steps between comparisons of the state's replicas; 0 = never
    # Every how many steps one is done twice, from a copy of the state in device memory; 0 = never.
    replay_every: int = 0
    chaos: str = ""  # faults to inject, in the language of trainer/recovery/chaos.py; "" = none

    def validate(self) -> None:
        """Raises UsageError for values that cannot be used."""
        for name, least in (
            ("window", 0), ("factor", 1), ("sustained", 1), ("good_after", 1), ("rewinds", 0),
            ("compare_every", 0), ("replay_every", 0),
        ):  # fmt: skip
            if (value := getattr(self, name)) < least:
                raise UsageError(f"config.health.{name} = {value}: at least {least}")


class Unhealthy(RuntimeError):
    """The run cannot go on here: one line that says why, and the status to exit with."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Watch:
    """The rules over the steps of one run, told the numbers of one step after another."""

    def __init__(self, config: HealthConfig, state: dict[str, Any] | None = None) -> None:
        """Begins anew, or where `state`, an earlier watch's, ended."""
        self._config, state = config, state or {}
        # One more than the window: a step is judged by those that ended before it was started.
        self._recent = collections.deque(state.get("recent", []), config.window + 1)
        self._verdicts = collections.deque(state.get("verdicts", []), 2 * config.sustained)
        self._since = state.get("since", 0)
        self.good = state.get("good", -1)  # the newest step that enough healthy ones followed

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: JSON values."""
        recent, verdicts = list(self._recent), list(self._verdicts)
        return {"recent": recent, "verdicts": verdicts, "since": self._since, "good": self.good}

    def limits(self, step: int) -> tuple[float, float]:
        """Returns the largest healthy loss and gradient norm of `step`, float32 numbers.

        Known before the step is started: from the steps up to the last but one.
        """
        known = [entry[1:] for entry in self._recent if entry[0] <= step - 2]
        known = known[-self._config.window :] if self._config.window else []
        if not known or 2 * len(known) < self._config.window:
            return math.inf, math.inf
        losses, norms = zip(*known, strict=True)
        least = _LEAST[0] * abs(statistics.median(losses)), _LEAST[1]
        loss, norm = (self._limit(v, s) for v, s in zip((losses, norms), least, strict=True))
        return _float32(loss), _float32(math.exp(min(norm, 80.0)))

    def judge(self, step: int, loss: float, grad_norm: float, skipped: bool) -> str:
        """Takes note of a step; returns "" for a healthy one, else "non-finite" or "spike"."""
        loss_limit, norm_limit = self.limits(step)
        verdict = ""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            verdict = "non-finite"
        elif skipped or loss > loss_limit or grad_norm > norm_limit:
            verdict = "spike"
        else:
            self._recent.append([step, loss, math.log(max(grad_norm, 1e-30))])
        self._verdicts.append(int(bool(verdict)))
        if verdict:
            self._since = step
        elif step - self._since >= self._config.good_after:
            self.good = step - self._config.good_after
        return verdict

    @property
    def sustained(self) -> bool:
        """Whether the last steps say that it will not get better by itself."""
        return sum(self._verdicts) >= self._config.sustained

    def _limit(self, values: tuple[float, ...], least: float) -> float:
        middle = statistics.median(values)
        spread = _SIGMA * statistics.median(abs(value - middle) for value in values)
        return middle + self._config.factor * max(spread, least)


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@dataclass(frozen=True)
class Rewinds:
    """How often a run went back, and what the last time fixed.

    Attributes:
      count: rewinds so far. Checkpoints say how many came before them; those with fewer that are
        newer than `to` belong to what was given up.
      spent: how many of them count against the budget.
      to, row: the step that the run went on from, and the first row of data that it read then.
    """

    count: int = 0
    spent: int = 0
    to: int = 0
    row: int = 0

    @classmethod
    def read(cls, folder: Path) -> "Rewinds":
        """Returns what the run's folder says: none, if it never went back."""
        path = folder / "rewinds.json"
        try:
            return cls(**read_json(path)) if path.exists() else cls()
        except TypeError as error:
            raise UsageError(f"{path} does not count rewinds: {error}") from error

    def write(self, folder: Path) -> None:
        """Puts it into the run's folder, whole or not at all."""
        write_whole(folder / "rewinds.json", json.dumps(dataclasses.asdict(self)).encode())

    def gave_up(self, step: int, meta: dict[str, Any]) -> bool:
        """Whether the run went back past a checkpoint of `step` with `meta`."""
        return step > self.to and meta.get("rewinds", 0) < self.count

    def row_after(self, meta: dict[str, Any], row: int) -> int:
        """Returns where the data goes on after a checkpoint with `meta` that stored `row`."""
        return self.row if meta.get("rewinds", 0) < self.count else row
