"""Token shards on disk: reading one split as one array of documents, checking it, writing it.

Shards are memory-mapped and never copied whole. Opening checks sizes and indices always and digests
when the split is small enough for that to go unnoticed; `verify` re-reads everything. What is
damaged is refused in one line that names folder, shard and reason.
"""

import hashlib
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from sharding.errors import UsageError, nearest
from trainer.data.manifest import FILE, Manifest, Shard, read_manifest
from trainer.data.tokenizer import Tokenizer, load_tokenizer

HASH_AT_OPEN = 64 << 20  # bytes; about 60 ms of SHA-256, so small datasets are always checked whole
_BLOCK = 1 << 22


class ShardError(UsageError):
    """A file of a dataset that is not what its manifest says."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file} {reason}")
        self.file = file
        self.reason = reason


class TokenShards:
    """One split of a dataset folder: documents 0..docs-1 over all its shards, in manifest order.

    Attributes:
      folder: where manifest and tokenizer are.
      name: what errors call the dataset.
      starts: int64 (docs + 1,), where each document begins when the shards are laid end to end.
      lengths: int64 (docs,), tokens of each document, BOS included.
      skipped: files of shards that are not read: the places of their documents become padding.
      ahead: rows that a reader should announce to `expect` before it reads them.
    """

    ahead = 0

    def __init__(self, folder: Path, split: str, *, name: str = "") -> None:
        """Opens and checks the split; `name` says whose local stand-in the folder is.

        Raises:
          UsageError: no such split, or a shard that is not what the manifest says.
        """
        self.folder = folder
        self.name = name or str(folder)
        self.split = split
        self.manifest = read_manifest(folder)
        self.skipped: set[str] = set()
        self._shards = shards = self.manifest.split(split)
        if not shards:
            choices = self.manifest.splits
            raise UsageError(
                f"dataset {self.name}: no split {split!r}, there is {', '.join(choices) or 'none'}"
                f"{nearest(split, choices)}"
            )
        try:
            indices = self._open()
        except ShardError as error:
            raise UsageError(f"dataset {self.name}: {error}") from None
        self._ends = np.cumsum([shard.tokens for shard in shards])
        self._begins = self._ends - [shard.tokens for shard in shards]
        self.starts = np.concatenate(
            [[0], *(index[1:] + at for index, at in zip(indices, self._begins, strict=True))]
        )
        self.lengths = np.diff(self.starts)
        self.text_bytes = sum(shard.text_bytes for shard in shards)
        self.max_token = max(shard.max_token for shard in shards)

    def _open(self) -> list[np.ndarray]:
        """Checks the shards, maps them into memory and returns their indices."""
        folder, dtype = self.folder, self.manifest.dtype
        hashed = sum(shard.bytes for shard in self._shards) <= HASH_AT_OPEN
        indices, self._arrays = [], []
        for shard in self._shards:
            indices.append(open_index(folder, shard))
            _check_size(folder, shard)
            if hashed:
                check_digest(folder / shard.file, shard.file, shard.sha256)
                check_digest(folder / shard.index_file, shard.index_file, shard.index_sha256)
            self._arrays.append(map_tokens(folder, shard, dtype))
        return indices

    def pieces(
        self, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray
    ) -> list[np.ndarray]:
        """Returns `counts[k]` tokens from token `starts[k]` of document `documents[k]`."""
        positions = self.starts[documents] + starts
        owners = np.searchsorted(self._ends, positions, side="right")
        return self._cut(owners, positions - self._begins[owners], counts)

    def _cut(self, owners: np.ndarray, begins: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        arrays = self._arrays
        return [
            arrays[owner][start : start + count]
            for owner, start, count in zip(
                owners.tolist(), begins.tolist(), counts.tolist(), strict=True
            )
        ]

    def document(self, number: int) -> np.ndarray:
        """Returns the tokens of one document."""
        if not self.lengths[number]:
            return np.zeros(0, self.manifest.dtype)
        one = np.asarray([number])
        return self.pieces(one, np.zeros_like(one), self.lengths[one])[0]

    def sample(self, count: int) -> np.ndarray:
        """Returns up to `count` documents, evenly spread; in object storage over the first shard.

        Their numbers: int64. Reading them there fetches no other shard.
        """
        end = self._shards[0].docs if self.ahead else len(self)
        return np.unique(np.linspace(0, end - 1, count).astype(np.int64)) if end else np.arange(0)

    def skip(self, file: str) -> None:
        """Reads the shard `file` of this split as padding from now on.

        Raises:
          UsageError: no such shard.
        """
        files = [shard.file for shard in self._shards]
        if file not in files:
            raise UsageError(f"dataset {self.name}, split {self.split}: no shard {file!r}")
        self.skipped.add(file)

    def readable(self, documents: np.ndarray) -> np.ndarray:
        """Returns for each document whether it can be read: bool, false in skipped shards."""
        bad = [k for k, shard in enumerate(self._shards) if shard.file in self.skipped]
        return np.isin(self._owners(documents), bad, invert=True)

    def _owners(self, documents: np.ndarray) -> np.ndarray:
        """Returns the number of the shard that holds each document."""
        return np.searchsorted(self._ends, self.starts[documents], side="right")

    def expect(self, documents: np.ndarray) -> None:
        """Says which documents will be read next; what is on the disk needs no preparing."""

    def cancel(self) -> None:
        """Ends a `pieces` that waits in another thread; what is on the disk never waits."""

    def __len__(self) -> int:
        return len(self.lengths)


def verify(folder: Path) -> Manifest:
    """Re-reads every shard of every split and returns the manifest when all is as it says.

    Raises:
      UsageError: the first shard whose size, index, digest or largest token differs.
    """
    for error in faults(folder):
        raise UsageError(f"dataset {folder}: {error}")
    return read_manifest(folder)


def faults(
    folder: Path, advance: Callable[[int], None] = lambda size: None
) -> Iterator[ShardError]:
    """Re-reads every shard and yields what differs from the manifest, at most one a file.

    Args:
      folder: the dataset.
      advance: called with the bytes of shards that were dealt with since the last call.
    """
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        for check in (_check_index, _check_tokens):
            try:
                check(folder, shard, manifest.dtype)
            except ShardError as error:
                yield error
        advance(shard.bytes)
    try:
        load_tokenizer(manifest.tokenizer, folder)
    except UsageError as error:
        yield ShardError(FILE, f"names another tokenizer than the folder has: {error}")


def _check_index(folder: Path, shard: Shard, dtype: np.dtype) -> None:
    open_index(folder, shard)
    check_digest(folder / shard.index_file, shard.index_file, shard.index_sha256)


def _check_tokens(folder: Path, shard: Shard, dtype: np.dtype) -> None:
    _check_size(folder, shard)
    check_digest(folder / shard.file, shard.file, shard.sha256)
    largest = int(map_tokens(folder, shard, dtype).max(initial=0))
    if largest != shard.max_token:
        raise ShardError(
            shard.file, f"holds token {largest}, manifest says at most {shard.max_token}"
        )


def _check_size(folder: Path, shard: Shard) -> None:
    try:
        size = (folder / shard.file).stat().st_size
    except OSError as error:
        raise ShardError(shard.file, f"cannot be read: {error.strerror}") from None
    if size != shard.bytes:
        hint = " (truncated copy?)" if size < shard.bytes else ""
        raise ShardError(shard.file, f"has {size:,} bytes, manifest says {shard.bytes:,}{hint}")


def check_digest(path: Path, file: str, wanted: str) -> None:
    """Raises ShardError when the sha256 of `path` is not the one that the manifest has for it."""
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wanted:
        differs = f"has sha256 {found[:12]}…, manifest says {wanted[:12]}…"
        raise ShardError(file, f"{differs} (damaged or replaced)")


def map_tokens(folder: Path, shard: Shard, dtype: np.dtype) -> np.ndarray:
    """Returns the tokens of a shard, mapped into memory and not read."""
    # Slicing np.memmap costs a microsecond more than slicing the plain array behind it.
    tokens = np.memmap(folder / shard.file, dtype, "r") if shard.tokens else []
    return np.asarray(tokens, dtype)


def open_index(folder: Path, shard: Shard) -> np.ndarray:
    """Returns the offsets of a shard's documents: int64 (docs + 1,).

    Raises:
      ShardError: the file is missing, no index, or not that of the shard.
    """
    name = shard.index_file
    try:
        index = np.load(folder / name, allow_pickle=False)
    except OSError as error:
        raise ShardError(name, f"cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise ShardError(name, f"is not an index: {error}") from None
    if index.dtype != np.int64 or index.shape != (shard.docs + 1,):
        raise ShardError(
            name, f"holds {index.dtype} {index.shape}, manifest says int64 ({shard.docs + 1},)"
        )
    if index[0] != 0 or index[-1] != shard.tokens:
        raise ShardError(
            name,
            f"runs from {index[0]:,} to {index[-1]:,}, {shard.file} holds tokens 0 to "
            f"{shard.tokens:,}",
        )
    falls = np.flatnonzero(index[1:] < index[:-1])
    if len(falls):
        raise ShardError(name, f"is not monotone: document {falls[0]} ends before it begins")
    return index


class DatasetWriter:
    """Writes a dataset folder, shard by shard; the folder appears whole at the end or not at all.

    A context manager: leaving it by an exception removes what was written.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        source: str = "",
        shard_tokens: int = 1 << 28,
        scratch: Path | None = None,
    ) -> None:
        """Prepares to write `folder`, which must not exist or be empty, by way of `scratch`.

        What is put into `preparation` or into `scratch` until the end is part of the dataset.

        Raises:
          UsageError: the folder holds something.
        """
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"dataset {folder}: the folder is not empty; choose another")
        self._folder = folder
        self._tokenizer = tokenizer.spec
        self._files = tokenizer.files()
        self._source = source
        self._shard_tokens = shard_tokens
        self._dtype = Manifest(tokenizer.spec, ()).dtype
        beside = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
        self._temporary = scratch or beside
        self.preparation: dict = {}
        self._open: dict[str, _OpenShard] = {}
        self._count: dict[str, int] = {}
        self._shards: list[Shard] = []

    def __enter__(self) -> Self:
        self._temporary.mkdir(parents=True)
        for name, content in self._files.items():
            (self._temporary / name).write_bytes(content)
        return self

    def add(self, split: str, tokens: np.ndarray, text_bytes: int) -> None:
        """Appends one document, BOS included, that stood for `text_bytes` bytes of text.

        Raises:
          UsageError: an id outside the vocabulary.
        """
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._tokenizer.vocab_size:
            raise UsageError(
                f"token ids run from {tokens.min()} to {tokens.max()}, the tokenizer "
                f"{self._tokenizer.kind!r} has {self._tokenizer.vocab_size}"
            )
        shard = self._open.get(split)
        if shard and shard.offsets[-1] and shard.offsets[-1] + len(tokens) > self._shard_tokens:
            self._shards.append(shard.close())
            shard = None
        if shard is None:
            number = self._count.get(split, 0)
            self._count[split] = number + 1
            shard = _OpenShard(self._temporary, split, f"{split}-{number:05d}.bin")
            self._open[split] = shard
        shard.add(np.ascontiguousarray(tokens, self._dtype), text_bytes)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._shards += [shard.close() for shard in self._open.values()]
            if kind is None:
                shards = sorted(self._shards, key=lambda shard: shard.file)
                Manifest(
                    self._tokenizer, tuple(shards), self._source, platform.python_version(), True,
                    preparation=self.preparation,
                ).write(self._temporary)  # fmt: skip
                os.rename(self._temporary, self._folder)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


class _OpenShard:
    """A shard being written."""

    def __init__(self, folder: Path, split: str, file: str) -> None:
        self.offsets = [0]
        self._folder, self._split, self._file = folder, split, file
        self._stream: BinaryIO = open(folder / file, "wb", buffering=_BLOCK)  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._text_bytes = 0
        self._max_token = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        data = tokens.tobytes()
        self._stream.write(data)
        self._hash.update(data)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self._text_bytes += text_bytes
        self._max_token = max(self._max_token, int(tokens.max(initial=0)))

    def close(self) -> Shard:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        size = self._stream.tell()
        self._stream.close()
        index = self._folder / (self._file.removesuffix(".bin") + ".idx.npy")
        np.save(index, np.asarray(self.offsets, np.int64))
        return Shard(
            file=self._file,
            split=self._split,
            docs=len(self.offsets) - 1,
            tokens=self.offsets[-1],
            text_bytes=self._text_bytes,
            bytes=size,
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
            max_token=self._max_token,
        )
