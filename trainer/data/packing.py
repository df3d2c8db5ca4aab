"""Packing one window of documents into rows: best fit, or end to end.

A document of n + 1 tokens has n positions (token i predicts token i + 1). A piece of it reads one
token more than it has positions, so that neighbours overlap by one and every token but a document's
first is predicted exactly once. How many rows a window needs depends on the lengths in it and not
on their order: the counting functions tell it without placing anything.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents, row after row; the fields are int64 arrays of one length."""

    documents: np.ndarray
    starts: np.ndarray  # first token read, counted in the document
    counts: np.ndarray  # positions taken in the row
    added: np.ndarray  # of these, the ones that a collate function adds to the document's own
    rows: np.ndarray  # never falls
    columns: np.ndarray  # where the piece begins in its row

    def __len__(self) -> int:
        return len(self.documents)

    def take(self, chosen: np.ndarray | slice) -> "Pieces":
        """Returns the pieces `chosen`, in that order."""
        return Pieces(*(field[chosen] for field in vars(self).values()))


def join(parts: list[Pieces]) -> Pieces:
    """Returns all pieces of `parts`, sorted by row."""
    if len(parts) == 1:
        return parts[0]
    joined = Pieces(*map(np.concatenate, zip(*(vars(p).values() for p in parts), strict=True)))
    if (joined.rows[1:] >= joined.rows[:-1]).all():
        return joined
    return joined.take(sorting_order(joined.rows))


def sorting_order(values: np.ndarray) -> np.ndarray:
    """Returns the stable sorting order of non-negative `values` below 2**63 / 2·len(values).

    Sorting values with their places in the low bits is several times faster than argsort, and no
    two keys are equal, so that no sorting algorithm can disagree.
    """
    bits = len(values).bit_length()
    keys = np.sort((values.astype(np.int64) << bits) | np.arange(len(values)))
    return keys & ((1 << bits) - 1)


# ---------------------------------------------------------------- end to end


