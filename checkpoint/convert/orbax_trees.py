"""Checkpoints that Orbax wrote, of any tree: read by tensorstore, some rows at a time.

An item is a folder with `_METADATA`, the keys of its tree, and a zarr or zarr3 array per tensor,
in one OCDBT store or a folder each. A step holds one item or several, a manager's folder steps.
Reading a row reads the chunks that it crosses, as they were stored.
"""

import json
import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from checkpoint.convert.folders import inside, resolved
from checkpoint.convert.mapping import aligned
from checkpoint.convert.pieces import LARGEST, sound
from checkpoint.convert.safetensors import RANK_LIMIT
from checkpoint.convert.sources import Source
from checkpoint.convert.trees import Keys, source_of
from checkpoint.files import LIMIT, read_json
from checkpoint.objects import folder_spec
from checkpoint.steps import COMMITTED, is_remote
from sharding.errors import MismatchError, UnsafeInputError, UsageError

METADATA = "_METADATA"
STORE = "manifest.ocdbt"
CACHE = 2**27  # bytes of chunks that are kept, or two of the largest
EXPANSION = 1024  # times the bytes on disk that all arrays may have; weights hardly compress
HOLES = 64  # bytes of a file per byte on the disk, as a file system may compress it
TOGETHER = 64  # arrays that are opened at once
_STEP = re.compile(r"(?:.*_)?(\d+)")
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")


