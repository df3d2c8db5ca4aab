"""Files of `torch.save`, without torch: a zip of a pickle and of the tensors' bytes, all stored.

Reading gives the pickle's value with a `Strided` for every tensor: where it lies in the file. The
bytes stay there until rows are asked for. Everything the file declares is compared with its size
first; what is compressed, overlaps, or names places outside of the archive is refused.
"""

import math
import os
import struct
import zipfile
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from checkpoint.convert.pickles import LIMIT, Global, Inert, Persistent, dumps, is_key, loads
from checkpoint.convert.safetensors import RANK_LIMIT
from checkpoint.files import open_file
from sharding.errors import UnsafeInputError, shown

DIRECTORY = 32 * 2**20  # bytes of an archive's directory
_DTYPES = {
    "float64": ("Double", np.float64), "float32": ("Float", np.float32),
    "float16": ("Half", np.float16), "bfloat16": ("BFloat16", ml_dtypes.bfloat16),
    "int64": ("Long", np.int64), "int32": ("Int", np.int32), "int16": ("Short", np.int16),
    "int8": ("Char", np.int8), "uint8": ("Byte", np.uint8), "bool": ("Bool", np.bool_),
}  # fmt: skip
DTYPES = {f"torch.{name}": np.dtype(kind) for name, (_, kind) in _DTYPES.items()}
STORAGES = {f"torch.{s}Storage": np.dtype(kind) for s, kind in _DTYPES.values()}
NAMES = {dtype: name for name, dtype in STORAGES.items()}
_TENSOR = "torch._utils._rebuild_tensor_v2"
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_DICT = "collections.OrderedDict"
_DICTS = {_DICT, "collections.defaultdict"}
_SETS = {"builtins.set", "__builtin__.set"}
KNOWN = frozenset({
    _TENSOR, _SUBCLASS, "torch.Tensor", _PARAMETER, *_DICTS, "builtins.dict", "__builtin__.dict",
    "torch.Size", "torch.device", *_SETS, *DTYPES, *STORAGES,
})  # fmt: skip


@dataclass(frozen=True)
class Strided:
    """A tensor in a file: offset of its first element in bytes, strides in elements."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def part(self, start: int, stop: int) -> "Strided":
        """Returns rows start to stop."""
        offset = self.offset + start * self.stride[0] * self.dtype.itemsize
        return replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

    def at(self, axis: int, index: int) -> "Strided":
        """Returns one layer of a stack along `axis`."""
        offset = self.offset + index * self.stride[axis] * self.dtype.itemsize
        shape, stride = ((*x[:axis], *x[axis + 1 :]) for x in (self.shape, self.stride))
        return replace(self, offset=offset, shape=shape, stride=stride)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns rows start to stop, all by default.

        Raises:
          UnsafeInputError: the file has become shorter.
        """
        shape = self.shape
        if shape:
            shape = ((shape[0] if stop is None else stop) - start, *shape[1:])
        if not math.prod(shape):
            return np.empty(shape, self.dtype)
        size = self.dtype.itemsize
        offset = self.offset + (start * self.stride[0] * size if shape else 0)
        buffer = _read(self.file, offset, size * _extent(shape, self.stride)).view(self.dtype)
        strides = [s * size for s in self.stride]
        rows = np.lib.stride_tricks.as_strided(buffer, shape, strides)
        return np.ascontiguousarray(rows).reshape(shape)  # a scalar stays one


def read_torch(
    path: Path, allowed: Set[str] = frozenset(), *, offset: int = 0, length: int | None = None
) -> Any:
    """Returns what `torch.save` wrote to a file, or to `length` bytes of it from `offset` on.

    Classes among `allowed`, and dtypes, become records (pickles.Inert, pickles.Global).

    Raises:
      UnsafeInputError: the file is damaged, hostile, or not such a file.
    """
    return _Reader(path, offset, length).load(KNOWN | allowed)


