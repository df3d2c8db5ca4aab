"""Saves the training state step by step and brings it back onto any mesh: the home of Orbax.

The only module that imports Orbax. Orbax writes and reads one step; when to save, what to keep,
what counts as complete and how a failure is told are decided here, because its own manager skips
steps below the newest one without a word, forgets retired steps after a failed save, and deletes
in place. Each step holds `state` (arrays, in Orbax's format), `manifest`, `meta` and `integrity`
(JSON files), committed together by one rename.

Missing, truncated or misplaced data is refused by name, and so are arrays whose bits are not those
that were in memory when they were saved: Orbax itself returns flipped bits without a word.
"""

import contextlib
import json
import logging as python_logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from checkpoint import agreement, steps
from checkpoint.config import CheckpointConfig, validate
from checkpoint.failures import collect_reads, quiet_late_reads, read_failure
from checkpoint.fingerprint import as_text, fingerprints
from checkpoint.manifest import (
    FORMAT,
    INTEGRITY,
    MANIFEST,
    META,
    check_fingerprints,
    check_matching,
    read_meta,
    read_step,
)
from checkpoint.record import Record, RecordHandler
from checkpoint.steps import CheckpointError
from checkpoint.tree import check_storable, flatten, unflatten
from sharding.errors import UsageError

Tree = Any

_STATE = "state"
_FIRST_SAVE = 20  # steps until it is known how often to save
_LEAST_CHUNK = 2**20  # bytes; Orbax warns of less
_DATA_FILE = 2**27  # bytes; a file is written while the next is filled, with Orbax's 2 GB none is


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
        _quiet_orbax()
        self.folder = steps.folder_path(folder)
        self._config = config
        self.every = config.every if config.every >= 0 else _FIRST_SAVE  # steps between saves
        self.blocked = 0.0  # seconds that the last save held its caller up
        self._context = _context(config)
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
        check_storable(state)
        _check_json(meta)
        manifest = _manifest(state)
        record = Record(step, list(flatten(state)), Future(), manifest, meta)
        try:
            with self._context:
                items = {_STATE: state, MANIFEST: manifest, META: meta, INTEGRITY: record}
                response = ocp.save_checkpointables_async(self.folder / str(step), items)
        except Exception as error:
            record.fingerprints.set_exception(error)
            raise self._failed(step, error) from error
        # Enqueued before the caller's next update may reuse the buffers, but after Orbax is set up,
        # which would have to share the processor with them; fetched while writing.
        record.fingerprints.set_result(fingerprints(state))
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

    def _finish(self, step: int, response: ocp.AsyncResponse) -> None:
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


def load_step(
    folder: str | os.PathLike,
    step: int,
    abstract: Tree,
    *,
    partial: bool = False,
    verify: bool = True,
) -> tuple[Tree, dict[str, Any]]:
    """Returns the state stored as `step`, placed as `abstract` says, and its JSON object.

    Args:
        folder: where the steps are; it is only read.
        step: a complete step (`steps.pick_step` finds one).
        abstract: nested dict of jax.ShapeDtypeStruct with shardings, for any mesh.
        partial: `abstract` names only some of the arrays; the others stay unread on disk.
        verify: compare what was read with the fingerprints of what was saved.

    Raises (in all processes):
        UsageError: the step does not exist, or an array's name, shape or dtype differs from what
            `abstract` wants (nothing is cast, padded or dropped).
        CheckpointError: the step is damaged, and the message names files or arrays; or it is not
            visible to a process (`steps.NotVisibleError`).
    """
    _quiet_orbax()
    step = agreement.first(lambda: steps.pick_step(folder, step))
    agreement.together(lambda: steps.wait_visible(folder, step, jax.process_index()))
    path = steps.folder_path(folder) / str(step)
    unplaced = [name for name, leaf in flatten(abstract).items() if leaf.sharding is None]
    if unplaced:
        raise ValueError(f"restoring needs a sharding for {steps.listing(unplaced)}")
    manifest, meta, saved = agreement.together(lambda: read_step(folder, step))
    agreement.check_same([manifest, meta, saved], f"step {step} in {folder}")
    stored, wanted = manifest["arrays"], _facts(abstract)
    if partial:
        stored = {name: facts for name, facts in stored.items() if name in wanted}
    check_matching(stored, wanted, f"step {step} in {folder}")
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    state = agreement.together(lambda: _load(path, abstract, context, path))
    if verify:
        check_fingerprints(folder, step, as_text(fingerprints(state), list(flatten(state))), saved)
    return state, meta


