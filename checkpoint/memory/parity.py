"""XOR across hosts: what any one of them held can be computed from what the others hold.

The layout is REFT's (arXiv:2310.12670), that of RAID 5. Each of n hosts cuts its bytes into n - 1
chunks and sends one to each other host; a host keeps the XOR of the n - 1 chunks that it is sent.
So every byte is sent once, and a host holds 1/(n - 1) of its own size in addition.
"""

from collections.abc import Iterable, Sequence

import numpy as np


def chunk_size(sizes: Sequence[int]) -> int:
    """Returns the bytes of a chunk, and of the parity of a host, for hosts that hold `sizes`.

    A multiple of 64: numpy takes five times as long over words that are not aligned.
    """
    return -(-max(sizes) // (len(sizes) - 1) // 64) * 64


def chunk_number(owner: int, keeper: int) -> int:
    """Returns which of its chunks host `owner` sends to host `keeper`."""
    return keeper if keeper < owner else keeper - 1


def cut(parts: Iterable[memoryview], start: int, size: int) -> list[memoryview]:
    """Returns bytes [start, start + size) of `parts` put one after the other, as far as they go."""
    found = []
    for part in parts:
        piece = part[max(0, start) : max(0, start + size)]
        if len(piece):
            found.append(piece)
        start -= len(part)
    return found


def add(target: Iterable[memoryview], start: int, content: memoryview) -> None:
    """XORs `content` into bytes [start, start + len(content)) of `target`'s parts, in place."""
    done = 0
    for part in cut(target, start, len(content)):
        into = np.frombuffer(part, np.uint8)
        _xor(into, np.frombuffer(content, np.uint8, len(part), done))
        done += len(part)


def _xor(into: np.ndarray, other: np.ndarray) -> None:
    """By words of eight bytes: numpy is slower byte by byte where it cannot use wide registers."""
    whole = into.size - into.size % 8
    words = into[:whole].view(np.uint64)
    np.bitwise_xor(words, other[:whole].view(np.uint64), out=words)
    np.bitwise_xor(into[whole:], other[whole:], out=into[whole:])
