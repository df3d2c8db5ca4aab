"""Safetensors files: headers that are believed only after checking, and data in pieces.

The library maps whole files into memory and writes only what is all there, so neither way stays
within a bound; the format is a length, a JSON object and the bytes. Everything a header says is
compared with the file before a byte is allocated for it.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoint.convert.mapping import aligned
from checkpoint.files import LIMIT, open_file, parse_json
from checkpoint.objects import ObjectPath, reaches, read_part
from sharding.errors import MismatchError, UnsafeInputError, shown

RANK_LIMIT = 32
NAME = 1000  # letters of a tensor's name

DTYPES = {
    "F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype("int64"), "I32": np.dtype("int32"),
    "I16": np.dtype("int16"), "I8": np.dtype("int8"), "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "U16": np.dtype("uint16"),
    "U32": np.dtype("uint32"), "U64": np.dtype("uint64"), "C64": np.dtype("complex64"),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}  # fmt: skip
SMALLER = ("F4", "F6_E2M3", "F6_E3M2")  # legal, of less than a byte, and not read
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: its file, the offset of its first byte, dtype and shape."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Returns the tensors of a file by name, and its metadata.

    Raises:
      UnsafeInputError: the file is truncated, or its header is malformed or contradicts the file.
    """
    if not isinstance(path, ObjectPath):
        open_file(path).close()  # what is not a regular file is refused before anything waits
    head = read_part(path, 0, 8)
    length = struct.unpack("<Q", head)[0] if head else 0
    text = read_part(path, 8, 8 + length) if 2 <= length <= LIMIT else b""
    if not text:
        raise UnsafeInputError(
            f"{path} is not a safetensors file, or truncated: it declares a header of {length:,} "
            f"bytes; the limit is {LIMIT:,}"
        )
    header = parse_json(text, f"{path}: the header")
    metadata = header.pop("__metadata__", {})
    start, end, tensors = 8 + length, 0, {}
    spans = []
    for name, entry in header.items():
        stored = _entry(path, name, entry, start)
        tensors[name] = stored
        spans.append((stored.offset, stored.offset + stored.nbytes, name))
    for first, last, name in sorted(spans):
        if first != start + end:
            raise UnsafeInputError(f"{path}: {shown(name)} overlaps another tensor or leaves a gap")
        end = last - start
    if not reaches(path, start + end) or reaches(path, start + end + 1):
        raise UnsafeInputError(
            f"{path} has not the {start + end} bytes that its header describes: truncated or padded"
        )
    return tensors, metadata if isinstance(metadata, dict) else {}


def _entry(path: Path, name: str, entry: Any, start: int) -> Stored:
    problem = f"{path}: the header's entry of {shown(name)}"
    if len(name) > NAME:
        raise UnsafeInputError(f"{problem} has a name of {len(name):,} letters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UnsafeInputError(f"{problem} is not {{dtype, shape, data_offsets}}")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    for numbers in (shape, offsets):
        if (
            not isinstance(numbers, list)
            or len(numbers) > RANK_LIMIT
            or not all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        ):
            raise UnsafeInputError(f"{problem} holds {shown(numbers)}, not sizes")
    if dtype in SMALLER:
        raise MismatchError(f"{problem} has dtype {dtype}; only {', '.join(DTYPES)} are read")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsafeInputError(f"{problem} has dtype {shown(dtype)}, not {', '.join(DTYPES)}")
    stored = Stored(path, start + (offsets or [0])[0], DTYPES[dtype], tuple(shape))
    if len(offsets) != 2 or offsets[1] - offsets[0] != stored.nbytes:
        raise UnsafeInputError(
            f"{problem} gives {offsets} for {dtype}{shape}, which has {stored.nbytes} bytes"
        )
    return stored


class Tensors:
    """Tensors of open files, read and written some rows at a time. Close it, or use `with`."""

    def __init__(self, tensors: dict[str, Stored], mode: int = os.O_RDONLY) -> None:
        self.tensors = tensors
        files = dict.fromkeys(stored.file for stored in tensors.values())
        self._files = {
            file: file if isinstance(file, ObjectPath) else os.open(file, mode) for file in files
        }
        self._writing = threading.Lock()

    @property
    def facts(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name → dtype and shape."""
        return {name: (stored.dtype, stored.shape) for name, stored in self.tensors.items()}

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._files.values():
            if isinstance(descriptor, int):
                os.close(descriptor)
        self._files = {}

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop; raises UnsafeInputError if the file is cut or gone."""
        stored = self.tensors[name]
        row = stored.nbytes // max(1, stored.shape[0])
        array = aligned((stop - start, *stored.shape[1:]), stored.dtype)
        view, offset = memoryview(array.reshape(-1).view(np.uint8)), stored.offset + start * row
        file = self._files[stored.file]
        if isinstance(file, ObjectPath):
            try:
                view[:] = file.read_bytes(slice(offset, offset + len(view)))
            except (EOFError, FileNotFoundError) as error:
                raise UnsafeInputError(f"{file} ends inside `{name}`, or is gone") from error
            return array
        while view:
            count = os.preadv(file, [view], offset)
            if count == 0:
                raise UnsafeInputError(f"{stored.file} ends inside `{name}`")
            view, offset = view[count:], offset + count
        return array

    def part_rows(self, name: str, lead: tuple[int, ...]) -> int:
        """Returns 1: any rows of a tensor can be written by themselves."""
        return 1

    def put(self, name: str, lead: tuple[int, ...], array: np.ndarray, start: int = 0) -> None:
        """Writes a tensor, or those of its rows that begin at `start`, to its place."""
        stored = self.tensors[name]
        row = stored.nbytes // max(1, stored.shape[0])
        view, offset = memoryview(array.reshape(-1).view(np.uint8)), stored.offset + start * row
        with self._writing:  # the system lets only one write to a file, and the others spin
            while view:
                count = os.pwrite(self._files[stored.file], view, offset)
                view, offset = view[count:], offset + count


def create(
    path: Path, tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]
) -> dict[str, Stored]:
    """Writes the header of a new file and returns where its tensors go; wide dtypes come first."""
    ordered = sorted(tensors, key=lambda entry: -entry[1].itemsize)  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]
        }  # fmt: skip
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)
    return read_header(path)[0]
