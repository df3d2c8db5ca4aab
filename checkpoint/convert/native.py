"""Arrays of our steps, layer by layer: Orbax reads and writes them only whole.

An array is one zarr3 array inside the step's OCDBT store, which tensorstore opens by itself.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import tensorstore as ts

from checkpoint import steps
from checkpoint.convert.mapping import aligned
from checkpoint.fingerprint import rows_sums, sums_text
from checkpoint.inflight import MEMORY, InFlight
from checkpoint.manifest import check_fingerprints, read_manifest, write_record
from checkpoint.objects import folder_spec
from checkpoint.steps import CheckpointError
from checkpoint.storage import save_frame
from checkpoint.tree import unflatten

PARAMS = "params/"
CHUNK = 4 * 2**20  # bytes, within one layer
CACHE = 2**27  # bytes of chunks kept while rows are read
DATA_FILE = 2**24  # bytes; a file that is full is written while others are filled and written


class NativeTensors:
    """Arrays of one step, by default its parameters, some rows of a layer at a time.

    Several threads may read and put at once, as long as they put into different chunks.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        step: int,
        prefix: str = PARAMS,
        *,
        checked: bool = True,
    ) -> None:
        """Raises CheckpointError for a step without a readable manifest.

        checked: the manifest must be the one of the integrity record; a step being made has none.
        """
        self._prefix, self._step = prefix, (folder, step)
        path = steps.folder_path(folder) / str(step) / "state"
        self.where = f"step {step} in {folder}"
        self._base = folder_spec(path)
        # Chunks of a run hold parts of many rows, those of a step being made hold whole ones.
        cache = {"total_bytes_limit": CACHE if checked else 0}
        # Not forced to disk chunk by chunk: who makes a step forces all of it, once, at the end.
        self._context = ts.Context({"cache_pool": cache, "file_io_sync": False})
        self._open: dict[str, ts.Future[ts.TensorStore]] = {}
        self._opening = threading.Lock()
        facts = read_manifest(folder, step, checked=checked)["arrays"]
        self.facts = {
            name.removeprefix(prefix): (np.dtype(fact["dtype"]), tuple(fact["shape"]))
            for name, fact in facts.items()
            if name.startswith(prefix)
        }

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop of array[lead]; raises CheckpointError if it is damaged."""
        try:
            store = self._store(name)
            part = store[(*lead, slice(start, stop))[: store.rank]]  # a scalar has no rows
            array = aligned(part.shape, self.facts[name][0])
            ts.array(array).write(part).result()
            return array
        except (ValueError, OSError) as error:
            text = f"cannot read `{name}` of {self.where}: {steps.reason(error)}"
            raise CheckpointError(text) from error

    def part_rows(self, name: str, lead: tuple[int, ...]) -> int:
        """Returns how many rows of array[lead] share a chunk: those have to be put together."""
        dtype, shape = self.facts[name]
        return _chunk(shape, len(lead), dtype.itemsize)[len(lead)]

    def put(self, name: str, lead: tuple[int, ...], array: np.ndarray, start: int = 0) -> None:
        """Writes array[lead] of a step made by `create_step`, or its rows from `start` on.

        Raises OSError where the storage does not take it.
        """
        try:
            self._put(name, lead, array, start)
        except ValueError as error:  # tensorstore's, also for a full disk
            raise OSError(str(error)) from error

    def _put(self, name: str, lead: tuple[int, ...], array: np.ndarray, start: int) -> None:
        dtype, shape = self.facts[name]
        if not shape:  # the step's frame holds it already, as a zero
            self._store(name).write(array).result()
            return
        chunk = _chunk(shape, len(lead), dtype.itemsize)
        metadata = {
            "shape": shape, "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }  # fmt: skip
        store = self._store(name, metadata)
        place = store[(*lead, slice(start, start + len(array)))]
        place.write(array, can_reference_source_data_indefinitely=True).result()

    def finish(self, sums: dict[str, np.ndarray]) -> None:
        """Writes the integrity record of a step made by `create_step`, all arrays put.

        sums: name → what the parts of the array add to its fingerprint (fingerprint.part_sums).
        """
        arrays = {self._prefix + name: sums_text(found) for name, found in sums.items()}
        write_record(*self._step, arrays)
        self.close()

    def _store(self, name: str, metadata: dict[str, Any] | None = None) -> ts.TensorStore:
        """Opens an array once; with `metadata` it is made anew."""
        with self._opening:
            if name not in self._open:
                spec, new = self._spec(name), metadata is not None
                spec |= {"metadata": metadata} if new else {}
                opening = ts.open(spec, create=new, delete_existing=new, context=self._context)
                self._open[name] = opening
            opening = self._open[name]
        store = opening.result()  # several are opened at once
        dtype, shape = self.facts[name]
        if (store.dtype.numpy_dtype, store.shape) != (dtype, shape):
            raise ValueError(
                f"it is stored as {store.dtype.name}{list(store.shape)}, "
                f"the manifest says {dtype}{list(shape)}"
            )
        return store

    def verify(self, advance: Callable[[int], None] = lambda nbytes: None) -> None:
        """Reads every array and compares it with its fingerprint; `advance` is told bytes.

        Raises:
          CheckpointError: an array cannot be read, or holds other bits; the message names all.
        """
        found = {name: np.zeros(2, np.uint32) for name in self.facts}
        adding = threading.Lock()

        def check(name: str, lead: tuple[int, ...], start: int, stop: int) -> None:
            part = self.read(name, lead, start, stop)
            more = rows_sums(part, lead, start, self.facts[name][1])
            with adding:
                found[name] = found[name] + more
            advance(part.nbytes)

        far = steps.is_remote(steps.folder_path(self._step[0]))
        InFlight(MEMORY, far=far).run(
            (2 * nbytes, partial(check, name, *part))
            for name, (dtype, shape) in self.facts.items()
            for nbytes, *part in _parts(shape, dtype.itemsize)
        )
        self.compare(found)

    def compare(self, sums: dict[str, np.ndarray]) -> None:
        """Compares name → sums of arrays as they were read with what was saved.

        Raises:
          CheckpointError: an array holds other bits; the message names all.
        """
        found = {self._prefix + name: sums_text(one) for name, one in sums.items()}
        check_fingerprints(*self._step, found)

    def close(self) -> None:
        """Lets the arrays go."""
        self._open = {}

    def _spec(self, name: str) -> dict[str, Any]:
        path = (self._prefix + name).replace("/", ".") + "/"
        store = {"driver": "ocdbt", "base": self._base, "path": path,
                 "target_data_file_size": DATA_FILE}  # fmt: skip
        # As Orbax writes and reads: every chunk is there, zeros too, and one that is missing is
        # a damage and not zeros.
        return {
            "driver": "zarr3", "kvstore": store,
            "store_data_equal_to_fill_value": True, "fill_missing_data_reads": False,
        }  # fmt: skip


class CheckedReads:
    """Reads a step for a conversion and says afterwards whether it is the step that was saved.

    What is read is hashed on the way, so that nothing is read twice.
    """

    def __init__(self, tensors: NativeTensors) -> None:
        self._tensors = tensors
        self._seen: dict[tuple[str, tuple[int, ...]], dict[tuple[int, int], np.ndarray]] = {}

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Reads as NativeTensors does."""
        part = self._tensors.read(name, lead, start, stop)
        sums = rows_sums(part, lead, start, self._tensors.facts[name][1])
        self._seen.setdefault((name, lead), {})[start, stop] = sums
        return part

    def finish(self) -> None:
        """Reads what nobody asked for, the padding; raises CheckpointError if bits differ."""
        for (name, lead), seen in self._seen.items():
            at, end = 0, self._tensors.facts[name][1][len(lead)]
            for start, stop in [*sorted(seen), (end, end)]:
                if start < at:  # rows that several tensors of theirs ask for in different parts
                    return self._tensors.verify()
                if start > at:
                    self.read(name, lead, at, start)
                at = stop
        sums: dict[str, np.ndarray] = {}
        for (name, _), seen in self._seen.items():
            sums[name] = sum(seen.values(), sums.get(name, np.zeros(2, np.uint32)))
        self._tensors.compare(sums)


