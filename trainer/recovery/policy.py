"""What follows from how trainers ended: pure decisions, told facts and asked for the next thing.

The first cause is looked for among all that went wrong at once: when one process of a job is
killed, the others fail in their collectives within milliseconds, and must not be blamed.
"""

import collections
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.recovery.health import DIVERGED
from trainer.recovery.progress import PHASES, Progress

FINISHED, MISTAKE, BAD_DATA, LOST, NO_PROGRESS = 0, 64, 65, 69, 70
UNWRITABLE, RETRY, PREEMPTED, RESIZE = 73, 75, 76, 78
"""Exit statuses of `torus launch` (after BSD's sysexits), which tell a scheduler what to do.

Do not try again: 0 done, 64 a mistake in command or config, 65 an input that is damaged or does
not match, 70 several tries in a row without a new checkpoint, 71 (DIVERGED) all rewinds are spent.
Try again: 69 too few hosts came, 73 the run's folder cannot be written, 75 this host cannot start
trainers, 76 stopped by a signal, 77 (SUSPECT) this host computes wrongly (try without it), 78 asked
to end for another size of job."""

STOPPED = 130  # of `torus train`: asked to stop, saved and ended

# Statuses of `torus train` that no retry cures.
_PERMANENT = {2: MISTAKE, 3: BAD_DATA, 4: BAD_DATA, DIVERGED: DIVERGED}
COLLATERAL = (1, -signal.SIGABRT)  # what JAX makes of another process's death

# How long a phase may take: until enough of its own past is known, and never less than.
_FIRST_LIMITS = {
    "start": 300.0, "data": 600.0, "restore": 1800.0, "compile": 3600.0, "step": 600.0,
    "eval": 1800.0, "save": 1800.0, "end": 1800.0,
}  # fmt: skip
_LEAST = 10.0
_FACTOR = 20.0  # times the slowest but one in a hundred
_WIDEST = 4.0  # times that, after false alarms
_ENOUGH, _REMEMBERED = 20, 512
# Programs in the cache say nothing of another row length, restores from memory nothing of a disk.
_NOT_LEARNED = ("compile", "restore")


class PhaseLimits:
    """How long each phase may take: given, or learned from how long it took so far."""

    def __init__(self, given: dict[str, float] | None = None) -> None:
        self._given = given or {}
        self._took = {p: collections.deque(maxlen=_REMEMBERED) for p in PHASES}
        self._wider = 1.0

    def learn(self, before: Progress, after: Progress) -> None:
        """Takes note of two readings of one page, if the phase of the first was left in between.

        It took at most the time between the two phases' beginnings, and less only if others came
        and went between the readings.
        """
        if after.changes > before.changes and before.since:
            self._took[before.phase].append(after.since - before.since)

    def widen(self) -> None:
        """Doubles what is learned, after a hang: perhaps the network has become that slow."""
        self._wider = min(_WIDEST, 2 * self._wider)

    def unusual(self, phase: str, seconds: float) -> bool:
        """Whether `phase` takes longer than it usually does, which is no reason to end it yet."""
        return len(self._took[phase]) < _ENOUGH or seconds > self.of(phase) / 8

    def of(self, phase: str) -> float:
        """Returns the limit of `phase` in seconds."""
        if phase in self._given:
            return self._given[phase]
        took = sorted(self._took[phase])
        if len(took) < _ENOUGH or phase in _NOT_LEARNED:
            return _FIRST_LIMITS[phase]
        slow = took[math.ceil(0.99 * len(took)) - 1]
        return min(self._wider * max(_FACTOR * slow, _LEAST), _FIRST_LIMITS[phase])


@dataclass(frozen=True)
class End:
    """How one trainer ended, or hung: `status` is None for one that still ran.

    `stopped`: it ran no more, for somebody had sent it a SIGSTOP.
    """

    rank: int
    status: int | None
    progress: Progress
    stopped: bool = False

    @property
    def text(self) -> str:
        if self.status is None:
            return "hung"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        return f"ended with status {self.status}"


def first_cause(ends: list[End]) -> End:
    """Returns the end that explains the others.

    One that hung is the one that was stopped, else that did least; of those that failed, one whose
    status is not what the death of another makes of it.
    """
    return min(_suspects(ends), key=_guilt)


def is_certain(ends: list[End]) -> bool:
    """Whether `first_cause` is told by the facts, and is not one of several that are alike."""
    guilt = sorted(map(_guilt, _suspects(ends)))
    return guilt.count(guilt[0]) == 1


def _suspects(ends: list[End]) -> list[End]:
    return [end for end in ends if end.status is None] or ends


def _guilt(end: End) -> tuple:
    """What is compared to find the first cause: the least is blamed."""
    if end.status is None:
        return not end.stopped, end.progress.step, end.progress.changes
    return end.status in COLLATERAL, end.status == 0


def permanent(end: End) -> int | None:
    """Returns launch's exit status if trying again cannot help, else None."""
    return _PERMANENT.get(end.status) if end.status is not None else None


def choose_hosts(sizes: Sequence[int], ready: int) -> int | None:
    """Returns the largest of `sizes` that so many hosts can make up, or None."""
    return max((size for size in sizes if size <= ready), default=None)


def microbatches(batch_size: int, accumulation: int, full: int, hosts: int) -> int:
    """Returns how many microbatches keep a device's rows no more than they were on `full` hosts.

    The global batch stays, so fewer hosts take more microbatches; the number divides the batch.
    """
    least = -(-accumulation * full // hosts)
    return next((n for n in range(least, batch_size) if batch_size % n == 0), batch_size)


@dataclass
class Budget:
    """Tries are judged by progress, not by count: `tries` in a row without a new checkpoint."""

    tries: int
    best: int = -1  # newest checkpoint so far
    wasted: int = 0

    def spend(self, checkpoint: int) -> bool:
        """Takes note of a try and the newest checkpoint since; False when it was the last try."""
        self.wasted = 0 if checkpoint > self.best else self.wasted + 1
        self.best = max(self.best, checkpoint)
        return self.wasted < self.tries

    @property
    def pause(self) -> float:
        """Seconds to wait before the next try: none after progress, then ever more."""
        return min(30.0, 0.5 * (2**self.wasted - 1))
