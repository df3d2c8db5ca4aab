"""The seam between data and loaders: what offers rows, and where a run continues in them.

A `Rows` is an endless array of rows of one length, computed from their numbers alone; `Steps` is
what training reads, rows of one length or of several. A checkpoint keeps the next row and the
`identity`, and `resume_row` compares it. Does not import JAX.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from absl import logging

from sharding.errors import UsageError

Identity = dict[str, Any]  # JSON values by name; equal identities mean equal rows


class Steps(Protocol):
    """What a training loader reads from; a step takes `size` rows of `seq_len` or as many tokens.

    Attributes:
      seq_len: the length of rows, the longest where there are several.
      rows_per_epoch: rows of `seq_len`, or their worth in tokens, until documents come again.
    """

    seq_len: int
    rows_per_epoch: int

    def identity(self) -> Identity: ...

    def step(self, first: int, size: int) -> "tuple[Rows, int]":
        """Returns the rows of the step that begins at global row `first`, and its first there."""
        ...

    def lengths(self) -> dict[int, float]:
        """Returns the lengths of rows, and the share of the steps that have each."""
        ...

    def segments(self, first: int, size: int) -> np.ndarray:
        """Returns the lengths of all packed pieces in the step that begins at global row `first`.

        int64 (pieces,), in any order; padding belongs to none.
        """
        rows, begin = self.step(first, size)
        return rows.pieces(begin + np.arange(size * self.seq_len // rows.seq_len))

    def sources(self, row: int = 0) -> "list[tuple[Steps, float]]":
        """Returns the datasets that are read around global row `row`, and their parts of tokens."""
        ...

    def check_vocab(self, vocab_size: int) -> None:
        """Raises UsageError when a model with `vocab_size` embeddings cannot read the rows."""
        for source, _ in self.sources():
            source.check_vocab(vocab_size)

    def bytes_per_token(self, row: int = 0) -> float | None:
        """Returns bytes of text per predicted token around global row `row`, None if unknown."""
        found = [(source.bytes_per_token(), share) for source, share in self.sources(row)]
        if any(ratio is None for ratio, _ in found):
            return None
        return sum(ratio * share for ratio, share in found) / sum(share for _, share in found)

    def skipped(self) -> dict[str, list[str]]:
        """Returns the shards that were found damaged and are padding, by dataset fingerprint."""
        parts = [source.skipped() for source, _ in self.sources()]
        return {key: files for part in parts for key, files in part.items()}

    def adopt(self, skipped: Mapping[str, list[str]]) -> None:
        """Skips the shards that a run had skipped, so that its rows stay the same."""
        for source, _ in self.sources():
            source.adopt(skipped)

    def cancel(self) -> None:
        """Ends a `rows` that waits for its data in another thread."""
        for source, _ in self.sources():
            source.cancel()


class Rows(Steps, Protocol):
    """An endless array of rows of one length; `fields` are the names of a batch's arrays."""

    fields: tuple[str, ...]

    def rows(self, ids: np.ndarray, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns int32 (len(ids), columns) arrays of the global rows `ids`, by field."""
        ...

    def costs(self, ids: np.ndarray) -> np.ndarray:
        """Returns the attention cost of each row: the squared lengths of its segments, summed."""
        ...

    def pieces(self, ids: np.ndarray) -> np.ndarray:
        """Returns the lengths of all pieces packed into the rows `ids`, in any order."""
        ...

    def step(self, first: int, size: int) -> "tuple[Rows, int]":
        return self, first

    def lengths(self) -> dict[int, float]:
        return {self.seq_len: 1.0}


def resume_row(state: Mapping[str, object], data: Steps, *, allow_change: bool = False) -> int:
    """Returns the row that a run continues with, given the loader state of its checkpoint.

    A mixture may have other weights from the next row on. With `allow_change` the run continues at
    the same row number of the changed sequence of rows.

    Raises:
      UsageError: the state is of another version, or the rows are not those it was saved for.
    """
    if state.get("version") != 1 or not isinstance(state.get("next_row"), int):
        raise UsageError(f"data state {dict(state)!r} is not one this version reads")
    next_row = int(state["next_row"])
    data.adopt(state.get("skipped", {}))
    now = data.identity()
    for name in dict.fromkeys([*now, *state]):
        is_now, was = now.get(name), state.get(name)
        if is_now == was or name in ("version", "next_row", "skipped"):
            continue
        if name == "mixture" and is_now and was:
            is_now, was = ([e for e in entry if e[0] < next_row] for entry in (is_now, was))
            if is_now == was:
                logging.info("data mixture changes from row %d on: %s", next_row, now[name])
                continue
        if not allow_change:
            raise UsageError(
                f"data {name} is {is_now}, the checkpoint was trained with {was}; accept the "
                "change with --config.data.allow_change=True"
            )
        logging.warning("data %s is %s, the checkpoint was trained with %s", name, is_now, was)
    return next_row
