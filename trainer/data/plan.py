"""Packing as a plan: which pieces of which documents make up row r, computed from lengths alone.

A document of n + 1 tokens has n positions (token i predicts token i + 1) and is cut into pieces of
at most seq_len of them; a piece reads one token more than it has positions, so that neighbours
overlap by one and every token but a document's first is predicted exactly once per epoch.

Which documents share a window is drawn once from the seed; inside a window the order is drawn anew
each epoch. How many rows a window needs depends only on the lengths in it, so every epoch has the
same number of rows and global row r is row r mod R of epoch r div R, without looking at any other.
Nothing here depends on hosts, batch sizes or the numpy version.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from sharding.errors import UsageError, nearest
from trainer.data.config import PACKINGS

_MEMBERS, _ORDER, _ROWS = range(3)  # what a random stream is for


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents, row after row; the fields are arrays of one length."""

    documents: np.ndarray  # int64
    starts: np.ndarray  # int64, first token read, counted in the document
    counts: np.ndarray  # int64, positions; tokens read are one more
    rows: np.ndarray  # int64, never falls
    columns: np.ndarray  # int64, where the piece begins in its row

    def take(self, chosen: np.ndarray) -> "Pieces":
        """Returns the pieces that a mask or an array of places picks."""
        return Pieces(*(array[chosen] for array in vars(self).values()))

    def __len__(self) -> int:
        return len(self.documents)


