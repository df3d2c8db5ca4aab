"""Folders of torch.distributed.checkpoint: one pickled index, `.metadata`, and files of archives.

Every tensor is a grid of chunks, whatever the mesh that wrote it, and every chunk a file of
torch.save inside of a `.distcp` file. Written are one file and the index, with the classes that
torch expects spelled out; torch is imported by neither.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.convert.folders import inside, resolved
from checkpoint.convert.pickles import LIMIT, Global, Inert, dumps, loads
from checkpoint.convert.pieces import (
    Pieces,
    PieceTensors,
    WrittenTensors,
    check_grid,
    sizes_of,
    sound,
)
from checkpoint.convert.sources import MOMENTS, MU, NU, PARAMS, Source, adam_settings
from checkpoint.convert.torchfiles import (
    DTYPES,
    KNOWN,
    Strided,
    plain,
    read_torch,
    write_torch,
)
from checkpoint.files import read_bytes
from sharding.errors import MismatchError, UnsafeInputError

INDEX = ".metadata"
DATA = "__0_0.distcp"
_METADATA = "torch.distributed.checkpoint.metadata."
_STORED = "torch.distributed.checkpoint.filesystem._StorageInfo"
_LAYOUT = "torch.serialization._get_layout"
_CLASSES = frozenset(
    [_METADATA + name for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")]
    + ["torch.distributed.checkpoint.planner." + name for name in (  # of Megatron's saver
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")]
    + [_STORED, _LAYOUT, "pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.WindowsPath"]
)  # fmt: skip
_STATE = re.compile(r"(?:optim(?:izer)?\.)?state\.(.+)\.(exp_avg|exp_avg_sq|step)")
_SETTING = re.compile(r"(?:optim(?:izer)?\.)?param_groups\..+\.(lr|betas|eps|weight_decay)")


@dataclass(frozen=True)
class _Chunk:
    """One piece of a tensor: an archive of its own, looked into when it is read."""

    file: Path
    offset: int
    length: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @cached_property
    def tensor(self) -> Strided:
        found = self.value()
        facts = (found.dtype, found.shape) if isinstance(found, Strided) else found
        if facts != (self.dtype, self.shape):
            raise UnsafeInputError(f"{self.file}: at {self.offset} is not the tensor of the index")
        return found

    def value(self) -> Any:
        return read_torch(self.file, offset=self.offset, length=self.length)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tensor.read(start, stop)

    def at(self, axis: int, index: int) -> "_Layer":
        return _Layer(self, axis, index)


@dataclass(frozen=True)
class _Layer:
    """One layer of a chunk that holds several; the archive is looked into when it is read."""

    chunk: _Chunk
    axis: int
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.chunk.shape[: self.axis], *self.chunk.shape[self.axis + 1 :])

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.chunk.tensor.at(self.axis, self.index).read(start, stop)


def read_dcp(folder: Path) -> Source:
    """Returns what a folder holds; Adam's moments and step where they lie as torch puts them.

    Raises:
      UnsafeInputError: damaged or hostile files. MismatchError: steps that differ.
    """
    folder = _newest(folder)
    tensors, values = read_index(folder)
    parts: dict[str, dict[str, Pieces]] = {PARAMS: {}}
    steps, left = set(), [name for name in values if not _SETTING.fullmatch(name)]
    for name, tensor in tensors.items():
        state = _STATE.fullmatch(name)
        if state and state[2] == "step":
            steps.add(float(tensor.read(0, 1)) if not tensor.shape else -1.0)
        elif state:
            parts.setdefault(MOMENTS[state[2]], {})[state[1]] = tensor
        else:
            parts[PARAMS][name] = tensor
    if len(steps) > 1 or not all(step.is_integer() and step >= 0 for step in steps):
        raise MismatchError(f"{folder}: its parameters are at steps {sorted(steps)[:4]}")
    settings = {}
    for name, chunk in values.items():
        found = _SETTING.fullmatch(name)
        if found and found[1] not in settings:
            settings[found[1]] = chunk.value()
    return Source(
        {part: PieceTensors(found) for part, found in parts.items()},
        int(steps.pop()) if steps else None, adam_settings(settings), sorted(left),
    )  # fmt: skip


def _newest(folder: Path) -> Path:
    """Returns a folder with an index: this one, or of those in it, as `step_5`, the newest."""
    if (folder / INDEX).exists():
        return folder
    below = [child for child in folder.iterdir() if (child / INDEX).exists()]
    steps = {int(number[1][:18]): child for child in below
             if (number := re.search(r"(\d+)$", child.name))}  # fmt: skip
    if not below or len(steps) != len(below) > 1:
        names = ", ".join(sorted(child.name for child in below)[:4])
        raise MismatchError(f"{folder} has no {INDEX}" + (f"; name one of {names}" * bool(below)))
    found = steps[max(steps)] if steps else below[0]
    if not resolved(found).is_relative_to(resolved(folder)):
        raise UnsafeInputError(f"{found} is a link out of its folder")
    return found


def read_index(folder: Path) -> tuple[dict[str, Pieces], dict[str, _Chunk]]:
    """Returns the tensors of a folder and its other values, by name; raises UnsafeInputError."""
    path = inside(folder, INDEX)
    index = loads(read_bytes(path, LIMIT), str(path), KNOWN | _CLASSES, plain)
    with sound(f"{path} is not an index of tensors"):
        places = _places(folder, index.get("storage_data"))
        tensors, values = {}, {}
        for name, item in index.get("state_dict_metadata").items():
            if item.name != _METADATA + "TensorStorageMetadata":
                values[name] = _Chunk(*places[name, None], np.dtype("V"), ())
                continue
            dtype = DTYPES[item.get("properties").state[0].name]
            size, pieces = sizes_of(item.get("size")), []
            for chunk in item.get("chunks"):
                offsets, shape = sizes_of(chunk.get("offsets")), sizes_of(chunk.get("sizes"))
                if 0 not in shape:
                    pieces.append((offsets, _Chunk(*places[name, offsets], dtype, shape)))
            tensors[name] = Pieces(dtype, size, tuple(pieces))
            check_grid(tensors[name], f"{path}: `{name}`")
    return tensors, values


def _places(folder: Path, stored: dict[Inert, Inert]) -> dict[tuple, tuple[Path, int, int]]:
    """Returns (name, offsets) → file, offset and length of every item."""
    files: dict[str, Path] = {}
    found = {}
    for key, info in stored.items():
        if info.get("transform_descriptors"):
            raise UnsafeInputError(f"{folder / INDEX}: `{key.get('fqn')}` is stored transformed")
        name, start, length = (info.get(x) for x in ("relative_path", "offset", "length"))
        if name not in files:
            files[name] = inside(folder, name)
        offsets = key.get("offset")
        place = files[name], *sizes_of((start, length))
        found[key.get("fqn"), None if offsets is None else sizes_of(offsets)] = place
    return found


# ---------------------------------------------------------------- writing


class DcpWriter:
    """A folder being written: `parts` take tensors, `finish` writes the index."""

    def __init__(self, folder: Path, step: int | None) -> None:
        """step: the number of updates taken, where moments are written too."""
        self._folder, self._step = folder, step
        self._file = (folder / DATA).open("wb")
        self._items: dict[str, tuple[np.ndarray, int, int]] = {}
        names = {PARAMS: "model.{}", MU: "optim.state.{}.exp_avg", NU: "optim.state.{}.exp_avg_sq"}
        self.parts = {
            part: WrittenTensors(lambda name, array, form=form: self._put(form.format(name), array))
            for part, form in names.items()
        }

    def _put(self, name: str, array: np.ndarray) -> Strided:
        start = self._file.tell()
        write_torch(self._file, array)
        self._file.flush()
        length = self._file.seek(0, 2) - start
        self._items[name] = _tensor_entry(array), start, length
        return read_torch(self._folder / DATA, offset=start, length=length)

    def finish(self) -> None:
        """Writes the step of every parameter that has moments, and the index."""
        for name in self.parts[MU].tensors:
            self._put(f"optim.state.{name}.step", np.array(self._step, np.float32))
        self._file.close()
        stored = {
            _record("MetadataIndex", fqn=name, offset=_size(entry.get("size"), 0), index=0):
            Inert(_STORED, state={"relative_path": DATA, "offset": start, "length": length,
                                  "transform_descriptors": None}, new=True)
            for name, (entry, start, length) in self._items.items()
        }  # fmt: skip
        index = _record(
            "Metadata", state_dict_metadata={n: entry for n, (entry, _, _) in self._items.items()},
            planner_data={name: _path(name) for name in self._items}, storage_data=stored,
            storage_meta=None, version="1.0.0",
        )  # fmt: skip
        (self._folder / INDEX).write_bytes(dumps(index))


def _tensor_entry(array: np.ndarray) -> Inert:
    dtype = next(Global(name) for name, kind in DTYPES.items() if kind == array.dtype)
    layout = Inert(_LAYOUT, ("torch.strided",))
    form = Inert(_METADATA + "_MEM_FORMAT_ENCODING", (0,))
    properties = Inert(_METADATA + "TensorProperties", state=(dtype, layout, False, form, False),
                       new=True)  # fmt: skip
    size = Inert("torch.Size", (array.shape,))
    chunk = _record("ChunkStorageMetadata", offsets=_size(size, 0), sizes=size)
    return _record("TensorStorageMetadata", properties=properties, size=size, chunks=[chunk])


def _size(size: Inert, value: int) -> Inert:
    return Inert("torch.Size", ((value,) * len(size.args[0]),))


def _record(name: str, **state: Any) -> Inert:
    return Inert(_METADATA + name, state=state, new=True)


def _path(name: str) -> tuple[str, ...]:
    """Returns the keys of the nested dicts that torch flattened to `name`."""
    state = _STATE.fullmatch(name)
    return ("optim", "state", state[1], state[2]) if state else tuple(name.split(".", 1))