def plain(name: str, args: tuple) -> Any:
    """Returns the dict, tuple or list that a call would make, a record of any other."""
    if name == _DICT and args:
        if not isinstance(args[0], list | tuple):
            raise TypeError("a dict of what is no list")
        if not all(is_key(key) for key, _ in args[0]):
            raise TypeError("a key is neither a string nor a small number")
        return dict(args[0])
    if name in _DICTS:
        return {}
    if name == "torch.Size":
        (sizes,) = args
        if not isinstance(sizes, tuple | list) or len(sizes) > RANK_LIMIT:
            raise TypeError("a torch.Size of what is no tuple, or of too many axes")
        return tuple(sizes)
    if name in _SETS:
        if args and not isinstance(args[0], list):
            raise TypeError("a set of what is no list")
        return list(args[0]) if args else []
    return Inert(name, args)


class _Window:
    """Some bytes of a file as a file, for zipfile; it reads `limit` bytes at once at most.

    At first that is the size of a directory, of whose entries each takes some 700 bytes of memory.
    """

    def __init__(self, file: BinaryIO, start: int, size: int = 0) -> None:
        self._file, self._start, self.size, self._at = file, start, size, 0
        self.limit = DIRECTORY

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = 0) -> int:
        at = to + (0, self._at, self.size)[whence]
        if at < 0:
            raise OSError("a place before the beginning")
        self._at = at
        return at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self._at)
        count = left if count is None or count < 0 else min(count, left)
        if count > self.limit:
            raise OSError(f"a directory of {count:,} bytes")
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        self._at += len(data)
        return data

    def write(self, data: bytes | np.ndarray) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.write(data)
        self._at += count
        return count

    def flush(self) -> None:
        self._file.flush()