def create_step(
    folder: str | os.PathLike,
    step: int,
    facts: dict[str, tuple[np.dtype, tuple[int, ...]]],
    meta: dict[str, Any],
    prefix: str = PARAMS,
) -> NativeTensors:
    """Writes a step of parameters, or of all that is named where `prefix` is "".

    The caller puts in every array and forces the files to disk.
    """
    import jax

    arrays = {
        prefix + name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in facts.items()
    }
    save_frame(folder, step, unflatten(arrays), meta)
    return NativeTensors(folder, step, prefix, checked=False)


def _chunk(shape: tuple[int, ...], lead: int, itemsize: int) -> tuple[int, ...]:
    """Returns the shape of a chunk: rows within one layer, of CHUNK bytes at most or a single."""
    rest = shape[lead:]
    rows = min(rest[0], max(1, CHUNK // (math.prod(rest[1:]) * itemsize)))
    return (*(1 for _ in range(lead)), rows, *rest[1:])


def _parts(
    shape: tuple[int, ...], itemsize: int
) -> Iterator[tuple[int, tuple[int, ...], int, int]]:
    """Yields (bytes, lead, start, stop) of parts of at most CHUNK bytes, or of a single row."""
    if not shape:
        yield itemsize, (), 0, 1
        return
    leads, row = [()], math.prod(shape[1:]) * itemsize
    if row > CHUNK and len(shape) > 1:
        leads, row = [(lead,) for lead in range(shape[0])], row // shape[1]
    rows = max(1, CHUNK // row)
    for lead in leads:
        for start in range(0, shape[len(lead)], rows):
            stop = min(start + rows, shape[len(lead)])
            yield (stop - start) * row, lead, start, stop
