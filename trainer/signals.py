"""Ctrl-C and SIGTERM end a run at a step boundary, saved; a second one ends it at once.

In a job of several processes a signal reaches them at different steps, so they agree on the step
to stop at before any of them leaves the others alone in a collective: every few steps, and after
each when a step takes long.
"""

import signal
import time
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

AGREE_EVERY = 20  # steps between agreements of several processes, at most
AGREE_SECONDS = 2.0  # or as many steps as the slowest process does in this time


class StopSignals:
    """From `remember` until it is left, notes SIGINT and SIGTERM instead of dying of them.

    One object serves all attempts of a run: a signal that comes while the run goes back to an
    earlier step stops the next attempt.
    """

    def __init__(self) -> None:
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
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._received)
            except ValueError:  # not the main thread: whoever runs it handles its signals
                return

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

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
