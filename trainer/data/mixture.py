"""Rows made of other rows by integer arithmetic: mixtures, buckets of row length, balanced steps.

Everything here maps a row number to a row number of something else, alone and in constant time, so
what holds for a dataset (exact resume, any number of hosts, one integer of state) holds for these.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from sharding.errors import UsageError
from trainer.data.packing import sorting_order
from trainer.data.plan import permutation
from trainer.data.rows import Identity, Rows, Steps

_STEPS = 4  # what a random stream is for; plan.py has the others
_UNITS = 1 << 20  # weights are held as millionths; leaves 2**43 rows without overflow


class Interleave:
    """Which source row i comes from, and its number there, for weights that change at given rows.

    Of l rows the first source has l·share, rounded, and the next ones divide what remains in the
    same way. So every source has its share of the first l rows to within half a row per source, and
    how many it had before row i takes no looking at them.
    """

    def __init__(self, schedule: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Takes (row, integer weights from this row on), rows rising from 0."""
        self._starts = np.asarray([row for row, _ in schedule], np.int64)
        self._weights = np.asarray([weights for _, weights in schedule], np.int64)
        self._rest = np.cumsum(self._weights[:, ::-1], axis=1)[:, ::-1]  # of this source and later
        self._before = np.zeros_like(self._weights)  # rows of each source before each start
        for entry, row in enumerate(self._starts[1:].tolist(), 1):
            left = np.asarray([row - self._starts[entry - 1]])
            self._before[entry] = self._before[entry - 1] + self._counts(entry - 1, left)[:, 0]

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of every row of `ids`, and its number there."""
        entry = np.searchsorted(self._starts, ids, side="right") - 1
        left = np.asarray(ids, np.int64) - self._starts[entry]
        counts = self._counts(entry, left)
        source = (self._counts(entry, left + 1) > counts).argmax(axis=0)
        return source, self._before[entry, source] + counts[source, np.arange(len(left))]

    def taken(self, row: int) -> np.ndarray:
        """Returns how many rows each source has had before `row`."""
        entry = np.searchsorted(self._starts, row, side="right") - 1
        left = np.asarray([row - self._starts[entry]])
        return self._before[entry] + self._counts(entry, left)[:, 0]

    def shares(self, row: int) -> np.ndarray:
        """Returns the share of each source around `row`."""
        entry = np.searchsorted(self._starts, row, side="right") - 1
        return self._weights[entry] / self._rest[entry, 0]

    def _counts(self, entry: np.ndarray | int, left: np.ndarray) -> np.ndarray:
        """Returns (sources, n) rows of each source among the first `left` of an entry."""
        counts = []
        for number in range(self._weights.shape[1]):
            rest = np.maximum(self._rest[entry, number], 1)
            counts.append((left * self._weights[entry, number] + rest // 2) // rest)
            left = left - counts[-1]
        return np.stack(counts)


def in_units(weights: Sequence[float]) -> list[int]:
    """Returns weights as integers that sum to about 2**20.

    Raises:
      UsageError: a weight too small beside the others.
    """
    units = [round(weight / sum(weights) * _UNITS) for weight in weights]
    for weight, unit in zip(weights, units, strict=True):
        if weight and not unit:
            raise UsageError(f"config.data.mixture: weight {weight} is less than a millionth")
    return units


class Mixture(Rows):
    """Rows of several datasets in given shares; every source goes through its own epochs."""

    def __init__(
        self, members: Sequence[Rows], schedule: Sequence[tuple[int, Sequence[int]]]
    ) -> None:
        """Mixes `members` by a schedule of (row, integer weights from this row on)."""
        self.seq_len, self.fields = members[0].seq_len, members[0].fields
        self.rows_per_epoch = sum(member.rows_per_epoch for member in members)
        self._members = members
        self._interleave = Interleave(schedule)
        parts = [member.identity() for member in members]
        names = [f"{part['fingerprint']} plan {part['plan']}" for part in parts]
        self._schedule: list = []
        for row, weights in schedule:
            used = [[name, unit] for name, unit in zip(names, weights, strict=True) if unit]
            if not self._schedule or self._schedule[-1][1] != used:
                self._schedule.append([row, used])

    def rows(self, ids: np.ndarray, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        shape = (len(ids), len(range(*columns.indices(self.seq_len))))
        out = {name: np.empty(shape, np.int32) for name in self.fields}
        for mine, member, local in self._parts(ids):
            for name, part in member.rows(local, columns).items():
                out[name][mine] = part
        return out

    def costs(self, ids: np.ndarray) -> np.ndarray:
        out = np.empty(len(ids))
        for mine, member, local in self._parts(ids):
            out[mine] = member.costs(local)
        return out

    def pieces(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([member.pieces(local) for _, member, local in self._parts(ids)])

    def _parts(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Rows, np.ndarray]]:
        source, local = self._interleave.locate(ids)
        for number in np.unique(source).tolist():
            mine = source == number
            yield mine, self._members[number], local[mine]

    def epochs(self, row: int) -> list[float]:
        """Returns how many times each source has been read before global row `row`."""
        taken = self._interleave.taken(row).tolist()
        return [n / m.rows_per_epoch for n, m in zip(taken, self._members, strict=True)]

    def identity(self) -> Identity:
        """Returns the schedule by source, and the settings that all sources have."""
        same = self._members[0].identity()
        del same["fingerprint"], same["plan"]
        return {**same, "mixture": self._schedule}

    def sources(self, row: int = 0) -> list[tuple[Steps, float]]:
        shares = self._interleave.shares(row).tolist()
        return [
            (source, share * part)
            for member, share in zip(self._members, shares, strict=True)
            for source, part in member.sources()
        ]


class Buckets(Steps):
    """Steps of several row lengths with the same tokens: each bucket has documents of its length.

    Step k of all is step j of one bucket, interleaved so that all end their epochs together.
    """

    def __init__(self, parts: Sequence[Rows], counts: Sequence[int]) -> None:
        """Takes rows by bucket, shortest first, and how many of them are a step.

        Raises:
          UsageError: a bucket with less rows than a step.
        """
        self.seq_len = parts[-1].seq_len
        self._parts, self._counts = parts, counts
        for part, count in zip(parts, counts, strict=True):
            if part.rows_per_epoch < count:
                raise UsageError(
                    f"config.data.buckets: documents of the bucket {part.seq_len} fill "
                    f"{part.rows_per_epoch} rows, a step takes {count}; leave it out"
                )
        tokens = [part.rows_per_epoch * part.seq_len for part in parts]
        self.rows_per_epoch = sum(tokens) // self.seq_len
        self._interleave = Interleave([(0, in_units(tokens))])

    def step(self, first: int, size: int) -> tuple[Rows, int]:
        source, nth = (int(a[0]) for a in self._interleave.locate(np.asarray([first // size])))
        return self._parts[source], nth * self._counts[source]

    def identity(self) -> Identity:
        parts = [part.identity() for part in self._parts]
        plans = " ".join(str(part["plan"]) for part in parts)
        own = {"buckets": list(self.lengths()), "plan": plans, "batch_size": self._counts[-1]}
        return {**parts[-1], **own}

    def lengths(self) -> dict[int, float]:
        shares = self._interleave.shares(0).tolist()
        return {part.seq_len: share for part, share in zip(self._parts, shares, strict=True)}

    def sources(self, row: int = 0) -> list[tuple[Steps, float]]:
        return self._parts[-1].sources()  # all are of one dataset


class Balanced(Rows):
    """The same rows, those of like attention cost in one step.

    Within windows of `steps` steps rows are sorted by cost and the steps shuffled: devices that
    wait for one another at the end of every step then have as much to do.
    """

    def __init__(self, rows: Rows, steps: int, batch_size: int, seed: int) -> None:
        self.seq_len, self.fields = rows.seq_len, rows.fields
        self.rows_per_epoch, self.sources = rows.rows_per_epoch, rows.sources
        self._rows, self._steps, self._batch_size, self._seed = rows, steps, batch_size, seed
        self._order = functools.lru_cache(maxsize=2)(self._window_order)

    def rows(self, ids: np.ndarray, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        return self._rows.rows(self._moved(ids), columns)

    def costs(self, ids: np.ndarray) -> np.ndarray:
        return self._rows.costs(self._moved(ids))

    def pieces(self, ids: np.ndarray) -> np.ndarray:
        return self._rows.pieces(self._moved(ids))

    def identity(self) -> Identity:
        own = {"balance": self._steps, "batch_size": self._batch_size}
        return {**self._rows.identity(), **own}

    def _moved(self, ids: np.ndarray) -> np.ndarray:
        """Returns which rows of the unbalanced order stand at `ids`."""
        windows, places = np.divmod(np.asarray(ids, np.int64), self._steps * self._batch_size)
        moved = np.empty_like(windows)
        for window in np.unique(windows).tolist():
            mine = windows == window
            moved[mine] = self._order(window)[places[mine]]
        return moved

    def _window_order(self, window: int) -> np.ndarray:
        size = self._steps * self._batch_size
        ids = window * size + np.arange(size)
        by_cost = ids[sorting_order(self._rows.costs(ids).astype(np.int64))]
        steps = permutation(self._steps, self._seed, window, _STEPS)
        return by_cost.reshape(self._steps, self._batch_size)[steps].reshape(-1)
