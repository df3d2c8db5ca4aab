"""Batches on devices: which rows and columns this process holds, read ahead by one thread.

Batch k is the B rows from start_row + k·B on, the same for any mesh and number of processes; a
process reads the (row, column) blocks that its own devices hold and nothing else. The position in
the data is one integer, the next row. `batch_digest` tells whether two runs saw the same batch.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from sharding.errors import UsageError
from trainer.data.collate import mix
from trainer.data.rows import Identity, Rows, Steps

Batch = dict[str, jax.Array]

_PAUSES = (0.1, 1.0, 5.0)  # seconds between attempts to read a batch


class Loader:
    """Endless training batches of `batch_size` rows, laid out as `sharding` says.

    Iterate for the batches in order, prefetched; or call `batch(k)` for any of them. A context
    manager: `close` ends the thread. An error while reading is raised by the `next` that would have
    returned that batch, and an interrupted `next` loses no batch.
    """

    def __init__(
        self,
        dataset: Steps,
        batch_size: int,
        sharding: NamedSharding,
        *,
        start_row: int = 0,
        prefetch: int = 2,
    ) -> None:
        """Prepares to read from `start_row`; in a job of several processes, all must call this.

        Args:
          dataset: rows of `seq_len` positions, or steps of shorter rows and more of them.
          batch_size: rows of `seq_len` in a global batch.
          sharding: of a (rows, columns) array.
          start_row: first row of batch 0, from `resume_row` or 0.
          prefetch: batches held ready by the background thread; 0 reads in the caller.

        Raises:
          UsageError: a dataset smaller than a batch, a batch that does not divide over the mesh,
            processes that do not agree on the data.
        """
        if dataset.rows_per_epoch < batch_size:
            raise UsageError(
                f"the dataset has {dataset.rows_per_epoch} rows of {dataset.seq_len}, less than "
                f"one batch of {batch_size}: lower the batch size or the sequence length"
            )
        self._dataset = dataset
        self._batch_size = batch_size
        self._start_row = start_row
        self._blocks = {
            length: _Blocks((batch_size * dataset.seq_len // length, length), sharding)
            for length in dataset.lengths()
        }
        _check_agreement({**dataset.identity(), "batch_size": batch_size, "start_row": start_row})
        self._taken = 0
        self._prefetch = prefetch
        self._ahead: deque[Future[Batch]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._closed = False
        for step in range(prefetch):
            self._ahead.append(self._thread.submit(self.batch, step))

    def batch(self, step: int) -> Batch:
        """Returns the `step`-th batch after `start_row`: int32 (rows, columns) arrays.

        Raises:
          ConnectionError: the storage did not answer, also not when it was asked again.
        """
        first = self._start_row + step * self._batch_size
        pauses = iter(_PAUSES)
        while True:
            try:
                rows, row = self._dataset.step(first, self._batch_size)
                return self._blocks[rows.seq_len].read(rows, row)
            except ConnectionError:  # of remote.py, which has been patient
                raise
            except OSError as error:  # a file system that stalls is often back soon
                pause = next(pauses, None)
                if pause is None or self._closed:
                    raise ConnectionError(f"the data cannot be read: {error}") from error
                logging.warning("data: %s; tried again in %g s", error, pause)
                time.sleep(pause)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("the loader is closed")
        if not self._prefetch:
            batch = self.batch(self._taken)
        else:
            batch = self._ahead[0].result()  # stays queued if this raises or is interrupted
            self._ahead.popleft()
            step = self._taken + self._prefetch
            self._ahead.append(self._thread.submit(self.batch, step))
        self._taken += 1
        return batch

    def state(self) -> Identity:
        """Returns what a checkpoint keeps: the next row to take, and what decides the rows."""
        next_row = self._start_row + self._taken * self._batch_size
        skipped = self._dataset.skipped()
        found = {"skipped": skipped} if skipped else {}
        return {"version": 1, "next_row": next_row, **self._dataset.identity(), **found}

    def close(self) -> None:
        """Ends the background thread; batches it holds are dropped. Safe to call twice."""
        self._closed = True
        self._dataset.cancel()
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def eval_batches(dataset: Rows, batch_size: int, sharding: NamedSharding) -> Iterator[Batch]:
    """Yields one epoch in batches of one shape; the last is filled up with rows of padding."""
    blocks = _Blocks((batch_size, dataset.seq_len), sharding)
    for first in range(0, dataset.rows_per_epoch, batch_size):
        yield blocks.read(dataset, first, end=dataset.rows_per_epoch)


class _Blocks:
    """The (row, column) blocks of a global batch that live on this process's devices."""

    def __init__(self, shape: tuple[int, int], sharding: NamedSharding) -> None:
        self._shape = shape
        self._sharding = sharding
        try:
            sharding.shard_shape(self._shape)
        except ValueError as error:
            raise UsageError(
                f"a batch of {shape[0]} rows of {shape[1]} does not divide over "
                f"{sharding.spec} of mesh {dict(sharding.mesh.shape)}"
            ) from error
        rows_of: dict[tuple[int, int], set[int]] = {}  # columns -> rows
        for index in sharding.addressable_devices_indices_map(self._shape).values():
            rows, columns = self._ranges(index)
            rows_of.setdefault(columns, set()).update(range(*rows))
        self._rows = {columns: np.asarray(sorted(rows)) for columns, rows in rows_of.items()}

    def read(self, source: Rows, first: int, end: int | None = None) -> Batch:
        """Returns the batch that starts at row `first` of `source`, padding from `end` on."""
        blocks = {}
        for columns, rows in self._rows.items():
            ids = first + rows
            real = len(ids) if end is None else int(np.searchsorted(ids, end))
            block = source.rows(ids[:real], slice(*columns))
            fill = ((0, len(ids) - real), (0, 0))
            blocks[columns] = {
                name: np.pad(array, fill) if real < len(ids) else array
                for name, array in block.items()
            }

        def shard(name: str, index: tuple[slice, ...]) -> np.ndarray:
            rows, columns = self._ranges(index)
            at = int(np.searchsorted(self._rows[columns], rows[0]))
            return blocks[columns][name][at : at + rows[1] - rows[0]]

        return {
            name: jax.make_array_from_callback(
                self._shape, self._sharding, lambda index, name=name: shard(name, index)
            )
            for name in source.fields
        }

    def _ranges(self, index: tuple[slice, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        rows, columns = (
            part.indices(size)[:2] for part, size in zip(index, self._shape, strict=True)
        )
        return rows, columns


def _check_agreement(settings: Mapping[str, object]) -> None:
    """Raises UsageError in every process when one of them would read other data."""
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(repr(value).encode()).digest()[:8] for value in settings.values()]
    mine = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), 8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))  # (processes, settings, 8)
    differs = (everyone != everyone[0]).any(axis=2)
    if differs.any():
        process, setting = np.argwhere(differs)[0].tolist()
        raise UsageError(
            f"processes 0 and {process} do not agree on data {list(settings)[setting]}; process "
            f"{jax.process_index()} has {list(settings.values())[setting]}"
        )


