"""Arrays of our steps, layer by layer: Orbax reads and writes them only whole.

An array is one zarr3 array inside the step's OCDBT store, which tensorstore opens by itself. What
is written here carries a crc32c in every chunk, which any reader of Orbax checkpoints checks.
"""

import math
import os
from typing import Any

import numpy as np
import tensorstore as ts

from checkpoint import steps
from checkpoint.manager import save_frame
from checkpoint.manifest import read_manifest
from checkpoint.steps import CheckpointError

PARAMS = "params/"
CHUNK = 16 * 2**20  # bytes, within one layer


class NativeTensors:
    """Arrays of one step, by default its parameters, some rows of a layer at a time."""

    def __init__(self, folder: str | os.PathLike, step: int, prefix: str = PARAMS) -> None:
        """Raises CheckpointError for a step without a readable manifest."""
        self._prefix = prefix
        path = steps.folder_path(folder) / str(step) / "state"
        self.where = f"step {step} in {folder}"
        self._base = f"{path}/" if steps.is_remote(folder) else f"file://{path}/"
        # Not forced to disk chunk by chunk: who makes a step forces all of it, once, at the end.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
        self._open: dict[str, ts.TensorStore] = {}
        facts = read_manifest(folder, step)["arrays"]
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
            place.write(part, can_reference_source_data_indefinitely=True).result()

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
) -> NativeTensors:
    """Writes a step of parameters; the caller puts in every array and forces the files to disk."""
    import jax

    tree: dict[str, Any] = {}
    for name, (dtype, shape) in facts.items():
        node = tree
        *parents, leaf = (PARAMS + name).split("/")
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, dtype)
    save_frame(folder, step, tree, meta)
    return NativeTensors(folder, step)