@dataclass(frozen=True)
class Epoch:
    """All pieces of one epoch; row i holds pieces `bounds[order[i]] : bounds[order[i] + 1]`."""

    pieces: Pieces
    bounds: np.ndarray  # int64 (rows + 1,)
    order: np.ndarray  # int64 (rows,)


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
        window: int = 1 << 17,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        """Plans rows of `seq_len` positions over documents of `lengths` tokens, window by window.

        Raises:
          UsageError: an unknown way of packing, or no document with a token to predict.
        """
        if how not in PACKINGS:
            raise UsageError(
                f"packing {how!r}: choose {' or '.join(PACKINGS)}{nearest(how, PACKINGS)}"
            )
        self._positions = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
        self.seq_len = seq_len
        self._pack = _best_fit if how == "bestfit" else _concatenate
        self._shuffle = shuffle
        self._seed = seed
        members = np.flatnonzero(self._positions)
        if not len(members):
            raise UsageError("no document has two tokens or more: there is nothing to predict")
        if shuffle:
            members = members[permutation(len(members), seed, 0, _MEMBERS)]
        self._windows = np.split(members, range(window, len(members), window))
        # Bound to the instance, so that the cache goes when the plan goes.
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)
        self.rows_per_epoch = len(self.epoch(0).order)
        self.positions_per_epoch = int(self._positions.sum())
        self.padding = 1 - self.positions_per_epoch / (self.rows_per_epoch * seq_len)

    def rows(self, ids: np.ndarray) -> Pieces:
        """Returns the pieces of the global rows `ids`, `rows` numbered by place in `ids`."""
        ids = np.asarray(ids, np.int64)
        numbers, locals_ = np.divmod(ids, self.rows_per_epoch)
        parts = []
        # A batch may begin in one epoch and end in the next.
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            epoch = self.epoch(number)
            stored = epoch.order[locals_[places]]
            firsts = epoch.bounds[stored]
            sizes = epoch.bounds[stored + 1] - firsts
            chosen = np.repeat(firsts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
            pieces = epoch.pieces
            parts.append(
                Pieces(
                    pieces.documents[chosen],
                    pieces.starts[chosen],
                    pieces.counts[chosen],
                    np.repeat(places, sizes),
                    pieces.columns[chosen],
                )
            )
        if not parts:
            return Pieces(*np.zeros((5, 0), np.int64))
        return _join(parts)

    def _epoch(self, number: int) -> Epoch:
        parts, first = [], 0
        for index, members in enumerate(self._windows):
            if self._shuffle:
                members = members[permutation(len(members), self._seed, number, _ORDER, index)]
            part, rows = self._pack(members, self._positions[members], self.seq_len, first)
            parts.append(part)
            first += rows
        pieces = _join(parts)
        bounds = np.searchsorted(pieces.rows, np.arange(first + 1))
        order = np.arange(first)
        if self._shuffle:
            order = permutation(first, self._seed, number, _ROWS)
        return Epoch(pieces, bounds, order)


def permutation(size: int, seed: int, epoch: int, purpose: int, index: int = 0) -> np.ndarray:
    """Returns a permutation of range(size) that is the same on every machine and numpy version.

    Sorts raw Philox output: numpy promises to keep the bits of its generators, not those of
    `Generator.permutation`.
    """
    key = np.asarray([seed, epoch], np.uint64)
    counter = np.asarray([0, 0, purpose, index], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(size)
    bits = np.uint64(size.bit_length())
    return _order((raw >> (bits + np.uint64(1))).astype(np.int64))


def _order(values: np.ndarray) -> np.ndarray:
    """Returns the stable sorting order of non-negative `values` below 2**63 / 2·len(values).

    Sorting values with their places in the low bits is several times faster than argsort, and no
    two keys are equal, so that no sorting algorithm can disagree.
    """
    bits = len(values).bit_length()
    keys = np.sort((values.astype(np.int64) << bits) | np.arange(len(values)))
    return keys & ((1 << bits) - 1)


def _join(parts: list[Pieces]) -> Pieces:
    if len(parts) == 1:
        return parts[0]
    names = ("documents", "starts", "counts", "rows", "columns")
    joined = Pieces(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    if (joined.rows[1:] >= joined.rows[:-1]).all():
        return joined
    order = _order(joined.rows)
    return Pieces(*(getattr(joined, name)[order] for name in names))


def _concatenate(
    documents: np.ndarray, positions: np.ndarray, seq_len: int, first: int
) -> tuple[Pieces, int]:
    """Lays documents end to end and cuts at every row; only the window's last row has padding."""
    ends = np.cumsum(positions)
    begins = ends - positions
    total = int(ends[-1])
    # The stable sort merges two sorted runs; np.union1d would hash and sort from nothing.
    cuts = np.sort(np.concatenate([begins, np.arange(0, total, seq_len)]), kind="stable")
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    owners = np.searchsorted(begins, cuts, side="right") - 1
    rows, columns = np.divmod(cuts, seq_len)
    counts = np.diff(cuts, append=total)
    pieces = Pieces(documents[owners], cuts - begins[owners], counts, first + rows, columns)
    return pieces, -(-total // seq_len)


def _best_fit(
    documents: np.ndarray, positions: np.ndarray, seq_len: int, first: int
) -> tuple[Pieces, int]:
    """Gives full pieces rows of their own and best-fits what is left of each document."""
    full, rest = np.divmod(positions, seq_len)
    rows = int(full.sum())
    owners = np.repeat(np.arange(len(documents)), full)
    nth = np.arange(rows) - np.repeat(np.cumsum(full) - full, full)

    tails = np.flatnonzero(rest)
    tails = tails[_order(seq_len - rest[tails])]
    counts = rest[tails]
    bins, opened = _fit(counts, seq_len)
    by_bin = _order(bins)
    tails, counts, bins = tails[by_bin], counts[by_bin], bins[by_bin]
    before = np.cumsum(counts) - counts
    columns = before - before[np.searchsorted(bins, bins)]

    pieces = Pieces(
        documents=documents[np.concatenate([owners, tails])],
        starts=np.concatenate([nth, full[tails]]) * seq_len,
        counts=np.concatenate([np.full(rows, seq_len), counts]),
        rows=first + np.concatenate([np.arange(rows), rows + bins]),
        columns=np.concatenate([np.zeros(rows, np.int64), columns]),
    )
    return pieces, rows + opened


def _fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit-decreasing: returns the bin of each size, largest first, and the number of bins.

    Each size goes into the fullest bin with room for it. Equal sizes are placed together, so the
    work grows with the number of distinct sizes and of distinct rooms left, not of documents.
    """
    bins = np.empty(len(sizes), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # room left -> bins
    has_room = np.zeros(capacity + 1, bool)
    opened = 0

    def keep(left: int, which: np.ndarray) -> None:
        if left and len(which):
            room.setdefault(left, []).append(which)
            has_room[left] = True

    firsts = np.flatnonzero(np.diff(sizes, prepend=capacity + 1))
    for at, end in itertools.pairwise([*firsts.tolist(), len(sizes)]):
        size = int(sizes[at])
        while at < end:
            left = size + int(has_room[size:].argmax())
            if has_room[left]:
                which = np.concatenate(room.pop(left))
                has_room[left] = False
            else:
                left = capacity
                which = np.arange(opened, opened - (at - end) // (capacity // size))
                opened += len(which)
            each = left // size
            needed = min(len(which), -((at - end) // each))
            keep(left, which[needed:])
            placed = min(end - at, needed * each)
            bins[at : at + placed] = np.repeat(which[:needed], each)[:placed]
            whole, part = divmod(placed, each)
            keep(left - each * size, which[:whole])
            keep(left - part * size, which[whole:needed])
            at += placed
    return bins, opened