def count_concatenated(positions: np.ndarray, added: np.ndarray, seq_len: int) -> int:
    """Returns the rows that documents with so many `positions` need, laid end to end."""
    return -(-int(positions.sum()) // seq_len)


def concatenate(
    documents: np.ndarray, positions: np.ndarray, added: np.ndarray, seq_len: int
) -> Pieces:
    """Lays documents end to end and cuts at every row; only the last row has padding."""
    rows = np.arange(count_concatenated(positions, added, seq_len))
    return _lay(documents, np.zeros_like(documents), positions, rows, np.zeros_like(rows), seq_len)


def _lay(
    documents: np.ndarray,
    starts: np.ndarray,
    positions: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    seq_len: int,
) -> Pieces:
    """Lays parts of documents end to end into the room of `rows` from `columns` on, in order."""
    ends = np.cumsum(positions)
    begins, total = ends - positions, int(positions.sum())
    edges = np.cumsum(seq_len - columns) - (seq_len - columns)  # where each room begins
    # The stable sort merges two sorted runs; np.union1d would hash and sort from nothing.
    cuts = np.sort(np.concatenate([begins, edges[edges < total]]), kind="stable")
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    owner = np.searchsorted(begins, cuts, side="right") - 1
    room = np.searchsorted(edges, cuts, side="right") - 1
    return Pieces(
        documents=documents[owner],
        starts=starts[owner] + cuts - begins[owner],
        counts=np.diff(cuts, append=total),
        added=np.zeros_like(cuts),
        rows=rows[room],
        columns=columns[room] + cuts - edges[room],
    )


# ---------------------------------------------------------------- best fit


def count_best_fit(positions: np.ndarray, added: np.ndarray, seq_len: int) -> int:
    """Returns the rows that documents with so many `positions` need, best-fitted."""
    full, rest = np.divmod(positions, seq_len - added)
    whole = (full == 0) & (rest > 0)
    sizes = (rest + added)[whole]
    opened = _fit(sizes, seq_len)[1]
    left = int(rest[full > 0].sum()) - (opened * seq_len - int(sizes.sum()))
    return int(full.sum()) + opened + max(0, -(-left // seq_len))


def best_fit(
    documents: np.ndarray, positions: np.ndarray, added: np.ndarray, seq_len: int
) -> Pieces:
    """Fits whole documents into rows; longer ones give full rows and fill the room that is left.

    A document is cut only when it is longer than a row. Its full pieces get rows of their own; its
    tail goes, end to end with other tails, where whole documents left room, then into new rows.

    Args:
      documents, positions: of each document, at least one position.
      added: positions that a collate function adds to each whole document and full piece, not to
        tails.
    """
    full, rest = np.divmod(positions, seq_len - added)
    owner = np.repeat(np.arange(len(documents)), full)
    rows = np.arange(len(owner))
    nth = rows - np.repeat(np.cumsum(full) - full, full)
    parts = [
        Pieces(
            documents=documents[owner],
            starts=nth * (seq_len - added[owner]),
            counts=np.full(len(owner), seq_len),
            added=added[owner],
            rows=rows,
            columns=np.zeros_like(rows),
        )
    ]

    whole = np.flatnonzero((full == 0) & (rest > 0))
    counts = (rest + added)[whole]
    largest_first = sorting_order(seq_len - counts)
    whole, counts = whole[largest_first], counts[largest_first]
    bins, opened = _fit(counts, seq_len)
    by_bin = sorting_order(bins)
    whole, counts, bins = whole[by_bin], counts[by_bin], bins[by_bin]
    before = np.cumsum(counts) - counts
    parts.append(
        Pieces(
            documents=documents[whole],
            starts=np.zeros_like(whole),
            counts=counts,
            added=added[whole],
            rows=len(rows) + bins,
            columns=before - before[np.searchsorted(bins, bins)],
        )
    )

    tails = np.flatnonzero((full > 0) & (rest > 0))
    used = np.bincount(bins, weights=counts, minlength=opened).astype(np.int64)
    roomy = sorting_order(used)  # the largest rooms first: fewest cuts
    roomy = roomy[used[roomy] < seq_len]
    fresh = max(0, -(-(int(rest[tails].sum()) - int((seq_len - used).sum())) // seq_len))
    columns = np.concatenate([used[roomy], np.zeros(fresh, np.int64)])
    into = len(rows) + np.concatenate([roomy, opened + np.arange(fresh)])
    starts = (full * (seq_len - added))[tails]
    if len(tails):
        parts.append(_lay(documents[tails], starts, rest[tails], into, columns, seq_len))
    return join(parts)


def _fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit-decreasing: returns the bin of each size, largest first, and the number of bins.

    Each size goes into the fullest bin with room for it. Bins filled alike are kept as ranges of
    their numbers and equal sizes are placed together, so that the loop runs over distinct sizes and
    rooms, a few thousand times for any number of documents.
    """
    histogram = np.bincount(sizes, minlength=capacity + 1)
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(capacity + 1)]  # by room left
    rooms = 0  # bit r is set when some bin has room r
    opened = 0
    placements = []  # (first bin, copies in a bin, copies)
    for size in np.flatnonzero(histogram)[::-1].tolist():
        count = int(histogram[size])
        while count:
            if fitting := rooms >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                first, bins = ranges[room].pop()
                if not ranges[room]:
                    rooms ^= 1 << room
            else:
                room, first, bins = capacity, opened, -(-count // (capacity // size))
                opened += bins
            copies = room // size
            placed = min(count, bins * copies)
            placements.append((first, copies, placed))
            count -= placed
            filled, over = divmod(placed, copies)
            if filled and (left := room - copies * size):
                ranges[left].append((first, filled))
                rooms |= 1 << left
            if over:  # one bin got fewer copies
                left = room - over * size
                ranges[left].append((first + filled, 1))
                rooms |= 1 << left
                filled += 1
            if filled < bins:
                ranges[room].append((first + filled, bins - filled))
                rooms |= 1 << room
    first, copies, placed = np.asarray(placements, np.int64).reshape(-1, 3).T
    nth = np.arange(len(sizes)) - np.repeat(np.cumsum(placed) - placed, placed)
    return np.repeat(first, placed) + nth // np.repeat(copies, placed), opened
