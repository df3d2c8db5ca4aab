"""The plan: which pieces of which documents make up row r, computed from lengths alone.

Which documents share a window is drawn once from the seed, over the whole dataset; every epoch
draws the order of the windows, of the documents in a window and of its rows anew. How many rows a
window needs depends only on the lengths in it, so all epochs have the same number of rows R, and
global row r is row r mod R of epoch r div R. A window is packed when one of its rows is asked for:
what is kept is one number per window and the last two windows, for any number of documents.
Nothing here depends on hosts, batch sizes or the numpy version.
"""

import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import logging
from rich.console import Console
from rich.progress import track

from checkpoint.steps import write_whole
from sharding.config import cache_folder
from sharding.errors import UsageError, nearest
from trainer.data import packing
from trainer.data.config import PACKINGS
from trainer.data.packing import Pieces, join, sorting_order
from trainer.terminal import bare

_MEMBERS, _ORDER, _ROWS, _WINDOWS = range(4)  # what a random stream is for
_CACHED_FROM = 1 << 17  # documents; the rows of fewer are counted sooner than a file is read
_SHOWN_FROM = 128  # windows; counting the rows of fewer takes seconds


class Plan:
    """The endless sequence of rows over documents of given lengths.

    Attributes:
      rows_per_epoch: the same for every epoch.
      positions_per_epoch: tokens predicted in an epoch.
      padding: share of positions in an epoch that predict nothing.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        seq_len: int,
        how: str = "bestfit",
        window: int = 1 << 15,
        shuffle: bool = True,
        seed: int = 0,
        only: tuple[int, int] = (0, 1 << 62),
        added: Callable[[np.ndarray], np.ndarray] = np.zeros_like,
        key: str = "",
    ) -> None:
        """Plans rows of `seq_len` positions over documents of `lengths` tokens, window by window.

        Args:
          lengths: int64 (documents,), or anything that has a length and is indexed by arrays alike.
          only: documents are used that have more positions than the first, not than the second.
          added: gives the positions that a collate function adds to a piece of each document.
          key: names the lengths and `added`; with it the row counts of large datasets are cached.

        Raises:
          UsageError: an unknown way of packing, or no document with a token to predict.
        """
        if how not in PACKINGS:
            raise UsageError(
                f"packing {how!r}: choose {' or '.join(PACKINGS)}{nearest(how, PACKINGS)}"
            )
        self.seq_len = seq_len
        self._lengths, self._window_size, self._only, self._added = lengths, window, only, added
        self._shuffle, self._seed = shuffle, seed
        self._pack, self._count = {
            "bestfit": (packing.best_fit, packing.count_best_fit),
            "concat": (packing.concatenate, packing.count_concatenated),
        }[how]
        self._scattered = Scatter(len(lengths), seed) if shuffle else np.asarray
        # Bound to the instance, so that the caches go when the plan goes.
        self._window = functools.lru_cache(maxsize=2)(self._packed_window)
        self._windows = functools.lru_cache(maxsize=2)(self._ordered_windows)

        if key and len(lengths) >= _CACHED_FROM:
            settings = (1, key, seq_len, how, window, shuffle, seed, only)
            name = hashlib.sha256(repr(settings).encode()).hexdigest()[:32]
            counts = _cached(cache_folder() / "plans" / name, self._count_rows)
        else:
            counts = self._count_rows()
        self._counts = counts[:-1]
        self.rows_per_epoch, self.positions_per_epoch = int(counts[:-1].sum()), int(counts[-1])
        if not self.rows_per_epoch:
            span = f"{only[0] + 1} {'or more' if only[1] >= 1 << 62 else f'to {only[1]}'} positions"
            raise UsageError(f"no document of {span}: there is nothing to predict")
        self.padding = 1 - self.positions_per_epoch / (self.rows_per_epoch * seq_len)

    def rows(self, ids: np.ndarray) -> Pieces:
        """Returns the pieces of the global rows `ids`, `rows` numbered by place in `ids`."""
        epochs, local = np.divmod(np.asarray(ids, np.int64), self.rows_per_epoch)
        parts = []
        # A batch may begin in one window or epoch and end in the next.
        for epoch in np.unique(epochs).tolist():
            order, begins = self._windows(epoch)
            place = np.where(epochs == epoch, np.searchsorted(begins, local, side="right") - 1, -1)
            for nth in np.unique(place[place >= 0]).tolist():
                places = np.flatnonzero(place == nth)
                pieces, bounds, rows = self._window(epoch, int(order[nth]))
                stored = rows[local[places] - begins[nth]]
                firsts = bounds[stored]
                sizes = bounds[stored + 1] - firsts
                chosen = pieces.take(
                    np.repeat(firsts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
                )
                parts.append(dataclasses.replace(chosen, rows=np.repeat(places, sizes)))
        return join(parts) if parts else Pieces(*np.zeros((6, 0), np.int64))

    def costs(self, ids: np.ndarray) -> np.ndarray:
        """Returns the attention cost of each row: the squared lengths of its pieces, added up."""
        pieces = self.rows(ids)
        return np.bincount(pieces.rows, pieces.counts.astype(float) ** 2, minlength=len(ids))

    def digest(self) -> str:
        """Returns a digest of the row counts and of all pieces of the first window."""
        pieces, _, rows = self._window(0, int(self._windows(0)[0][0]))
        digest = hashlib.sha256(self._counts.astype("<i8").tobytes())
        for array in (*vars(pieces).values(), rows):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def members(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents of a window that are used, and the positions of each."""
        first = window * self._window_size
        numbers = np.arange(first, min(first + self._window_size, len(self._lengths)))
        documents = self._scattered(numbers)
        positions = np.asarray(self._lengths[documents], np.int64) - 1
        used = (positions > self._only[0]) & (positions <= self._only[1])
        return documents[used], positions[used]

    def _count_rows(self) -> np.ndarray:
        """Returns the rows of every window, and behind them the positions of an epoch."""
        windows = -(-len(self._lengths) // self._window_size)
        counts = np.zeros(windows + 1, np.int64)
        console = Console(file=bare(sys.stderr))
        quiet = windows < _SHOWN_FROM or not console.is_terminal
        for window in track(
            range(windows), "counting rows", console=console, transient=True, disable=quiet
        ):
            documents, positions = self.members(window)
            counts[window] = self._count(positions, self._added(documents), self.seq_len)
            counts[-1] += positions.sum()
        return counts

    def _packed_window(self, epoch: int, window: int) -> tuple[Pieces, np.ndarray, np.ndarray]:
        """Returns pieces, bounds and order: the window's row i is pieces bounds[order[i]] on."""
        documents, positions = self.members(window)
        rows = int(self._counts[window])
        order = np.arange(rows)
        if self._shuffle:
            drawn = permutation(len(documents), self._seed, epoch, _ORDER, window)
            documents, positions = documents[drawn], positions[drawn]
            order = permutation(rows, self._seed, epoch, _ROWS, window)
        pieces = self._pack(documents, positions, self._added(documents), self.seq_len)
        return pieces, np.searchsorted(pieces.rows, np.arange(rows + 1)), order

    def _ordered_windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the windows in the order of an epoch, and the first row of each."""
        order = np.arange(len(self._counts))
        if self._shuffle:
            order = permutation(len(order), self._seed, epoch, _WINDOWS)
        order = order[self._counts[order] > 0]
        return order, np.cumsum(self._counts[order]) - self._counts[order]


# ---------------------------------------------------------------- random orders


def permutation(size: int, seed: int, epoch: int, purpose: int, index: int = 0) -> np.ndarray:
    """Returns a permutation of range(size) that is the same on every machine and numpy version.

    Sorts raw Philox output: numpy promises to keep the bits of its generators, not those of
    `Generator.permutation`.
    """
    bits = np.uint64(size.bit_length() + 1)
    return sorting_order((_raw(size, seed, epoch, purpose, index) >> bits).astype(np.int64))


class Scatter:
    """A random permutation of range(size) of which any part can be computed alone.

    A Feistel network over mixed radices (Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002): a number is two digits, and four rounds add to each in turn a random function,
    kept as a table of about sqrt(size) entries, of the other.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._high = math.isqrt(max(size - 1, 0)) + 1
        self._low = max(-(-size // self._high), 1)
        radices = (self._low, self._high) * 2
        self._tables = [
            (_raw(of, seed, 0, _MEMBERS, turn) % np.uint64(to)).astype(np.int64)
            for turn, (of, to) in enumerate(zip(radices, radices[1:] + radices[:1], strict=True))
        ]

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Returns where each of `numbers` goes."""
        high, low = np.divmod(numbers, self._low)
        for to_high, to_low in zip(self._tables[::2], self._tables[1::2], strict=True):
            high = high + to_high[low]
            high -= self._high * (high >= self._high)
            low = low + to_low[high]
            low -= self._low * (low >= self._low)
        out = high * self._low + low
        # The two digits reach a little further than size: walk on until inside.
        outside = np.flatnonzero(out >= self._size)
        if len(outside):
            out[outside] = self(out[outside])
        return out


def _raw(size: int, seed: int, epoch: int, purpose: int, index: int) -> np.ndarray:
    key = np.asarray([seed, epoch], np.uint64)
    counter = np.asarray([0, 0, purpose, index], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(size)


# ---------------------------------------------------------------- the counts on disk


def _cached(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the int64 array stored at `path` with its digest, or computes and stores it."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return np.frombuffer(content[32:], "<i8").astype(np.int64)
        logging.warning("plan: %s is damaged and is built anew", path)
    except FileNotFoundError:
        pass  # the usual first time
    except OSError as error:
        logging.warning("plan: %s cannot be read and is built anew: %s", path, error)
    counts = compute()
    content = counts.astype("<i8").tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        logging.warning("plan: not kept for the next start: %s", error)
    return counts
