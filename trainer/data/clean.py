"""Which documents enter a dataset: cleaning one, and telling it from those before.

`Duplicates` remembers 8 bytes per key, half as much again while it grows: 1 key a document for
exact duplicates, 14 for near ones.
"""

import hashlib
import zlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from trainer.packages import data_library

if TYPE_CHECKING:
    from datasketch import MinHash

# Documents of Jaccard similarity s share a band with probability 1 - (1 - s^8)^14: 5% at 0.5, 56%
# at 0.7, 92% at 0.8, 99.96% at 0.9.
BANDS, _ROWS, _SHINGLE = 14, 8, 5
_CONTROL = bytes({*range(32), 127} - {9, 10})


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a document must be like; the reasons for a rejection are the names used in `clean`."""

    min_chars: int = 1
    max_chars: int = 0  # 0 = no limit
    max_control: float = 0.05  # of its bytes
    max_repeated: float = 0.5  # of its characters, in lines that an earlier line equals


class Rejected(Exception):
    """A document that stays out."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def clean(data: bytes | Rejected, rules: Rules) -> tuple[str, bytes]:
    """Returns the text of a document, as str and UTF-8; almost always it is `data` unchanged.

    A byte order mark goes, line ends become \\n, control characters other than tab and line end go.

    Raises:
      Rejected: `data` itself, or bytes that are not UTF-8 or break a rule.
    """
    if isinstance(data, Rejected):
        raise data
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    kept = data.translate(None, _CONTROL)
    if len(data) - len(kept) > rules.max_control * len(data):
        raise Rejected("control_characters", f"{len(data) - len(kept):,} of {len(data):,} bytes")
    try:
        text = kept.decode()
    except UnicodeDecodeError as error:
        raise Rejected("invalid_utf8", f"{error.reason} at byte {error.start:,}") from None
    size = len(text.strip())
    if size < rules.min_chars:
        raise Rejected("too_short", f"{size:,} characters")
    if rules.max_chars and size > rules.max_chars:
        raise Rejected("too_long", f"{size:,} characters")
    lines = text.split("\n")
    repeated = len(text) - len(lines) + 1 - sum(map(len, set(lines)))
    if repeated > rules.max_repeated * size:
        raise Rejected("repeated_lines", f"{repeated:,} of {size:,} characters")
    return text, kept


def digest(data: bytes) -> int:
    """Returns 64 bits of a document's content: its key for exact duplicates, and its split."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def band_keys(text: str) -> np.ndarray:
    """Returns uint64 (14,): documents that share one at its place are near duplicates.

    MinHash (Broder 1997) over shingles of 5 words, of 5 characters where words are not spaced.
    """
    words = text.lower().split()
    if len(text) > 20 * len(words):
        words = list("".join(words))
    starts = range(max(1, len(words) - _SHINGLE + 1))
    shingles = [key.encode() for key in {" ".join(words[i : i + _SHINGLE]) for i in starts}]
    sketch = _sketch().copy()
    for begin in range(0, len(shingles), 4096):  # 112 hashes each are held at once
        sketch.update_batch(shingles[begin : begin + 4096])
    bands = sketch.hashvalues.reshape(BANDS, _ROWS)
    keys = [digest(bytes([number]) + band.tobytes()) for number, band in enumerate(bands)]
    return np.asarray(keys, np.uint64)


@cache
def _sketch() -> "MinHash":
    return data_library("datasketch").MinHash(
        BANDS * _ROWS, seed=1, hashfunc=zlib.crc32, scheme="affine32"
    )


class Duplicates:
    """Tells first documents from later ones by their keys.

    Past `capacity` keys the older half is forgotten: a document is compared with those of at least
    the last capacity / 2 keys.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._old: list[np.ndarray] = []
        self._new: list[np.ndarray] = []  # sorted, each at most half as long as the one before

    def first(self, keys_DK: np.ndarray) -> np.ndarray:
        """Returns bool (docs,): which documents share no key with a first one before them.

        Args:
          keys_DK: uint64 (docs, keys of each document).
        """
        known_DK = np.zeros(keys_DK.shape, bool)
        for run in (*self._old, *self._new):
            at = np.minimum(np.searchsorted(run, keys_DK), len(run) - 1)
            known_DK |= run[at] == keys_DK
        first = ~known_DK.any(axis=1)
        here: set[int] = set()
        for number in np.flatnonzero(first):
            keys = keys_DK[number].tolist()
            first[number] = here.isdisjoint(keys)
            if first[number]:
                here.update(keys)
        if here:
            self._remember(np.fromiter(here, np.uint64, len(here)))
        return first

    def _remember(self, run: np.ndarray) -> None:
        if sum(map(len, self._new)) + len(run) > self._capacity // 2:
            self._old, self._new = self._new, []
        run.sort()
        while self._new and len(self._new[-1]) < 2 * len(run):
            run = np.concatenate([self._new.pop(), run])
            run.sort(kind="stable")  # a merge: both halves are sorted
        self._new.append(run)
