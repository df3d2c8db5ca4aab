"""Arrays of our steps, layer by layer: Orbax reads and writes them only whole.

An array is one zarr3 array inside the step's OCDBT store, which tensorstore opens by itself. What
is written here carries a crc32c in every chunk, which any reader of Orbax checkpoints checks.
"""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from checkpoint import steps
from checkpoint.fingerprint import part_sums, sums_text
from checkpoint.manager import save_frame
from checkpoint.manifest import check_fingerprints, read_manifest, write_record
from checkpoint.steps import CheckpointError

PARAMS = "params/"
CHUNK = 16 * 2**20  # bytes, within one layer


class NativeTensors:
    """Arrays of one step, by default its parameters, some rows of a layer at a time."""

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
        self._sums: dict[str, np.ndarray] = {}  # of what was put
        path = steps.folder_path(folder) / str(step) / "state"
        self.where = f"step {step} in {folder}"
        self._base = f"{path}/" if steps.is_remote(folder) else f"file://{path}/"
        # Not forced to disk chunk by chunk: who makes a step forces all of it, once, at the end.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
        self._open: dict[str, ts.TensorStore] = {}
        facts = read_manifest(folder, step, checked=checked)["arrays"]
        self.facts = {
            name.removeprefix(prefix): (np.dtype(fact["dtype"]), tuple(fact["shape"]))
            for name, fact in facts.items()
            if name.startswith(prefix)
        }

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop of array[lead]; raises CheckpointError if it is damaged."""
        try:
            if name not in self._open:
                self._open[name] = ts.open(self._spec(name), context=self._context).result()
            store = self._open[name]
            rows = (*lead, slice(start, stop))[: store.rank]  # a scalar has none
            return store[rows].read().result()
        except (ValueError, OSError) as error:
            text = f"cannot read `{name}` of {self.where}: {steps.reason(error)}"
            raise CheckpointError(text) from error

    def put(self, name: str, lead: tuple[int, ...], array: np.ndarray) -> None:
        """Writes array[lead] of a step made by `create_step`."""
        if not array.shape:
            self._put_scalar(name, array)
            return
        if name not in self._open:
            dtype, shape = self.facts[name]
            rest = shape[len(lead) :]
            row = math.prod(rest[1:]) * dtype.itemsize
            chunk = (*(1 for _ in lead), min(rest[0], max(1, CHUNK // row)), *rest[1:])
            metadata = {
                "shape": shape, "data_type": dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}},
                           {"name": "crc32c"}],
            }  # fmt: skip
            spec = self._spec(name) | {"metadata": metadata}
            self._open[name] = ts.open(
                spec, create=True, delete_existing=True, context=self._context
            ).result()
        store = self._open[name]
        rows = 4 * store.chunk_layout.write_chunk.shape[len(lead)]
        for start in range(0, len(array), rows):  # a bound on what is being encoded at once
            part = array[start : start + rows]
            place = store[(*lead, slice(start, start + len(part)))]
            written = place.write(part, can_reference_source_data_indefinitely=True)
            self._sums[name] = self._sums.get(name, 0) + self._part_sums(name, lead, start, part)
            written.result()

    def _put_scalar(self, name: str, array: np.ndarray) -> None:
        """Writes an array without axes, which the step's frame holds already as a zero."""
        ts.open(self._spec(name), context=self._context).result().write(array).result()
        self._sums[name] = self._part_sums(name, (), 0, array)

    def finish(self) -> None:
        """Writes the integrity record of a step made by `create_step`, all arrays put."""
        arrays = {self._prefix + name: sums_text(sums) for name, sums in self._sums.items()}
        write_record(*self._step, arrays)
        self.close()

    def verify(self, advance: Callable[[int], None] = lambda nbytes: None) -> None:
        """Reads every array and compares it with its fingerprint; `advance` is told bytes.

        Raises:
          CheckpointError: an array cannot be read, or holds other bits; the message names all.
        """
        found = {}
        for name, (dtype, shape) in self.facts.items():
            sums = np.zeros(2, np.uint32)
            for lead, start, stop in _parts(shape, dtype.itemsize):
                part = self.read(name, lead, start, stop)
                sums = sums + self._part_sums(name, lead, start, part)
                advance(part.nbytes)
            found[self._prefix + name] = sums_text(sums)
        check_fingerprints(*self._step, found)

    def _part_sums(self, name: str, lead: tuple[int, ...], start: int, part: np.ndarray):
        shape = self.facts[name][1]
        whole = part.reshape((1,) * (len(shape) - part.ndim) + part.shape)
        first = (*lead, start, *(0 for _ in shape))[: len(shape)]
        return part_sums(whole, first, shape)

    def close(self) -> None:
        """Lets the arrays go."""
        self._open = {}

    def _spec(self, name: str) -> dict[str, Any]:
        path = (self._prefix + name).replace("/", ".") + "/"
        return {"driver": "zarr3",
                "kvstore": {"driver": "ocdbt", "base": self._base, "path": path}}  # fmt: skip


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

    tree: dict[str, Any] = {}
    for name, (dtype, shape) in facts.items():
        node = tree
        *parents, leaf = (prefix + name).split("/")
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, dtype)
    save_frame(folder, step, tree, meta)
    return NativeTensors(folder, step, prefix, checked=False)


def _parts(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yields (lead, start, stop) of parts of at most CHUNK bytes, or of a single row."""
    if not shape:
        yield (), 0, 1
        return
    row = math.prod(shape[1:]) * itemsize
    if row <= CHUNK or len(shape) == 1:
        rows = max(1, CHUNK // row)
        yield from (((), i, min(i + rows, shape[0])) for i in range(0, shape[0], rows))
        return
    rows = max(1, CHUNK // (row // shape[1]))
    for lead in range(shape[0]):
        yield from (((lead,), i, min(i + rows, shape[1])) for i in range(0, shape[1], rows))