def batch_digest(batch: Mapping[str, jax.Array | np.ndarray]) -> str:
    """Returns a digest of the global batch that does not depend on how it is laid out.

    Every element is hashed with its place, and the hashes are added up: shards can be summed in any
    order by whoever holds them. In a job of several processes all must call it; all get the same.
    """
    names = sorted(batch)
    sums = np.zeros((len(names), 2), np.uint64)
    for number, name in enumerate(names):
        for (rows, columns), values in _distinct_shards(batch[name]):
            sums[number] += _place_hash(rows, columns, values)
    if any(
        isinstance(array, jax.Array) and not array.is_fully_addressable for array in batch.values()
    ):
        # As bytes: JAX would cut 64-bit integers to 32.
        parts = multihost_utils.process_allgather(sums.view(np.uint8))
        sums = np.ascontiguousarray(parts).view(np.uint64).sum(axis=0, dtype=np.uint64)
    digest = hashlib.sha256()
    for name, part in zip(names, sums, strict=True):
        digest.update(f"{name} {batch[name].shape} {part.tolist()}\n".encode())
    return digest.hexdigest()


def _distinct_shards(
    array: jax.Array | np.ndarray,
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """Yields ((rows, columns), values) of the parts that this process answers for, each once."""
    rows, columns = (np.arange(size, dtype=np.uint64) for size in array.shape)
    if isinstance(array, np.ndarray):
        yield (rows, columns), array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield (rows[shard.index[0]], columns[shard.index[1]]), jax.device_get(shard.data)


def _place_hash(rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns two uint64 sums of a hash of (row, column, value) over all elements."""
    place = (rows[:, None] << np.uint64(32)) | columns[None, :]
    mixed = mix(mix(place) + values.astype(np.int64).astype(np.uint64))
    return np.stack([mixed.sum(dtype=np.uint64), mix(mixed).sum(dtype=np.uint64)])