@dataclass(frozen=True)
class Stored:
    """An array of an item, or one layer of it."""

    store: ts.TensorStore
    where: str

    @cached_property
    def dtype(self) -> np.dtype:
        return np.dtype(self.store.dtype.numpy_dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    def at(self, axis: int, index: int) -> "Stored":
        """Returns one layer of a stack along `axis`."""
        return Stored(self.store[(slice(None),) * axis + (index,)], self.where)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop; raises UnsafeInputError if the storage is damaged."""
        part = self.store[start:stop] if self.store.rank else self.store
        array = aligned(tuple(part.shape), self.dtype)
        _done(lambda: ts.array(array).write(part).result(), self.where)
        return array


def read_orbax(path: Path) -> Source:
    """Returns what a folder holds: an item, a step, or a manager's newest step.

    Several items of a step are told apart by their names, before all other keys.

    Raises:
      UnsafeInputError: damaged or hostile files. MismatchError: there is no item.
    """
    items = _items(path) or _items(_newest(path))
    tree: dict[Keys, Stored] = {}
    left: list[str] = []
    for item in items:
        head = (item.name,) if len(items) > 1 else ()
        arrays, others = _read_item(item)
        tree |= {(*head, *keys): array for keys, array in arrays.items()}
        left += [".".join((*head, *keys)) for keys in others]
    if not tree:
        raise MismatchError(f"{path} holds no arrays")
    return source_of(tree, left, str(path))


def _items(folder: Path) -> list[Path]:
    if (folder / METADATA).exists():
        return [folder]
    if any(_STEP.fullmatch(child.name) for child in folder.iterdir() if child.is_dir()):
        return []
    return sorted(child for child in folder.iterdir() if (child / METADATA).exists())


def _newest(folder: Path) -> Path:
    steps = [(int(m[1]), child) for child in folder.iterdir()
             if (m := _STEP.fullmatch(child.name[-64:])) and _items(child)
             and (not is_remote(child) or (child / COMMITTED).exists())]  # fmt: skip
    if not steps:
        raise MismatchError(f"{folder} holds no {METADATA} of Orbax, nor do its items or steps")
    return max(steps)[1]


def _read_item(item: Path) -> tuple[dict[Keys, Stored], list[Keys]]:
    """Returns the arrays of an item by their keys, and the keys of other values."""
    size = _size(item)
    facts = read_json(inside(item, METADATA))
    names: dict[str, Keys] = {}
    others = []
    with sound(f"{item / METADATA} does not describe a tree"):
        for entry in facts["tree_metadata"].values():
            keys = tuple(str(part["key"]) for part in entry["key_metadata"])
            kind = entry["value_metadata"]["value_type"]
            name = ".".join(keys)
            if kind not in _ARRAYS:
                others += [keys] if kind == "string" else []
            elif name in names or {"", ".", ".."} & set(name.split("/")) or "\0" in name:
                raise UnsafeInputError(f"{item}: the name `{name[:80]}` is unsafe, or there twice")
            else:
                names[name] = keys
    stores = _open(item, facts, list(names), CACHE)
    nbytes = largest = 0
    for store in stores.values():
        shape, chunk = store.shape, store.chunk_layout.read_chunk.shape or ()
        if len(shape) > RANK_LIMIT or any(c > max(1, n) for c, n in zip(chunk, shape, strict=True)):
            raise UnsafeInputError(f"{item}: an array of {shape} in chunks of {chunk}")
        if '"blosc"' in json.dumps(store.codec.to_json()):  # its reader believes what a chunk says
            raise UnsafeInputError(f"{item}: chunks of blosc are not read; Orbax writes zstd")
        itemsize = store.dtype.numpy_dtype.itemsize
        nbytes += math.prod(shape) * itemsize
        largest = max(largest, math.prod(chunk) * itemsize)
    if nbytes > min(size * EXPANSION, LARGEST):
        raise UnsafeInputError(f"{item}: arrays of {nbytes:,} bytes in {size:,} bytes of files")
    if 2 * largest > CACHE:  # or every few rows would read a whole chunk anew
        stores = _open(item, facts, list(names), 2 * largest)
    found = {names[n]: Stored(store, f"{item}: `{n}`") for n, store in stores.items()}
    return found, others


def _size(item: Path) -> int:
    """Returns the bytes of all files of an item.

    Raises:
      UnsafeInputError: one is a link out of it, no regular file, or has far more bytes than it
        takes on the disk: tensorstore makes room for all of a chunk before it reads it, and ends
        the process where there is none.
    """
    if is_remote(item):
        return LARGEST  # stores do not say, and have no links
    total, root = 0, resolved(item)
    for place, folders, files in os.walk(item):
        for path in (Path(place) / name for name in (*folders, *files)):
            if path.is_symlink() and not resolved(path).is_relative_to(root):
                raise UnsafeInputError(f"{path} is a link out of its folder")
        for path in (Path(place) / name for name in files):
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):
                raise UnsafeInputError(f"{path} is not a regular file")
            if facts.st_size > max(LIMIT, HOLES * facts.st_blocks * 512):
                raise UnsafeInputError(f"{path} is {facts.st_size:,} bytes of nothing")
            total += facts.st_size
    return total


def _open(
    item: Path, facts: dict[str, Any], names: list[str], cache: int
) -> dict[str, ts.TensorStore]:
    packed = (item / STORE).exists()
    base = folder_spec(item if is_remote(item) else resolved(item))
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
    complete = facts.get("store_array_data_equal_to_fill_value") is True

    def spec(name: str) -> dict[str, Any]:
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        plain = base | {"path": f"{base['path']}{name}/"}
        return {
            "driver": "zarr3" if facts.get("use_zarr3") else "zarr",
            "kvstore": store if packed else plain, "fill_missing_data_reads": not complete,
        }  # fmt: skip

    found = {}
    for first in range(0, len(names), TOGETHER):
        some = names[first : first + TOGETHER]
        opened = [_done(lambda n=n: ts.open(spec(n), open=True, context=context), n) for n in some]
        for name, future in zip(some, opened, strict=True):
            found[name] = _done(future.result, f"{item}: `{name}`")
    return found


def _done(work: Callable[[], Any], where: str) -> Any:
    """Returns what tensorstore's work gives; raises UnsafeInputError if it fails."""
    try:
        return work()
    except UsageError:
        raise
    except (ValueError, TypeError, LookupError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UnsafeInputError(f"{where} cannot be read: {reason}") from error
