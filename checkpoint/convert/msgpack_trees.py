"""Files of Flax's msgpack: one tree, or EasyLM's stream of (keys, tree) pairs.

The library makes objects of all that a file holds. Here only its outline is read; tensors stay in
the file until rows are asked for. Of msgpack's extensions Flax's arrays and NumPy's scalars are
known, and every length is compared with the file before anything is made of it.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoint.convert.pieces import flat_pieces, sizes_of, sound
from checkpoint.convert.sources import Source
from checkpoint.convert.torchfiles import Strided, contiguous
from checkpoint.convert.trees import Keys, source_of
from sharding.errors import MismatchError, UnsafeInputError

ARRAY, SCALAR = 1, 3  # of flax.serialization
CHUNKED = "__msgpack_chunked_array__"
DEPTH = 64
VALUES = 2**20  # of a file, tensors not counted by element
TEXT = 2**12  # bytes of a string
DTYPES = {np.dtype(kind).name: np.dtype(kind) for kind in (
    "float64", "float32", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2, "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
    "uint8", "bool")}  # fmt: skip
# First byte → (kind, struct code of the length, or of the value itself).
_SIZED = {
    0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"), 0xC7: ("ext", ">B"),
    0xC8: ("ext", ">H"), 0xC9: ("ext", ">I"), 0xD9: ("str", ">B"), 0xDA: ("str", ">H"),
    0xDB: ("str", ">I"), 0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}  # fmt: skip
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
            0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def read_msgpack(path: Path) -> Source:
    """Returns the tensors of a file of Flax or EasyLM.

    Raises:
      UnsafeInputError: damaged or hostile files. MismatchError: it holds no tensors.
    """
    if not path.is_file() or not path.stat().st_size:
        raise MismatchError(f"{path} is not a file, or empty")
    tree: dict[Keys, Any] = {}
    left: list[str] = []
    with (
        sound(f"{path} is not a sound file of msgpack"),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        outline, at = _Outline(path, data), 0
        while at < len(data):
            value, at = outline.value(at, len(data), DEPTH)
            keys: Keys = ()
            if isinstance(value, list):  # EasyLM's: the second is a file of Flax by itself
                names, (start, end) = value
                keys = tuple(map(str, names))
                value, stop = outline.value(start, end, DEPTH)
                if stop != end:
                    raise ValueError("something follows a tensor")
            for name, tensor in _leaves(value, keys, str(path)):
                if not hasattr(tensor, "read"):
                    left.append(".".join(name))
                elif name in tree:
                    raise ValueError(f"{name} is there twice")
                else:
                    tree[name] = tensor
    if not tree:
        raise MismatchError(f"{path} holds no tensors")
    return source_of(tree, left, str(path))


def _leaves(value: Any, keys: Keys, where: str) -> list[tuple[Keys, Any]]:
    """Returns keys and values of nested dicts, Flax's tensors in chunks put together."""
    if not isinstance(value, dict):
        return [(keys, value)]
    if value.get(CHUNKED) is True:
        count = len(value["chunks"])
        shape = sizes_of(tuple(value["shape"][str(i)] for i in range(len(value["shape"]))))
        pieces = [value["chunks"][str(i)] for i in range(count)]
        if not all(isinstance(p, Strided) and len(p.shape) == 1 for p in pieces):
            raise ValueError("a tensor's chunks are not flat")
        return [(keys, flat_pieces(pieces, shape, where))]
    return [leaf for key, v in value.items() for leaf in _leaves(v, (*keys, str(key)), where)]


class _Outline:
    """Values of a file: bytes as (start, end), arrays as `Strided`."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._values = path, data, 0

    def value(self, at: int, end: int, depth: int) -> tuple[Any, int]:
        """Returns the value that begins at `at`, and where it ends; raises ValueError."""
        self._values += 1
        if self._values > VALUES or not depth:
            raise ValueError("more values, or deeper ones, than a checkpoint has")
        first, at = self._take(">B", at, end)
        if first < 0x80 or first >= 0xE0:
            return (first if first < 0x80 else first - 256), at
        if first in _CONSTANTS:
            return _CONSTANTS[first], at
        if first in _NUMBERS:
            return self._take(_NUMBERS[first], at, end)
        if first < 0xC0:
            kind, size = (("map", first & 15) if first < 0x90 else ("array", first & 15)
                          if first < 0xA0 else ("str", first & 31))  # fmt: skip
        elif 0xD4 <= first <= 0xD8:
            kind, size = "ext", 1 << (first - 0xD4)
        elif first in _SIZED:
            kind, code = _SIZED[first]
            size, at = self._take(code, at, end)
        else:
            raise ValueError(f"byte {first:#x} begins no value")
        if kind == "ext":
            code, at = self._take(">b", at, end)
        if size > end - at:
            raise ValueError(f"{size} bytes or values in {end - at} bytes")
        if kind == "map":
            return self._map(size, at, end, depth)
        if kind == "array":
            found = []
            for _ in range(size):
                one, at = self.value(at, end, depth - 1)
                found.append(one)
            return found, at
        if kind == "ext":
            return self._tensor(code, at, at + size), at + size
        return (self._text(at, at + size) if kind == "str" else (at, at + size)), at + size

    def _map(self, size: int, at: int, end: int, depth: int) -> tuple[dict, int]:
        found: dict[Any, Any] = {}
        for _ in range(size):
            key, at = self.value(at, end, depth - 1)
            if not isinstance(key, str | int) or key in found:
                raise ValueError("a key is no name, or there twice")
            found[key], at = self.value(at, end, depth - 1)
        return found, at

    def _tensor(self, code: int, at: int, end: int) -> Strided:
        if code not in (ARRAY, SCALAR):
            raise UnsafeInputError(f"{self._path}: extension {code} is not an array of Flax")
        (shape, kind, (start, stop)), last = self.value(at, end, 4)
        kind = self._text(*kind) if isinstance(kind, tuple) else kind
        dtype, shape = DTYPES[kind], sizes_of(tuple(shape))
        if last != end or math.prod(shape) * dtype.itemsize != stop - start:
            raise ValueError(f"an array of {shape} {dtype} in {stop - start} bytes")
        return Strided(self._path, start, dtype, shape, contiguous(shape))

    def _text(self, start: int, stop: int) -> str:
        if stop - start > TEXT:
            raise ValueError(f"a name of {stop - start} bytes")
        return self._data[start:stop].decode()

    def _take(self, code: str, at: int, end: int) -> tuple[Any, int]:
        size = struct.calcsize(code)
        if at + size > end:
            raise ValueError("it ends inside a value")
        return struct.unpack_from(code, self._data, at)[0], at + size
