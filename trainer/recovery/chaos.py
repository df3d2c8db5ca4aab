"""Faults on purpose, for tests: which, when and where is a schedule that can be run again.

A schedule is faults separated by commas, each KIND@STEP, then `xCOUNT` for several, `/rankN` for
one process and `/PHASE` for a phase of trainer/recovery/progress.py instead of `step`. STEP is a
number, or `?SEED`: one of the run's steps, drawn from the seed.

  nan, spike, error   the data of COUNT steps from STEP on: makes a gradient that is not finite, is
                      scrambled, or so many reads fail (`xinf`: all); skipped data takes them along
  flip                one bit of the state on one device, before STEP
  kill, stop, stuck   the process at STEP: SIGKILL, SIGSTOP, or asleep for ever; once in a run
"""

import math
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoint.steps import folder_path
from sharding.errors import UsageError, nearest
from trainer.data.rows import Rows, Steps
from trainer.recovery.progress import PHASES, ProgressPage

DATA, PROCESS = ("spike", "error"), ("kill", "stop", "stuck")
KINDS = ("nan", *DATA, "flip", *PROCESS)
_FORM = re.compile(r"(\w+)@(\?)?(\d+)(?:x(\d+|inf))?(?:/rank(\d+))?(?:/(\w+))?")


@dataclass(frozen=True)
class Fault:
    """One entry of a schedule."""

    kind: str
    step: int
    count: float = 1
    rank: int | None = None
    phase: str = "step"


def parse(schedule: str, steps: int) -> list[Fault]:
    """Returns the faults of a schedule for a run of so many steps.

    Raises:
      UsageError: naming the entry that is none.
    """
    faults = []
    for entry in filter(None, schedule.split(",")):
        match = _FORM.fullmatch(entry.strip())
        kind, drawn, number, count, rank, phase = match.groups() if match else (entry, *[None] * 5)
        if not match or kind not in KINDS or (phase or "step") not in PHASES:
            raise UsageError(
                f"config.health.chaos: {entry!r} is not KIND@STEP[xCOUNT][/rankN][/PHASE] with a "
                f"kind of {', '.join(KINDS)}{nearest(kind, KINDS)}"
            )
        step = random.Random(int(number)).randint(1, steps) if drawn else int(number)
        faults.append(
            Fault(kind, step, float(count or 1), int(rank) if rank else None, phase or "step")
        )
    return faults


class Chaos:
    """The faults of one process of a run; without a schedule everything is handed back as it is."""

    def __init__(self, schedule: str, steps: int, workdir: str) -> None:
        """Raises UsageError for a schedule that is none."""
        rank = int(os.environ.get("JAX_PROCESS_ID", "0"))
        found = parse(schedule, steps)
        self._faults = [fault for fault in found if fault.rank in (None, rank)]
        self._fired = folder_path(workdir) / "chaos"
        self._rank = rank

    def page(self, page: ProgressPage) -> ProgressPage:
        """Returns a page on which entering a phase may be the last thing that happens."""
        return _FaultyPage(page, self) if self._of(*PROCESS) else page

    def data(self, dataset: Steps) -> Steps:
        """Returns the dataset with the faults of the schedule in it."""
        return _FaultyData(dataset, self._of(*DATA)) if self._of(*DATA) else dataset

    def flip(self, step: int, state: Any) -> Any:
        """Returns the state, before `step` with a bit changed in the copy of one device."""
        if not any(fault.step == step for fault in self._of("flip")):
            return state
        import jax

        leaves, tree = jax.tree.flatten(state)
        place = max(range(len(leaves)), key=lambda n: leaves[n].size)
        shards = [shard.data for shard in leaves[place].addressable_shards]
        broken = np.array(shards[-1])
        broken.reshape(-1).view(np.uint8)[1] ^= 1  # of a small bit of the first element's fraction
        shards[-1] = jax.device_put(broken, shards[-1].device)
        leaves[place] = jax.make_array_from_single_device_arrays(
            leaves[place].shape, leaves[place].sharding, shards
        )
        return jax.tree.unflatten(tree, leaves)

    def step(
        self, batch: int, train_step: Callable, state: Any, *arguments: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Takes a step with the run's `batch`-th batch.

        No token makes a gradient that is not finite, so parameters do, and are then taken back.
        """
        if not any(f.step <= batch < f.step + f.count for f in self._of("nan")):
            return train_step(state, *arguments)
        import jax

        poison = jax.jit(lambda params: jax.tree.map(lambda p: p * math.nan, params))
        kept, poisoned = jax.jit(lambda s: jax.tree.map(jax.numpy.copy, (s, s)))(state)
        poisoned = poisoned.replace(params=poison(poisoned.params))
        after, metrics = train_step(poisoned, *arguments)
        return kept.replace(step=after.step, skipped=after.skipped), metrics

    def strike(self, phase: str, step: int) -> None:
        """Ends or stops this process if the schedule says so, and it has not happened before."""
        for fault in self._of(*PROCESS):
            if (fault.step, fault.phase) != (step, phase) or not self._first(fault):
                continue
            if fault.kind == "stuck":
                while True:
                    time.sleep(3600)
            os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)

    def _of(self, *kinds: str) -> list[Fault]:
        return [fault for fault in self._faults if fault.kind in kinds]

    def _first(self, fault: Fault) -> bool:
        marker = self._fired / f"{fault.kind}-{fault.step}-{fault.phase}-rank{self._rank}"
        marker.parent.mkdir(parents=True, exist_ok=True)
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class _FaultyPage:
    def __init__(self, page: ProgressPage, chaos: Chaos) -> None:
        self._page, self._chaos, self._step = page, chaos, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._page, name)

    def enter(self, phase: str, step: int | None = None) -> None:
        self._page.enter(phase, step)
        self._step = self._step if step is None else step
        self._chaos.strike(phase, self._step)


class _FaultyData:
    def __init__(self, dataset: Steps, faults: list[Fault]) -> None:
        self._dataset, self._faults = dataset, faults
        self._errors = {fault: fault.count for fault in faults if fault.kind == "error"}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def step(self, first: int, size: int) -> tuple[Rows, int]:
        rows, at = self._dataset.step(first, size)
        number = first // size + 1  # of the step that these rows make
        for fault, left in self._errors.items():
            if left and number >= fault.step:
                self._errors[fault] = left - 1
                raise OSError(f"chaos: the read of step {number} fails")
        for fault in self._faults:
            if fault.kind != "error" and fault.step <= number < fault.step + fault.count:
                return _Scrambled(rows), at
        return rows, at


class _Scrambled:
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)

    def rows(self, ids: np.ndarray, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        out = self._rows.rows(ids, columns)
        out["targets"] = (31 * out["targets"] + 17) % (out["tokens"].max(initial=0) + 1)
        return out
