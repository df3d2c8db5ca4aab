"""A dataset as an endless array of rows: token shards read through a packing plan.

`rows(ids)` is a pure function of (dataset, config); it knows no batch, host, mesh or position in a
run. `open_dataset` gives the rows that a config names and `open_training` the steps made of them,
which loader.py turns into batches on devices. Does not import JAX.
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from checkpoint.steps import folder_path, is_remote
from sharding.errors import UsageError
from trainer.data.collate import ends_with, make_collate, mix
from trainer.data.config import CollateConfig, DataConfig
from trainer.data.corpus import FEW_HELD_OUT, TRAIN, dataset_folder, is_builtin
from trainer.data.manifest import read_manifest
from trainer.data.mixture import Balanced, Buckets, Mixture, in_units
from trainer.data.packing import Pieces
from trainer.data.plan import Plan
from trainer.data.rows import Identity, Rows, Steps
from trainer.data.shards import TokenShards
from trainer.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer, same_ids

if TYPE_CHECKING:
    import grain


class Dataset(Rows):
    """One split of a dataset, packed as a DataConfig says.

    Attributes:
      shards: the tokens; `shards.text_bytes` is what bits per byte divides by.
      plan: the packing; `plan.padding` and `plan.positions_per_epoch` tell how full rows are.
      seq_len, rows_per_epoch: shape of one epoch.
    """

    def __init__(
        self, shards: TokenShards, config: DataConfig, only: tuple[int, int] = (0, 1 << 62)
    ) -> None:
        """Plans rows over the documents with more positions than only[0], not than only[1]."""
        self.shards = shards
        self._announced = 0  # rows from here on have not been announced to the shards
        self.seq_len = config.seq_len
        self.fields = config.fields
        self._seed = mix(np.asarray([config.seed], np.uint64))
        self._collate = make_collate(config.collate, config.seed)
        self._sentinels = config.collate.sentinels if config.collate.kind == "fim" else ()
        self._identity: Identity = {
            "fingerprint": shards.manifest.fingerprint(),
            "split": shards.split,
            "seq_len": config.seq_len,
            "packing": config.packing,
            "window": config.window,
            "shuffle": config.shuffle,
            "seed": config.seed,
        }
        if self._collate:
            self._identity["collate"] = config.collate.identity()
        try:
            self.plan = Plan(
                shards.lengths,
                seq_len=config.seq_len,
                how=config.packing,
                window=config.window,
                shuffle=config.shuffle,
                seed=config.seed,
                only=only,
                added=self._collate.added if self._collate else np.zeros_like,
                key=hashlib.sha256(json.dumps(self._identity).encode()).hexdigest(),
            )
        except UsageError as error:
            raise UsageError(f"dataset {shards.name}, split {shards.split}: {error}") from None
        self.rows_per_epoch = self.plan.rows_per_epoch
        self._identity["plan"] = self.plan.digest()

    def rows(self, ids: np.ndarray, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns the global rows `ids` (any order, epochs without end), or some columns of them.

        Returns:
          int32 (len(ids), columns) arrays: tokens, targets (the next token of the document, or -1
          where the collate function puts no loss), positions (from 0 in each piece of a document),
          segment_ids (from 1 in each row; 0 is padding, and there the others are 0 too), and
          prefix (1 where attention goes both ways) if the collate function is "prefix".
        """
        begin, end, _ = columns.indices(self.seq_len)
        pieces = self.plan.rows(ids)
        if self.shards.ahead and len(ids):
            self._announce(int(ids.max()) + 1)
        if self.shards.ahead or self.shards.skipped:
            pieces = pieces.take(self.shards.readable(pieces.documents))
        segments = np.arange(1, len(pieces) + 1) - np.searchsorted(pieces.rows, pieces.rows)
        skipped = np.maximum(begin - pieces.columns, 0)
        counts = np.minimum(pieces.counts, end - pieces.columns) - skipped
        offsets = pieces.rows * (end - begin) + pieces.columns + skipped - begin
        if end - begin < self.seq_len:
            seen = counts > 0
            pieces, counts = pieces.take(seen), counts[seen]
            segments, skipped, offsets = segments[seen], skipped[seen], offsets[seen]

        out = {name: np.zeros((len(ids), end - begin), np.int32) for name in self.fields}
        flat = {name: array.reshape(-1) for name, array in out.items()}
        tokens, targets, positions, segment_ids = list(flat.values())[:4]
        collated = self._collated(pieces, np.asarray(ids)) if self._collate else None
        read = collated or self.shards.pieces(pieces.documents, pieces.starts + skipped, counts + 1)
        running = np.arange(self.seq_len, dtype=np.int32)
        # Slices, not index arrays: documents of 40 tokens still load at 12 M tokens/s on a core.
        places = (array.tolist() for array in (offsets, skipped, counts, segments))
        for piece, to, past, count, segment in zip(read, *places, strict=True):
            if collated:
                for name, values in piece.items():
                    flat[name][to : to + count] = values[past : past + count]
            else:
                tokens[to : to + count] = piece[:-1]
                targets[to : to + count] = piece[1:]
            positions[to : to + count] = running[past : past + count]
            segment_ids[to : to + count] = segment
        return out

    def _collated(self, pieces: Pieces, ids: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Returns what the collate function makes of every piece."""
        counts = pieces.counts - pieces.added
        epochs = ids[pieces.rows] // self.rows_per_epoch
        draws = self._seed
        for part in (epochs, pieces.documents, pieces.starts):
            draws = mix(draws + part.astype(np.uint64))
        starts = pieces.starts
        if self._collate.whole:
            zeros, lengths = np.zeros_like(starts), self.shards.lengths[pieces.documents]
            read = self.shards.pieces(pieces.documents, zeros, lengths)
        else:
            read = self.shards.pieces(pieces.documents, starts, counts + 1)
            starts = np.zeros_like(starts)
        places = (array.tolist() for array in (starts, counts, pieces.added, draws))
        return [
            self._collate(tokens.astype(np.int32), *place)
            for tokens, *place in zip(read, *places, strict=True)
        ]

    def costs(self, ids: np.ndarray) -> np.ndarray:
        return self.plan.costs(ids)

    def pieces(self, ids: np.ndarray) -> np.ndarray:
        return self.plan.rows(ids).counts

    def _announce(self, first: int) -> None:
        """Tells the shards what the rows from `first` on will read, each row once."""
        end = first + self.shards.ahead
        begin = self._announced if first <= self._announced <= end else first
        self._announced = end
        self.shards.expect(self.plan.rows(np.arange(begin, end)).documents)

    def row(self, number: int) -> dict[str, np.ndarray]:
        """Returns one global row: int32 (seq_len,) arrays."""
        return {name: array[0] for name, array in self.rows(np.asarray([number])).items()}

    def identity(self) -> Identity:
        """Returns the dataset's fingerprint, the plan's arguments and its digest."""
        return dict(self._identity)

    def skipped(self) -> dict[str, list[str]]:
        """Returns the shards that were found damaged and are padding, by dataset fingerprint."""
        files = sorted(self.shards.skipped)
        return {str(self._identity["fingerprint"]): files} if files else {}

    def adopt(self, skipped: Mapping[str, list[str]]) -> None:
        """Skips the shards that a run had skipped, so that its rows stay the same."""
        for file in skipped.get(str(self._identity["fingerprint"]), []):
            self.shards.skip(file)

    def cancel(self) -> None:
        """Ends a `rows` that waits for object storage in another thread."""
        self.shards.cancel()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the dataset."""
        return load_tokenizer(self.shards.manifest.tokenizer, self.shards.folder)

    @property
    def vocab_size(self) -> int:
        return self.shards.manifest.tokenizer.vocab_size

    def check_vocab(self, vocab_size: int) -> None:
        shards = self.shards.manifest.shards  # of all splits: held-out text is read too
        largest = max((*(shard.max_token for shard in shards), *self._sentinels))
        needed = max(self.vocab_size, largest + 1)
        if vocab_size < needed:
            raise UsageError(
                f"dataset {self.shards.name}: its tokenizer has {self.vocab_size} ids and the "
                f"largest token is {largest}, the model's vocabulary has {vocab_size}: set "
                f"--config.model.vocab={needed}"
            )

    def bytes_per_token(self, row: int = 0) -> float | None:
        if self._collate:  # not all text is predicted, or not in its order
            return None
        shards = self.shards.manifest.split(self.shards.split)
        return self.shards.text_bytes / sum(shard.tokens - shard.docs for shard in shards)

    def sources(self, row: int = 0) -> list[tuple[Steps, float]]:
        return [(self, 1 - self.plan.padding)]

    def unmatched(self) -> str:
        """Returns what the collate function looks for in documents and a sample lacks, or ""."""
        if not self._collate or not self._collate.patterns:
            return ""
        numbers = self.shards.sample(_LOOKED_AT)
        numbers = numbers[self.shards.readable(numbers)]
        texts = [self.shards.document(number).astype(np.int32) for number in numbers.tolist()]
        for name, ids in self._collate.patterns.items():
            if texts and not any(ends_with(text, ids).any() for text in texts):
                return (
                    f"dataset {self.shards.name}, split {self.shards.split}: none of "
                    f"{len(texts):,} documents holds config.data.collate.{name} = {ids} in a row"
                )
        return ""

    def as_grain(self) -> "grain.MapDataset":
        """Returns the endless rows as a grain MapDataset, to map, mix or batch with grain."""
        import grain  # takes longer to import than the rest of this package

        return grain.MapDataset.source(_Endless(self))


_LOOKED_AT = 256  # documents


class _Endless:
    """Random access to global rows, as grain wants it."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self._dataset.row(int(number))


def open_dataset(config: DataConfig, split: str = TRAIN) -> Rows:
    """Opens and checks one split of the dataset or mixture that `config` names: rows of `seq_len`.

    Only the training split is shuffled and filled in the middle: others are packed alike for every
    seed, so that their loss compares between runs. Of a mixture they hold every row of every
    source once an epoch.

    Raises:
      UsageError: a config no dataset could satisfy, or a dataset that is missing or damaged.
    """
    config.validate()
    if split != TRAIN:
        plain = CollateConfig() if config.collate.kind == "fim" else config.collate
        config = dataclasses.replace(config, shuffle=False, seed=0, collate=plain)
    if not config.mixture:
        dataset = Dataset(open_shards(config.path, split, config), config)
        _warn([dataset])
        return dataset
    members = [Dataset(open_shards(path, split, config), config) for path, _ in config.mixture]
    first = members[0]
    for member in members[1:]:
        spec = member.shards.manifest.tokenizer
        if spec == first.shards.manifest.tokenizer:
            continue
        if not same_ids(member.tokenizer, first.tokenizer):
            raise UsageError(
                f"config.data.mixture: {member.shards.name} was written with another tokenizer "
                f"than {first.shards.name}; prepare one of them again with the other's"
            )
    _warn(members)
    if split == TRAIN:
        return Mixture(members, [(row, in_units(weights)) for row, weights in config.weights()])
    return Mixture(members, [(0, [member.rows_per_epoch for member in members])])


def run_tokenizer(run: str, config: DataConfig) -> Tokenizer:
    """Returns the tokenizer of a run: the one beside converted weights, else that of its data.

    Args:
      run: the run's folder, which may be in object storage.
      config: the data that the run trains on.

    Raises:
      UsageError: neither is there, or cannot be read.
      ConnectionError: object storage did not respond.
    """
    beside = folder_path(run) / "tokenizer"
    if beside.is_dir():
        return open_tokenizer(str(beside))
    path = config.mixture[0][0] if config.mixture else config.path  # all sources have the same
    folder = dataset_folder(path, config.remote.patience)
    return load_tokenizer(read_manifest(folder).tokenizer, folder)


def open_training(config: DataConfig, batch_size: int, vocab_size: int = sys.maxsize) -> Steps:
    """Opens what training reads: the training split in buckets and balanced, as `config` says.

    Args:
      batch_size: rows of `seq_len` in a step.
      vocab_size: of the model.

    Raises:
      UsageError: as `open_dataset`; a bucket with less than one step of documents, or whose rows do
        not divide the tokens of a step; a token outside the vocabulary.
    """
    config.validate()
    if config.buckets:
        shards = open_shards(config.path, TRAIN, config)
        edges = (0, *config.buckets, 1 << 62)
        parts: list[Rows] = [
            Dataset(shards, dataclasses.replace(config, seq_len=length, buckets=()), only)
            for length, only in zip(config.lengths, itertools.pairwise(edges), strict=True)
        ]
        _warn([parts[-1]])
    else:
        parts = [open_dataset(config)]
    parts[0].check_vocab(vocab_size)
    counts = [config.rows_per_step(part.seq_len, batch_size) for part in parts]
    if config.balance:
        parts = [
            Balanced(part, config.balance, count, config.seed)
            for part, count in zip(parts, counts, strict=True)
        ]
    return Buckets(parts, counts) if config.buckets else parts[0]


def _warn(members: list[Dataset]) -> None:
    """Says what will make a loss mean little: masks that match nothing, few held-out documents."""
    for member in members:
        if fault := member.unmatched():
            logging.warning("%s: are these ids those that its tokenizer writes?", fault)
    documents = sum(len(member.shards) for member in members)
    first = members[0].shards
    if first.split != TRAIN and documents < FEW_HELD_OUT:
        logging.warning(
            "dataset %s, split %s: documents to evaluate on: %d, which is few",
            first.name, first.split, documents,
        )  # fmt: skip


def open_shards(path: str, split: str, config: DataConfig) -> TokenShards:
    """Opens and checks the documents of one split, on the disk or in object storage."""
    if is_remote(path):
        from trainer.data.remote import RemoteShards

        shards = RemoteShards(path, split, config.remote)
        if config.shuffle and not shards.fits:
            logging.warning(
                "%s: shuffled rows read all shards in turn, and config.data.remote.cache_gb = %g "
                "does not hold them: they will be fetched again and again",
                path,
                config.remote.cache_gb,
            )
        return shards
    try:
        return TokenShards(dataset_folder(path), split)
    except UsageError as error:
        if is_builtin(path):
            raise UsageError(f"{error}; remove the folder and it is written anew") from None
        raise
