"""Small files that somebody else may have written, read within bounds.

A folder from elsewhere may hold a pipe, a link to a device or to itself, gigabytes of nothing, or
JSON that is deep or fills the memory. Every small file of a checkpoint, a run or a dataset is read
here: regular files only, up to a size, JSON up to a depth and a count of values.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from checkpoint.objects import ObjectPath, reaches
from sharding.errors import UnsafeInputError

LIMIT = 64 * 2**20  # bytes of a file that is read as a whole
VALUES = 4 * 2**20  # of a JSON text: about 100 bytes of memory each
DEPTH = 64  # of a JSON text
LINE = 2**20  # bytes of one line


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading, without waiting for whoever writes to a pipe.

    Raises:
      FileNotFoundError, NotADirectoryError: there is none.
      UnsafeInputError: it is something else, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UnsafeInputError(f"{path} is not a regular file")
        return os.fdopen(descriptor, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except ValueError as error:  # a name that no file system has, unless it is ours
        if isinstance(error, UnsafeInputError):
            raise
        raise UnsafeInputError(f"{path} cannot be the name of a file") from error
    except OSError as error:
        why = "a link to itself" if error.errno == errno.ELOOP else error.strerror
        raise UnsafeInputError(f"{path} cannot be read: {why}") from error


def read_bytes(path: Path | ObjectPath, limit: int = LIMIT) -> bytes:
    """Returns a small file; raises as `open_file`, and UnsafeInputError beyond `limit` bytes."""
    if isinstance(path, ObjectPath):
        if reaches(path, limit + 1):
            raise UnsafeInputError(f"{path} is larger than {limit:,} bytes")
        return path.read_bytes()
    with open_file(path) as file:
        # By the size first: a file of nothing takes no room on the disk, and much to read.
        if os.fstat(file.fileno()).st_size > limit or len(data := file.read(limit + 1)) > limit:
            raise UnsafeInputError(f"{path} is larger than {limit:,} bytes")
    return data


def read_text(path: Path | ObjectPath, limit: int = LIMIT) -> str:
    """Returns a small file of UTF-8; raises as `read_bytes`."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise UnsafeInputError(f"{path} is not UTF-8: {error.reason}") from error


def read_json(path: Path | ObjectPath, limit: int = LIMIT) -> dict[str, Any]:
    """Returns the JSON object of a small file; raises as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, limit), str(path))


def read_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file of any size, without those that are longer than LINE bytes.

    Raises:
      FileNotFoundError, UnsafeInputError: as `open_file`.
    """
    if isinstance(path, ObjectPath):
        yield from (line for line in path.read_bytes().splitlines() if len(line) <= LINE)
        return
    with open_file(path) as file:
        skipping = False
        while line := file.readline(LINE):
            whole = line.endswith(b"\n") or len(line) < LINE
            if whole and not skipping:
                yield line.rstrip(b"\r\n")
            skipping = not whole


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
      UnsafeInputError: it is anything else, has a name twice, is deeper than DEPTH, has more than
        VALUES values, or text that is not Unicode.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is there twice")
        return found

    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > VALUES:
        raise UnsafeInputError(f"{where} is not JSON of at most {VALUES:,} values")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
        _check(found, escaped=b"\\u" in data)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UnsafeInputError(f"{where} is not JSON: {reason}") from error
    if not isinstance(found, dict):
        raise UnsafeInputError(f"{where} is not a JSON object")
    return found


def _check(value: Any, *, escaped: bool) -> None:
    """Raises ValueError for what is deep, or for an escaped half of a surrogate pair."""
    level = [value]
    for _ in range(DEPTH):
        inner = []
        for each in level:
            if isinstance(each, dict):
                if escaped:
                    "".join(each).encode()
                inner += each.values()
            elif isinstance(each, list):
                inner += each
            elif escaped and isinstance(each, str):
                each.encode()
        level = inner
        if not level:
            return
    raise ValueError(f"it is deeper than {DEPTH} levels")
