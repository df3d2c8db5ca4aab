"""Ctrl-C and SIGTERM end a run at a step boundary, saved; a second Ctrl-C ends it at once.

SIGTERM may come many times: SLURM sends it to every process of a job, and two or three times. So
only a person's second Ctrl-C ends a run at once, and not one of a supervised trainer: how long that
may take to save is decided by its supervisor, which passes on the signal that both have received.

In a job of several processes a signal reaches them at different steps, so they agree on the step
to stop at before any of them leaves the others alone in a collective: every few steps, and after
each when a step takes long.
"""

import os
import signal
import time
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from trainer.recovery.progress import VARIABLE

AGREE_EVERY = 20  # steps between agreements of several processes, at most
AGREE_SECONDS = 2.0  # or as many steps as the slowest process does in this time


class StopSignals:
    """From `remember` until it is left, notes signals that ask to stop, instead of dying of them.

    These are SIGINT and SIGTERM; for a trainer of `torus launch` also SIGUSR2, which it acts on.
    One object serves all attempts of a run: a signal that comes while the run goes back to an
    earlier step stops the next attempt.
    """

    def __init__(self) -> None:
        self._supervised = VARIABLE in os.environ
        self.name = ""  # of the signal that was received, "" for none
        self._before: dict[int, object] = {}
        self._agreed: tuple[int, float] | None = None  # the last step agreed on, and when
        self._next = 0  # step to agree on again

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def remember(self) -> None:
        """Begins an attempt: signals that came before it still count, steps agreed on do not."""
        self._agreed, self._next = None, 0
        if self._before:
            return
        more = (signal.SIGUSR2,) if self._supervised else ()
        for number in (signal.SIGINT, signal.SIGTERM, *more):
            try:
                self._before[number] = signal.signal(number, self._received)
            except ValueError:  # not the main thread: whoever runs it handles its signals
                return

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT and not self._supervised:
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name

    def stop_at_step(self, step: int) -> bool:
        """Whether to stop before `step`; all processes answer alike."""
        if jax.process_count() == 1:
            return bool(self.name)
        if step < self._next:
            return False
        now = time.monotonic()
        took = (now - self._agreed[1]) / (step - self._agreed[0]) if self._agreed else AGREE_SECONDS
        mine = np.asarray([bool(self.name), took], np.float32)
        stop, slowest = np.max(multihost_utils.process_allgather(mine), axis=0)
        if stop and not self.name:
            self.name = "SIGTERM"
        self._agreed = step, now
        self._next = step + int(np.clip(AGREE_SECONDS / max(slowest, 1e-3), 1, AGREE_EVERY))
        return bool(stop)
