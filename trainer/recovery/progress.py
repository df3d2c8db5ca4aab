"""The progress page: what a trainer is doing, in a file that it shares with its supervisor.

Both map the file. The trainer writes words of eight bytes and never waits; the supervisor reads
them whenever it likes, also when the trainer is frozen or stuck in a collective. Times are of the
machine's monotonic clock, so a changed wall clock means nothing. A trainer that nobody supervises
has no page and writes nowhere.
"""

import faulthandler
import mmap
import os
import signal
import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "TORUS_PROGRESS"  # the environment variable that names a trainer's page
PHASES = ("start", "data", "restore", "compile", "step", "eval", "save", "end")
_SIZE = 4096
_PHASE, _STEP, _SINCE, _CHANGES, _START, _SOURCE = range(6)
SOURCES = ("", "new", "disk", "memory", "peer", "parity")


def process_state(pid: int) -> str:
    """Returns the letter that Linux has for what a process does: "T" stopped, "Z" a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


@dataclass(frozen=True)
class Progress:
    """What the page of one trainer says.

    Attributes:
      phase: one of PHASES.
      step: updates done.
      since: when the phase began, in seconds of the monotonic clock.
      changes: how often `enter` was called: it grows as long as the trainer moves.
      start: the step that the trainer went on from, 0 for a new run.
      source: where it found that, one of SOURCES; "" as long as it has not.
    """

    phase: str
    step: int
    since: float
    changes: int
    start: int = 0
    source: str = ""


class ProgressPage:
    """One trainer's page. `enter` is for the trainer, `read` for its supervisor."""

    def __init__(self, path: Path | None) -> None:
        """Maps the file, created empty if it is not there; None gives a page that nobody reads."""
        if path is None:
            self._map = mmap.mmap(-1, _SIZE)
        else:
            with open(path, "a+b") as file:
                file.truncate(_SIZE)
                self._map = mmap.mmap(file.fileno(), _SIZE)
        self._words = memoryview(self._map).cast("q")
        self._compiled: set[Hashable] = set()  # programs that ran before

    @classmethod
    def of_this_process(cls) -> "ProgressPage":
        """Returns the page that the environment names; SIGUSR1 then writes all stacks to stderr."""
        path = os.environ.get(VARIABLE)
        if path:
            faulthandler.register(signal.SIGUSR1, all_threads=True)
        return cls(Path(path) if path else None)

    def is_new(self, program: Hashable) -> bool:
        """Whether a program is named for the first time: what runs it has to compile it first.

        That takes longer than anything learned of other phases, so it is phase `compile`.
        """
        new = program not in self._compiled
        self._compiled.add(program)
        return new

    def enter(self, phase: str, step: int | None = None) -> None:
        """Says that `phase` begins now, at `step` if that changed."""
        if step is not None:
            self._words[_STEP] = step
        self._words[_SINCE] = time.monotonic_ns()
        self._words[_PHASE] = PHASES.index(phase)
        self._words[_CHANGES] += 1

    def resumed(self, step: int, source: str) -> None:
        """Says that the trainer goes on from `step`, found in one of SOURCES."""
        self._words[_START], self._words[_SOURCE] = step, SOURCES.index(source)

    def read(self) -> Progress:
        """Returns what the page says; before the first `enter`, a start at this clock's zero."""
        words = self._words
        return Progress(
            PHASES[words[_PHASE]], words[_STEP], words[_SINCE] / 1e9, words[_CHANGES],
            words[_START], SOURCES[words[_SOURCE]],
        )  # fmt: skip