class _Reader:
    """One archive: where its entries lie, and its pickle's tensors."""

    def __init__(self, path: Path, offset: int, length: int | None) -> None:
        self._path, self._offset, self._where = path, offset, str(path)
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = size - offset if length is None else length
            if not 0 <= offset <= offset + length <= size:
                raise UnsafeInputError(
                    f"{path} has {size} bytes, bytes {offset} to {offset + length} are asked for"
                )
            window = _Window(file, offset, length)
            try:
                with zipfile.ZipFile(window) as archive:
                    window.limit = LIMIT
                    self._entries = self._find(window, archive.infolist())
                    self._pickle = archive.read(self._entry("data.pkl"))
                    if "byteorder" in self._entries:
                        order = archive.read(self._entry("byteorder"))
                        if order.strip() != b"little":
                            raise UnsafeInputError(f"{path}: big-endian files are not read")
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError,
                    RuntimeError, struct.error) as error:  # fmt: skip
                if isinstance(error, UnsafeInputError):
                    raise
                reason = " ".join(str(error).split())[:120]
                raise UnsafeInputError(f"{path} is not a file of torch.save: {reason}") from error

    def _find(self, window: _Window, infos: list[zipfile.ZipInfo]) -> dict[str, tuple]:
        """Returns name → (place of the data, size, whole name) of every entry, all checked."""
        found: dict[str, tuple] = {}
        end, root = 0, infos[0].filename.partition("/")[0] if infos else ""
        for info in sorted(infos, key=lambda i: i.header_offset):
            problem = f"{self._where}: its entry `{info.filename[:80]}`"
            parts = info.orig_filename.split("/")
            strange = {"", ".", ".."} & set(parts) or set(info.orig_filename) & {"\\", "\0"}
            if strange or parts[0] != root or len(parts) < 2:
                raise UnsafeInputError(f"{problem} is not inside `{root[:40]}/`")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise UnsafeInputError(f"{problem} is compressed, or has two sizes")
            window.seek(info.header_offset)
            head = window.read(30)
            if info.header_offset < end or len(head) != 30 or head[:4] != b"PK\3\4":
                raise UnsafeInputError(f"{problem} has no header, or overlaps another entry")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
            end = start + info.file_size
            name = "/".join(parts[1:])
            if end > window.size or name in found:
                raise UnsafeInputError(f"{problem} ends beyond the file, or is there twice")
            found[name] = self._offset + start, info.file_size, info.filename
        return found

    def _entry(self, name: str) -> str:
        """Returns the whole name of a small entry."""
        if name not in self._entries:
            raise UnsafeInputError(f"{self._where} is not a file of torch.save: no {name}")
        _, size, whole = self._entries[name]
        if size > LIMIT:
            raise UnsafeInputError(f"{self._where}: {name} has {size:,} bytes, over {LIMIT:,}")
        return whole

    def load(self, allowed: Set[str]) -> Any:
        return loads(self._pickle, self._where, allowed, self._rebuild, self._storage)

    def _storage(self, pid: Any) -> Strided:
        kind, dtype, key, _, count = pid
        dtype = STORAGES[dtype.name]
        if not isinstance(key, str):
            raise TypeError("a storage without a name")
        start, size, _ = self._entries[f"data/{key}"]
        if kind != "storage" or type(count) is not int or count * dtype.itemsize != size:
            raise ValueError(f"a storage of {shown(count)} {dtype} has {size} bytes")
        return Strided(self._path, start, dtype, (count,), (1,))

    def _rebuild(self, name: str, args: tuple) -> Any:
        if name == _TENSOR:
            return self._tensor(*args)
        if name == _SUBCLASS and args[:2] == (Global(_TENSOR), Global("torch.Tensor")):
            return self._tensor(*args[2])  # a plain tensor that was given attributes
        return args[0] if name == _PARAMETER else plain(name, args)

    def _tensor(self, storage: Strided, first: int, shape: tuple, stride: tuple, *_) -> Strided:
        if len(shape) != len(stride) or len(shape) > RANK_LIMIT:
            raise ValueError(f"a tensor of {len(shape)} axes has {len(stride)} strides")
        numbers = (first, *shape, *stride)
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise ValueError(f"a tensor of {shown(numbers)}")
        (count,) = storage.shape
        size = math.prod(shape)
        if size > count or (size and first + _extent(shape, stride) > count):
            raise ValueError(f"a tensor of {shape} from {first} on lies in {count} elements")
        offset = storage.offset + first * storage.dtype.itemsize
        return Strided(storage.file, offset, storage.dtype, tuple(shape), tuple(stride))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides, in elements, of a tensor that lies row by row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Returns how many elements lie between the first and the last, both counted."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _read(path: Path, offset: int, count: int) -> np.ndarray:
    buffer = np.empty(count, np.uint8)
    view = memoryview(buffer)
    descriptor = os.open(path, os.O_RDONLY)  # not kept: there may be more than may be open
    try:
        while view:
            done = os.preadv(descriptor, [view], offset)
            if not done:
                raise UnsafeInputError(f"{path} has become shorter")
            view, offset = view[done:], offset + done
    finally:
        os.close(descriptor)
    return buffer


# ---------------------------------------------------------------- writing


def write_torch(file: BinaryIO, value: Any) -> None:
    """Writes plain values, records and numpy arrays as `torch.save` would, from here on in `file`.

    Arrays become contiguous CPU tensors, one storage each.
    """
    arrays: list[np.ndarray] = []
    data = dumps(_with_tensors(value, arrays))
    with zipfile.ZipFile(_Window(file, file.tell()), "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        for key, array in enumerate(arrays):
            info = zipfile.ZipInfo(f"archive/data/{key}")
            info.file_size = array.nbytes  # decides whether 64-bit sizes are needed
            with archive.open(info, "w") as entry:
                entry.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _with_tensors(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        kind, key = Global(NAMES[value.dtype]), str(len(arrays))
        arrays.append(value)
        storage = Persistent(("storage", kind, key, "cpu", value.size))
        stride = contiguous(value.shape)
        return Inert(_TENSOR, (storage, 0, value.shape, stride, False, Inert(_DICT)))
    if isinstance(value, dict):
        return {key: _with_tensors(v, arrays) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_with_tensors(v, arrays) for v in value)
    return value
