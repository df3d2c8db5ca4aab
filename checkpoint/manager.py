"""Saves the training state step by step and brings the newest one back.

One step is written and read by checkpoint/storage.py, through Orbax. When to save, what to keep,
what counts as complete and how a failure is reported are decided here, because Orbax's own manager
silently skips steps below the newest one, forgets retired steps after a failed save, and deletes
in place.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import jax
from absl import logging

from checkpoint import agreement, steps
from checkpoint.config import CheckpointConfig, validate
from checkpoint.failures import quiet_orbax
from checkpoint.fingerprint import fingerprints
from checkpoint.manifest import read_meta
from checkpoint.steps import CheckpointError
from checkpoint.storage import load_step, save_context, start_save
from sharding.errors import UsageError

Tree = Any

_FIRST_SAVE = 20  # steps until it is known how often to save


@dataclass(frozen=True)
class Restored:
    """A step brought back, and what was wrong with newer ones that were passed over."""

    step: int
    state: Tree
    meta: dict[str, Any]
    damaged: tuple[str, ...]


class CheckpointManager:
    """The steps of one run. Every process of the run holds one and calls it at the same points.

    A save that fails in one of several processes is told there at once, but to the others only when
    Orbax's barrier gives up (300 s). It is never committed; the run should end on it, not go on.
    """

    def __init__(self, folder: str | os.PathLike, config: CheckpointConfig) -> None:
        """Writes nothing: a run may still be refused. Entering the manager, or a save, begins to.

        Raises:
            UsageError: a setting makes no sense.
        """
        validate(config)
        quiet_orbax()
        self.folder = steps.folder_path(folder)
        self._config = config
        self.every = config.every if config.every >= 0 else _FIRST_SAVE  # steps between saves
        self.blocked = 0.0  # seconds that the last save held its caller up
        self._context = save_context(config)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._current: int | None = None  # the step last saved or restored: where the run stands
        self._damaged: list[int] = []  # steps that were passed over and are to be set aside
        self._entered = False

    def __enter__(self) -> Self:
        """Creates the folder, clears what interrupted saves left there, sets damaged steps aside.

        Raises (in all processes):
            UsageError: the folder cannot be written.
            CheckpointError: a damaged step cannot be renamed.
        """
        agreement.first(self._prepare)
        self._entered = True
        return self

    def _prepare(self) -> None:
        steps.make_writable(self.folder)
        for name in steps.clean_interrupted(self.folder):
            logging.warning("checkpoint: removed %s, an interrupted save", name)
        self._set_aside()

    def _set_aside(self) -> None:
        while self._damaged:
            steps.set_aside(self.folder, self._damaged.pop())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except CheckpointError as error:  # the error on its way out matters more
            logging.error("checkpoint: %s", error)

    def steps(self) -> list[int]:
        """Returns the complete steps, ascending; a save still being written is not one.

        Process 0 retires old steps, so another process may see them a moment longer.
        """
        return steps.complete_steps(self.folder)

    def latest(self) -> int | None:
        """Returns the newest complete step, or None."""
        return max(self.steps(), default=None)

    def compile(self, state: Tree) -> None:
        """Compiles what a save of `state` runs on the devices, which may take long."""
        jax.block_until_ready(fingerprints(state))

    def due(self, step: int) -> bool:
        """Whether the interval asks for a save after `step` updates."""
        return self.every > 0 and step % self.every == 0

    def save(self, step: int, state: Tree, meta: dict[str, Any], *, force: bool = False) -> bool:
        """Starts to save `state` (nested dicts of arrays) and `meta` (JSON) as `step`.

        Blocks for the copy off the device, and first for an earlier save still being written.

        Returns:
            False if the step is not due (and not forced), or is the one last saved or restored.

        Raises:
            UsageError: the state cannot be stored, or the folder holds this step or a newer one.
            CheckpointError: this save, or the one before it, failed.
        """
        if not (force or self.due(step)):
            return False
        started = time.monotonic()
        self.wait()
        waited = time.monotonic() - started
        if waited > 1:
            logging.warning("checkpoint: waited %.1f s for the save before step %d", waited, step)
        if step == self._current:
            return False
        newest = agreement.first(self.latest)  # another process may still see a deleted step
        if newest is not None and step <= newest:
            raise UsageError(
                f"cannot save step {step}: {self.folder} already holds step {newest}; restore it, "
                "discard the newer steps, or use another folder"
            )
        started = time.monotonic()
        try:
            response = start_save(self.folder / str(step), state, meta, self._context)
        except UsageError:
            raise
        except Exception as error:
            raise self._failed(step, error) from error
        self._current = step
        self._pending = self._worker.submit(self._finish, step, response)
        if not self._config.asynchronous:
            self.wait()
        self.blocked = time.monotonic() - started + waited
        return True

    def poll(self) -> None:
        """Raises the CheckpointError of a save that failed meanwhile; cheap, for every step."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is being written; raises the CheckpointError of a failed save."""
        pending = self._pending
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointError:
            self._current = None
            raise
        finally:
            if pending.done():  # not so after Ctrl-C, and then close() must still wait
                self._pending = None

    def close(self) -> None:
        """Waits for the last save, raises its CheckpointError if it failed, frees the thread."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def restore(self, step: int | None, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """Returns (state, meta) of `step` (None: the newest); see `load_step`."""
        self.wait()
        step = agreement.first(lambda: steps.pick_step(self.folder, step))
        loaded = load_step(self.folder, step, abstract, verify=self._config.verify)
        self._current = step
        return loaded

    def restore_newest(
        self,
        abstract: Tree,
        given_up: Callable[[int, dict[str, Any]], bool] | None = None,
    ) -> Restored | None:
        """Returns the newest step that can be read and verified, or None if there are no steps.

        Process 0 says which steps there are. Damaged newer steps are told in the log. Their folders
        are renamed to `<step>.damaged`, so that the run can save those steps again, but not before
        the manager is entered.

        Args:
            given_up: told number and meta of a step, whether it is passed over without a word.

        Raises (in all processes):
            UsageError: a step holds other arrays than `abstract` asks for.
            CheckpointError: every step is damaged, or a process does not see a step that process 0
                sees; once the manager is entered also: a damaged step cannot be renamed.
        """
        damaged = []
        for step in self.candidates(given_up):
            try:
                loaded = self.restore(step, abstract)
            except steps.NotVisibleError:
                raise
            except CheckpointError as error:  # in all processes, of the same step
                damaged.append((step, str(error)))
                logging.error("checkpoint: %s", error)
                continue
            self._damaged = [number for number, _ in damaged]
            if self._entered and damaged:
                agreement.first(self._set_aside)
            return Restored(step, *loaded, damaged=tuple(text for _, text in damaged))
        if damaged:
            raise CheckpointError("; ".join(text for _, text in damaged))
        return None

    def candidates(self, given_up: Callable[[int, dict[str, Any]], bool] | None) -> list[int]:
        """Returns the steps that process 0 sees and has not given up, newest first."""

        def listed() -> list[int]:
            newest_first = reversed(self.steps())
            return [n for n in newest_first if not (given_up and self._is_given_up(n, given_up))]

        return agreement.first(listed)

    def _is_given_up(self, step: int, given_up: Callable[[int, dict[str, Any]], bool]) -> bool:
        try:
            return given_up(step, read_meta(self.folder, step))
        except CheckpointError:  # `restore_newest` reports it
            return False

    def discard_where(self, given_up: Callable[[int, dict[str, Any]], bool]) -> None:
        """Deletes the steps for which `given_up`, told number and meta, is true.

        A run that goes back must not find them again.
        """
        self.wait()
        agreement.first(lambda: self._discard(given_up))  # nobody reads on before that is done

    def _discard(self, given_up: Callable[[int, dict[str, Any]], bool]) -> None:
        for step in reversed(self.steps()):
            if self._is_given_up(step, given_up):
                steps.delete_step(self.folder, step)

    def good_steps(self) -> list[int]:
        """Returns the complete steps that were marked as good, ascending."""
        return steps.good_steps(self.folder)

    def mark_good(self, proven: Iterable[int]) -> list[int]:
        """Marks steps as good, in process 0; returns those that need no other try."""
        complete = set(self.steps())
        written = [step for step in proven if step in complete or step != self._current]
        if jax.process_index() == 0:
            for step in complete.intersection(written):
                with contextlib.suppress(FileNotFoundError):  # retired meanwhile
                    (self.folder / str(step) / steps.GOOD).touch()
        return written

    def _finish(self, step: int, response: Any) -> None:
        """Waits for the commit of `step`, makes it durable, and only then retires older steps."""
        started = time.monotonic()
        try:
            response.result()
            if jax.process_index() != 0:
                return
            steps.sync_step(self.folder, step)
        except Exception as error:
            raise self._failed(step, error) from error
        logging.info("checkpoint: step %d saved, %.1f s", step, time.monotonic() - started)
        self._retire()

    def _retire(self) -> None:
        complete = self.steps()
        config = self._config
        kept = steps.kept_steps(complete, config.keep_last, config.keep_every, config.keep_ladder)
        kept |= set(self.good_steps()[-1:])
        for old in sorted(set(complete) - kept):
            try:
                steps.delete_step(self.folder, old)
            except OSError as error:  # the new step is safe, and the next save tries again
                logging.warning("checkpoint: step %d stays: %s", old, steps.reason(error))

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """Clears what the failed save of `step` wrote, which would go on filling the disk."""
        if jax.process_index() == 0:
            try:
                steps.clean_interrupted(self.folder, step)
            except OSError as left:
                logging.warning("checkpoint: cannot clear step %d: %s", step, steps.reason(left))
        return CheckpointError(f"saving step {step} to {self.folder} failed: {steps.reason(error)}")
