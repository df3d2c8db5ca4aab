"""A dataset as an endless array of rows: token shards read through a packing plan.

`rows(ids)` is a pure function of (dataset, config); it knows no batch, host, mesh or position in a
run. Loader.py turns it into batches on devices. Anything else that offers `Rows` (a mixture, a
transformed dataset) loads the same way. Does not import JAX.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sharding.errors import UsageError
from trainer.data.config import DataConfig
from trainer.data.corpus import BUILTIN, TRAIN, dataset_folder
from trainer.data.plan import Plan
from trainer.data.shards import TokenShards
from trainer.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import grain

FIELDS = ("tokens", "targets", "positions", "segment_ids")


class Rows(Protocol):
    """What a loader reads from."""

    seq_len: int
    rows_per_epoch: int

    def rows(self, ids: np.ndarray, columns: slice = ...) -> dict[str, np.ndarray]:
        """Returns int32 (len(ids), columns) arrays of the global rows `ids`."""

    def identity(self) -> dict[str, int | str | bool]:
        """Returns what decides the rows, by name; equal identities mean equal rows."""


class Dataset:
    """One split of a dataset, packed as a DataConfig says.

    Attributes:
      shards: the tokens; `shards.text_bytes` is what bits per byte divides by.
      plan: the packing; `plan.padding` and `plan.positions_per_epoch` tell how full rows are.
      seq_len, rows_per_epoch: shape of one epoch.
    """

    def __init__(self, shards: TokenShards, config: DataConfig) -> None:
        self.shards = shards
        self.seq_len = config.seq_len
        self._identity = {
            "fingerprint": shards.manifest.fingerprint(),
            "split": shards.split,
            "seq_len": config.seq_len,
            "packing": config.packing,
            "window": config.window,
            "shuffle": config.shuffle,
            "seed": config.seed,
        }
        try:
            self.plan = Plan(
                shards.lengths,
                seq_len=config.seq_len,
                how=config.packing,
                window=config.window,
                shuffle=config.shuffle,
                seed=config.seed,
            )
        except UsageError as error:
            raise UsageError(f"dataset {shards.folder}, split {shards.split}: {error}") from None
        self.rows_per_epoch = self.plan.rows_per_epoch

    def rows(self, ids: np.ndarray, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns the global rows `ids` (any order, epochs without end), or some columns of them.

        Returns:
          int32 (len(ids), columns) arrays: tokens, targets (the next token of the document),
          positions (from 0 in each piece of a document), segment_ids (from 1 in each row; 0 is
          padding, and there the others are 0 too).
        """
        begin, end, _ = columns.indices(self.seq_len)
        pieces = self.plan.rows(ids)
        segments = np.arange(1, len(pieces) + 1) - np.searchsorted(pieces.rows, pieces.rows)
        skipped = np.maximum(begin - pieces.columns, 0)
        counts = np.minimum(pieces.counts, end - pieces.columns) - skipped
        offsets = pieces.rows * (end - begin) + pieces.columns + skipped - begin
        documents, starts = pieces.documents, pieces.starts + skipped
        if end - begin < self.seq_len:
            seen = counts > 0
            documents, starts, counts = documents[seen], starts[seen], counts[seen]
            segments, skipped, offsets = segments[seen], skipped[seen], offsets[seen]

        out = {name: np.zeros((len(ids), end - begin), np.int32) for name in FIELDS}
        tokens, targets, positions, segment_ids = (out[name].reshape(-1) for name in FIELDS)
        running = np.arange(self.seq_len, dtype=np.int32)
        # Slices, not index arrays: documents of 40 tokens still load at 12 M tokens/s on a core.
        for piece, to, past, segment in zip(
            self.shards.pieces(documents, starts, counts + 1),
            offsets.tolist(),
            skipped.tolist(),
            segments.tolist(),
            strict=True,
        ):
            count = len(piece) - 1
            tokens[to : to + count] = piece[:-1]
            targets[to : to + count] = piece[1:]
            positions[to : to + count] = running[past : past + count]
            segment_ids[to : to + count] = segment
        return out

    def row(self, number: int) -> dict[str, np.ndarray]:
        """Returns one global row: int32 (seq_len,) arrays."""
        return {name: array[0] for name, array in self.rows(np.asarray([number])).items()}

    def identity(self) -> dict[str, int | str | bool]:
        """Returns what decides the rows: the dataset's fingerprint and the plan's arguments."""
        return dict(self._identity)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the dataset."""
        return load_tokenizer(self.shards.manifest.tokenizer, self.shards.folder)

    @property
    def vocab_size(self) -> int:
        return self.shards.manifest.tokenizer.vocab_size

    def check_vocab(self, vocab_size: int) -> None:
        """Raises UsageError when a model with `vocab_size` embeddings cannot read the dataset."""
        if self.shards.max_token >= vocab_size:
            raise UsageError(
                f"dataset {self.shards.folder} holds token {self.shards.max_token}, the model's "
                f"vocabulary has {vocab_size}: set --config.model.vocab={self.vocab_size}"
            )

    def as_grain(self) -> "grain.MapDataset":
        """Returns the endless rows as a grain MapDataset, to map, mix or batch with grain."""
        import grain  # takes longer to import than the rest of this package

        return grain.MapDataset.source(_Endless(self))


class _Endless:
    """Random access to global rows, as grain wants it."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self._dataset.row(int(number))


def open_dataset(config: DataConfig, split: str = TRAIN) -> Dataset:
    """Opens and checks one split of the dataset that `config` names.

    Only the training split is shuffled: others are packed alike for every seed, so that their loss
    compares between runs.

    Raises:
      UsageError: a config no dataset could satisfy, or a dataset that is missing or damaged.
    """
    config.validate()
    folder = dataset_folder(config.path)
    try:
        shards = TokenShards(folder, split)
    except UsageError as error:
        if config.path.startswith(BUILTIN):
            raise UsageError(f"{error}; remove the folder and it is written anew") from None
        raise
    if split != TRAIN:
        config = DataConfig(**{**vars(config), "shuffle": False, "seed": 0})
    return Dataset(shards, config)


def resume_row(state: Mapping[str, object], dataset: Rows, *, allow_change: bool = False) -> int:
    """Returns the row that a run continues with, given the loader state of its checkpoint.

    With `allow_change` the run continues at the same row number of the changed sequence of rows.

    Raises:
      UsageError: the state is of another version, or the rows are not those it was saved for.
    """
    if state.get("version") != 1 or not isinstance(state.get("next_row"), int):
        raise UsageError(f"data state {dict(state)!r} is not one this version reads")
    if not allow_change:
        for name, now in dataset.identity().items():
            if state.get(name) != now:
                raise UsageError(
                    f"data {name} is {now}, the checkpoint was trained with {state.get(name)}; "
                    "accept the change with --config.data.allow_change=True"
                )
    return int(state["next_row"])
