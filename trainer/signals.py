"""Ctrl-C and SIGTERM end a run at a step boundary, saved; a second one ends it at once.

In a job of several processes a signal reaches them at different steps, so they agree on the step
to stop at, every few steps, before any of them leaves the others alone in a collective.
"""

import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

AGREE_EVERY = 10  # steps between agreements of several processes


class StopSignals:
    """While entered, remembers SIGINT and SIGTERM instead of dying of them."""

    def __init__(self) -> None:
        self.name = ""  # of the signal that was received, "" for none
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: whoever runs it handles its signals
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def stop_at_step(self, step: int) -> bool:
        """Whether to stop before `step`; all processes answer alike."""
        if jax.process_count() == 1:
            return bool(self.name)
        if step % AGREE_EVERY:
            return False
        mine = np.asarray([bool(self.name)])
        stop = bool(np.any(multihost_utils.process_allgather(mine)))
        if stop and not self.name:
            self.name = "SIGTERM"
        return stop