def try_restore(folder: str | os.PathLike, step: int) -> None:
    """Opens every array of a step as `load_step` does, and reads the first element of each.

    For a step too large to hold: what is left to read are values, of which Orbax knows no more
    than tensorstore does (checkpoint/convert/native.py).

    Raises:
        CheckpointError: the step could not be restored; the message names files or arrays.
    """
    _quiet_orbax()
    manifest, _, _ = read_step(folder, step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    first = {
        name: jax.ShapeDtypeStruct((1,) * len(fact["shape"]), fact["dtype"], sharding=here)
        for name, fact in manifest["arrays"].items()
    }
    context = ocp.Context()
    context.array.loading.enable_padding_and_truncation = True
    path = steps.folder_path(folder) / str(step)
    tree = unflatten(first)
    remote = steps.is_remote(folder)
    with _without_values(path, tree) if remote else contextlib.nullcontext(path) as near:
        _load(near, tree, context, path)


@contextlib.contextmanager
def _without_values(path: Any, first: Tree) -> Iterator[Path]:
    """Gives a copy, on the disk, of a step in a bucket with one element of each array.

    Orbax reads buckets by libraries that need not be here (gcsfs), and this way too what it reads
    beside the values is all of that step.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_frame(folder, 0, first, {})
        local = Path(folder) / "0"
        for file in local.rglob("*"):
            if file.is_file() and not _holds_values(file.relative_to(local)):
                file.unlink()
        for name in path.below():
            if not (local / name).resolve().is_relative_to(local.resolve()):
                raise CheckpointError(f"{path} holds {name!r}, which leads out of it")
            if not _holds_values(Path(name)):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                (local / name).write_bytes((path / name).read_bytes())
        yield local


def _holds_values(file: Path) -> bool:
    """Whether a file of a step is one of the store of its arrays."""
    return file.name == "manifest.ocdbt" or "d" in file.parts[:-1]


def _load(path: Path, abstract: Tree, context: ocp.Context, step: Path) -> Tree:
    """Returns the state at `path`, in this process alone.

    Raises:
        CheckpointError: it cannot be read; the message calls it `step`.
    """
    # Orbax would have all wait for one another, and so for one whose part is damaged.
    me = jax.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
    context.multiprocessing.barrier_sync_key_prefix = f"process{me}"
    try:
        with context:
            return ocp.load(path, abstract, checkpointable_name=_STATE)
    except Exception as error:
        text = read_failure(error, list(flatten(abstract))).replace(str(path), str(step))
    collect_reads()
    raise CheckpointError(f"cannot read step {step.name} in {step.parent}: {text}")


def save_frame(folder: str | os.PathLike, step: int, abstract: Tree, meta: dict[str, Any]) -> None:
    """Writes `step` with its manifest and `meta`, but every array with a single element.

    For arrays too large to hold: what fills them in (checkpoint/convert/native.py) gives them the
    shape and dtype of `abstract`, nested dicts of jax.ShapeDtypeStruct, before anyone looks.
    """
    _quiet_orbax()
    frame = jax.tree.map(lambda a: np.zeros((1,) * len(a.shape), a.dtype), abstract)
    check_storable(frame)
    _check_json(meta)
    with _context(CheckpointConfig()):
        items = {_STATE: frame, MANIFEST: _manifest(abstract), META: meta}
        ocp.save_checkpointables(steps.folder_path(folder) / str(step), items)


def _context(config: CheckpointConfig) -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = config.compression
    if config.chunk_mib:
        chunks = partial(_chunks, config.chunk_mib * 2**20)
        context.array.saving.scoped_storage_options_creator = chunks
        context.array.saving.ocdbt_target_data_file_size = _DATA_FILE
    known = ocp.handlers.local_registry(include_global_registry=False)
    known.add(_only(ocp.handlers.PyTreeHandler(context=context)), checkpointable_name=_STATE)
    # Without this a dict of numbers counts as a tree of arrays and its lists, bools and Nones bend.
    for item in (MANIFEST, META):
        known.add(ocp.handlers.JsonHandler, checkpointable_name=item)
    known.add(RecordHandler, checkpointable_name=INTEGRITY)
    context.checkpointables.registry = known
    return context


def _chunks(largest: int, _: Any, leaf: Any) -> Any:
    """How an array is cut: by layers (and any stack), then into squares.

    The squares are small enough that a quarter along either axis, which another mesh may want, is
    whole chunks. Of a sharded array Orbax cuts the sharded axis alone, as far as that goes.
    """
    quarter = min(leaf.shape[-2:], default=1) // 4
    size = min(largest, max(_LEAST_CHUNK, quarter**2 * leaf.dtype.itemsize))
    stacked = (0,) if leaf.ndim > 2 else None  # else a layer could not be read without the others
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=size, shard_axes=stacked)


def _only(handler: Any) -> type:
    """Returns a class that gives `handler`: Orbax makes them all anew, eight times for one save."""
    return type("Only", (), {"__new__": lambda cls: handler})


def _manifest(state: Tree) -> dict[str, Any]:
    saved = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": FORMAT, "saved": saved, "arrays": _facts(state)}


def _facts(tree: Tree) -> dict[str, dict[str, Any]]:
    """Returns name → shape and dtype, as JSON values, of arrays or abstract arrays."""
    return {
        name: {"shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name}
        for name, leaf in flatten(tree).items()
    }


def _check_json(meta: dict[str, Any]) -> None:
    for key, value in meta.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"checkpoint meta `{key}` is not JSON: {error}") from error


class _OrbaxFilter(python_logging.Filter):
    """Drops Orbax's progress notes, a page for each save."""

    def filter(self, record: python_logging.LogRecord) -> bool:
        return record.levelno >= python_logging.WARNING or "orbax" not in record.pathname


def _quiet_orbax() -> None:
    quiet_late_reads()
    logger = logging.get_absl_logger()
    if not any(isinstance(known, _OrbaxFilter) for known in logger.filters):
        logger.addFilter(_OrbaxFilter())
