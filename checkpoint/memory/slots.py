"""Memory for the snapshots of one process: two slots, one of them with the last that counts.

The keeper creates it as an anonymous file, so that nothing is left behind when the keeper ends and
the size of /dev/shm does not matter; a trainer maps the same pages. All of it is allocated at once:
what does not fit is refused at start, not by a signal in the middle of a run.

A slot begins with a header of 64 bytes, cleared before anything is written and complete only
afterwards; it has a checksum, so half a header is none. Then come the pieces of arrays, and then a
JSON index that says what they are and what each adds to the fingerprint of its array.
"""

import contextlib
import json
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any

from sharding.errors import UsageError

HEADER = 64
_PAGE = 4096
_FIELDS = struct.Struct("<8sqQQI")  # magic, step, where the index is, its bytes, its CRC
_MAGIC = b"torusnap"
_COMMITTED, _NEXT = range(2)  # words of the first page
_SPARE = 0.05  # of the memory that is free, never taken


class Slots:
    """Two slots of `capacity` bytes, and two words: the step that counts and the one to take next.

    `path` is where another process of this user opens the same memory.
    """

    def __init__(self, descriptor: int, capacity: int) -> None:
        self._map = mmap.mmap(descriptor, _PAGE + 2 * capacity)
        self._words = memoryview(self._map)[:16].cast("q")
        self._descriptor, self.capacity = descriptor, capacity
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"

    @classmethod
    def create(cls, size: int) -> "Slots":
        """Allocates two slots for `size` bytes each.

        Raises:
          UsageError: the machine has not so much memory free.
        """
        capacity = round_up(size)
        total, free = _PAGE + 2 * capacity, free_memory()
        short = f"two snapshots of {_gib(size)} do not fit into {_gib(free)} of free memory"
        cure = "; use more hosts, or --config.checkpoint.snapshot_every=0"
        if total > (1 - _SPARE) * free:
            raise UsageError(short + cure)
        descriptor = os.memfd_create("torus-snapshots")
        try:
            os.posix_fallocate(descriptor, 0, total)
            slots = cls(descriptor, capacity)
        except OSError as error:
            os.close(descriptor)
            raise UsageError(f"{short} ({error.strerror}){cure}") from error
        slots.committed = slots.next = -1
        return slots

    @classmethod
    def attach(cls, path: str) -> "Slots":
        """Maps the memory that another process created; stays valid when that process ends."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            return cls(descriptor, (os.fstat(descriptor).st_size - _PAGE) // 2)
        finally:
            os.close(descriptor)  # the map has its own

    def close(self) -> None:
        """Gives the memory back as soon as nobody else maps it; for the process that created it."""
        os.close(self._descriptor)
        self._words.release()
        with contextlib.suppress(BufferError):  # a view of it is still in use
            self._map.close()

    committed = property(
        lambda self: self._words[_COMMITTED],
        lambda self, step: self._words.__setitem__(_COMMITTED, step),
        doc="The step that every process of the run holds, -1 for none.",
    )
    next = property(
        lambda self: self._words[_NEXT],
        lambda self, step: self._words.__setitem__(_NEXT, step),
        doc="The step to take a snapshot of next, -1 for none yet.",
    )

    def data(self, slot: int) -> memoryview:
        """Returns all bytes of a slot, header included."""
        start = _PAGE + slot * self.capacity
        return memoryview(self._map)[start : start + self.capacity]

    def held(self) -> dict[int, int]:
        """Returns step → slot of what was written completely."""
        found = ((self._header(slot), slot) for slot in (0, 1))
        return {header[1]: slot for header, slot in found if header}

    def begin(self, step: int) -> int:
        """Clears the slot to use for `step`, never that of the step that counts; returns it."""
        held = self.held()
        slot = held.get(step)
        if slot is None:
            slot = 1 - held[self.committed] if self.committed in held else 0
        self.data(slot)[:HEADER] = bytes(HEADER)
        return slot

    def put(self, slot: int, offset: int, content: memoryview | bytes) -> None:
        """Copies `content` to `offset` of a slot."""
        self.data(slot)[offset : offset + len(content)] = content

    def commit(self, slot: int, step: int, offset: int, index: dict[str, Any]) -> None:
        """Writes the index at `offset`, and then the header: from here on the slot holds `step`."""
        text = json.dumps(index).encode()
        self.put(slot, offset, text)
        fields = _FIELDS.pack(_MAGIC, step, offset, len(text), zlib.crc32(text))
        self.data(slot)[:HEADER] = (fields + zlib.crc32(fields).to_bytes(4, "little")).ljust(HEADER)

    def index(self, slot: int) -> dict[str, Any] | None:
        """Returns the index of a slot, None if the slot holds nothing or the index is damaged."""
        header = self._header(slot)
        if header is None:
            return None
        _, _, offset, size, crc = header
        text = bytes(self.data(slot)[offset : offset + size])
        return json.loads(text) if zlib.crc32(text) == crc else None

    def _header(self, slot: int) -> tuple | None:
        raw = bytes(self.data(slot)[:HEADER])
        fields, crc = raw[: _FIELDS.size], raw[_FIELDS.size : _FIELDS.size + 4]
        whole = fields[:8] == _MAGIC and zlib.crc32(fields) == int.from_bytes(crc, "little")
        return _FIELDS.unpack(fields) if whole else None


def round_up(size: int) -> int:
    """Returns the capacity of slots for `size` bytes: whole pages."""
    return -(-size // _PAGE) * _PAGE


def free_memory() -> int:
    """Returns the bytes that may still be allocated: of the machine, or of its control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for group in _groups():
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            limit = int((group / "memory.max").read_text())
            free = min(free, limit - int((group / "memory.current").read_text()) + _cached(group))
    return free


def _cached(group: Path) -> int:
    """Returns the bytes of cached files, which the kernel gives back when memory is asked for."""
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(stat.get("inactive_file", 0))
    return 0


def _groups() -> list[Path]:
    """Returns the control groups whose limits hold here: this process's own, and those around."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/") and (own := root / line[4:]) != root:
                return [own, *(group for group in own.parents if group.is_relative_to(root))]
    return [root]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
