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
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from sharding.errors import UsageError, nearest
from trainer.data.manifest import Manifest, Shard, read_manifest
from trainer.data.tokenizer import Tokenizer

HASH_AT_OPEN = 64 << 20  # bytes; about 60 ms of SHA-256, so small datasets are always checked whole
_BLOCK = 1 << 22


class TokenShards:
    """One split of a dataset folder: documents 0..docs-1 over all its shards, in manifest order.

    Attributes:
      starts: int64 (docs + 1,), where each document begins when the shards are laid end to end.
      lengths: int64 (docs,), tokens of each document, BOS included.
    """

    def __init__(self, folder: Path, split: str) -> None:
        """Opens and checks the split.

        Raises:
          UsageError: no such split, or a shard that is not what the manifest says.
        """
        self.folder = folder
        self.split = split
        self.manifest = read_manifest(folder)
        shards = self.manifest.split(split)
        if not shards:
            choices = self.manifest.splits
            raise UsageError(
                f"dataset {folder}: no split {split!r}, there is {', '.join(choices) or 'none'}"
                f"{nearest(split, choices)}"
            )
        dtype = self.manifest.dtype
        hashed = sum(shard.bytes for shard in shards) <= HASH_AT_OPEN
        starts, bases, arrays = [np.zeros(1, np.int64)], [0], []
        for shard in shards:
            index = _open_index(folder, shard)
            _check_size(folder, shard)
            if hashed:
                _check_digests(folder, shard)
            starts.append(index[1:] + bases[-1])
            bases.append(bases[-1] + shard.tokens)
            # Slicing np.memmap costs a microsecond more than slicing the plain array behind it.
            tokens = np.memmap(folder / shard.file, dtype, "r") if shard.tokens else []
            arrays.append(np.asarray(tokens, dtype))
        self.starts = np.concatenate(starts)
        self.lengths = np.diff(self.starts)
        self.text_bytes = sum(shard.text_bytes for shard in shards)
        self.max_token = max(shard.max_token for shard in shards)
        self._arrays = arrays
        self._begins, self._ends = np.asarray(bases[:-1]), np.asarray(bases[1:])

    def pieces(
        self, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray
    ) -> list[np.ndarray]:
        """Returns views of `counts[k]` tokens from token `starts[k]` of document `documents[k]`."""
        positions = self.starts[documents] + starts
        owners = np.searchsorted(self._ends, positions, side="right")
        local = positions - self._begins[owners]
        arrays = self._arrays
        return [
            arrays[owner][start : start + count]
            for owner, start, count in zip(
                owners.tolist(), local.tolist(), counts.tolist(), strict=True
            )
        ]

    def document(self, number: int) -> np.ndarray:
        """Returns the tokens of one document."""
        if not self.lengths[number]:
            return np.zeros(0, self.manifest.dtype)
        one = np.asarray([number])
        return self.pieces(one, np.zeros_like(one), self.lengths[one])[0]

    def __len__(self) -> int:
        return len(self.lengths)


def verify(folder: Path) -> Manifest:
    """Re-reads every shard of every split and returns the manifest when all is as it says.

    Raises:
      UsageError: the first shard whose size, index, digest or largest token differs.
    """
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        _open_index(folder, shard)
        _check_size(folder, shard)
        _check_digests(folder, shard)
        if shard.tokens:
            largest = int(np.memmap(folder / shard.file, manifest.dtype, "r").max())
            if largest != shard.max_token:
                raise UsageError(
                    f"dataset {folder}: {shard.file} holds token {largest}, manifest says at most "
                    f"{shard.max_token}"
                )
    return manifest


def _check_size(folder: Path, shard: Shard) -> None:
    try:
        size = (folder / shard.file).stat().st_size
    except OSError as error:
        raise UsageError(f"dataset {folder}: {shard.file}: {error.strerror}") from None
    if size != shard.bytes:
        hint = " (truncated copy?)" if size < shard.bytes else ""
        raise UsageError(
            f"dataset {folder}: {shard.file} has {size:,} bytes, manifest says "
            f"{shard.bytes:,}{hint}"
        )


def _check_digests(folder: Path, shard: Shard) -> None:
    for file, wanted in ((shard.file, shard.sha256), (shard.index_file, shard.index_sha256)):
        with open(folder / file, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != wanted:
            raise UsageError(
                f"dataset {folder}: {file} has sha256 {found[:12]}…, manifest says {wanted[:12]}… "
                "(damaged or replaced)"
            )


def _open_index(folder: Path, shard: Shard) -> np.ndarray:
    name = shard.index_file
    try:
        index = np.load(folder / name, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"dataset {folder}: {name}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise UsageError(f"dataset {folder}: {name} is not an index: {error}") from None
    if index.dtype != np.int64 or index.shape != (shard.docs + 1,):
        raise UsageError(
            f"dataset {folder}: {name} holds {index.dtype} {index.shape}, manifest says int64 "
            f"({shard.docs + 1},)"
        )
    if index[0] != 0 or index[-1] != shard.tokens:
        raise UsageError(
            f"dataset {folder}: {name} runs from {index[0]:,} to {index[-1]:,}, "
            f"{shard.file} holds tokens 0 to {shard.tokens:,}"
        )
    falls = np.flatnonzero(index[1:] < index[:-1])
    if len(falls):
        raise UsageError(
            f"dataset {folder}: {name} is not monotone: document {falls[0]} ends before it begins"
        )
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
    ) -> None:
        """Prepares to write `folder`, which must not exist or be empty.

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
        self._temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._shards += [shard.close() for shard in self._open.values()]
            if kind is None:
                shards = sorted(self._shards, key=lambda shard: shard.file)
                Manifest(
                    self._tokenizer, tuple(shards), self._source, platform.python_version(), True
                ).write(self._temporary)
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
