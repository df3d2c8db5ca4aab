"""Traces a few chosen steps into the run's folder, for TensorBoard's profile plugin or Perfetto."""

import jax

from trainer.metrics import LogConfig


class Profiler:
    """Starts a JAX trace before step `profile_start` and ends it `profile_steps` steps later."""

    def __init__(self, folder: str, config: LogConfig) -> None:
        self._folder = folder
        self._first = config.profile_start
        self._last = config.profile_start + config.profile_steps
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Call before dispatching `step` (0-based)."""
        if self._first >= 0 and step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, done: int, result: object) -> None:
        """Call after dispatching; `done` is the number of steps dispatched, `result` the newest."""
        if self._running and done >= self._last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._running = False
