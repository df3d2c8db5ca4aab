"""Token files of other stacks: Megatron-LM, nanoGPT and ArrayRecord in, ArrayRecord out.

A source yields documents as they are stored; `import_documents` puts BOS in front of those that
begin with another token and counts the bytes of their text by decoding. Files are checked before
anything is written, read piece by piece, and named in every refusal.
"""

import itertools
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sharding.errors import UsageError
from trainer.data.manifest import read_manifest
from trainer.data.shards import DatasetWriter, TokenShards
from trainer.data.tokenizer import Tokenizer, definition_files

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents + 1
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_BLOCK = 1 << 24  # tokens searched for the end of a document at a time
_RECORDS = 1024  # ArrayRecord records read at a time


@dataclass(frozen=True)
class Source:
    """Documents of one file: `read` yields `count` integer arrays of tokens, in order."""

    path: Path
    dtype: np.dtype
    count: int
    read: Callable[[], Iterator[np.ndarray]]


def open_megatron(path: Path) -> Source:
    """Opens `NAME.bin` with its `NAME.idx`, as Megatron-LM's `preprocess_data.py` writes them.

    Raises:
      UsageError: a file is missing or too short, another magic or version, a dtype that is no
        integer, documents that do not follow one another.
    """
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    data, path = stem.with_name(f"{stem.name}.bin"), stem.with_name(f"{stem.name}.idx")
    index = _map(path, np.dtype("u1"))
    if len(index) < _HEADER.size:
        raise UsageError(f"{path}: {len(index)} bytes are no Megatron index")
    magic, version, code, sequences, bounds = _HEADER.unpack(index[: _HEADER.size].tobytes())
    if magic != _MAGIC:
        raise UsageError(f"{path}: begins with {magic!r}, a Megatron index with {_MAGIC!r}")
    if version != 1:
        raise UsageError(f"{path}: Megatron index of version {version}, this reads 1")
    if code not in _DTYPES:
        known = ", ".join(f"{number} ({np.dtype(name)})" for number, name in _DTYPES.items())
        raise UsageError(f"{path}: tokens of dtype code {code}, this reads {known}")
    needed = _HEADER.size + sequences * (4 + 8) + bounds * 8
    if len(index) < needed:
        raise UsageError(
            f"{path}: has {len(index):,} bytes, its header says {needed:,} (truncated?)"
        )
    tokens = _map(data, np.dtype(_DTYPES[code]))
    body = index[_HEADER.size :]
    lengths = body[: 4 * sequences].view("<i4").astype(np.int64)
    pointers = body[4 * sequences : 12 * sequences].view("<i8")
    documents = body[12 * sequences : 12 * sequences + 8 * bounds].view("<i8")
    ends = np.cumsum(lengths)
    if (lengths < 0).any() or (pointers != (ends - lengths) * tokens.itemsize).any():
        raise UsageError(f"{path}: its sequences do not follow one another in {data.name}")
    offsets = np.concatenate([[0], ends])
    if len(tokens) != offsets[-1]:
        raise UsageError(f"{data}: holds {len(tokens):,} tokens, {path.name} says {offsets[-1]:,}")
    rising = bounds and documents[0] == 0 and (documents[1:] >= documents[:-1]).all()
    if not rising or documents[-1] != sequences:
        raise UsageError(f"{path}: its documents are not monotone from 0 to {sequences}")
    cuts = offsets[documents]

    def read() -> Iterator[np.ndarray]:
        return (tokens[begin:end] for begin, end in itertools.pairwise(cuts))

    return Source(data, tokens.dtype, len(cuts) - 1, read)


def open_nanogpt(path: Path, dtype: str, eot: int) -> Source:
    """Opens a flat file of tokens, cut into documents after every `eot`.

    Raises:
      UsageError: no such file, or not a whole number of tokens.
    """
    tokens = _map(path, np.dtype(dtype).newbyteorder("<"))
    blocks = range(0, len(tokens), _BLOCK)
    ends = sum(int(np.count_nonzero(tokens[at : at + _BLOCK] == eot)) for at in blocks)

    def read() -> Iterator[np.ndarray]:
        begin = 0
        for at in blocks:
            for end in (at + 1 + np.flatnonzero(tokens[at : at + _BLOCK] == eot)).tolist():
                yield tokens[begin:end]
                begin = end
        if begin < len(tokens):
            yield tokens[begin:]

    return Source(path, tokens.dtype, ends + (len(tokens) > 0 and tokens[-1] != eot), read)


def open_arrayrecord(path: Path, dtype: str) -> Source:
    """Opens an ArrayRecord file whose records are documents: the bytes of little-endian tokens.

    Raises:
      UsageError: no such file, no ArrayRecord, or records in groups, which cannot be read singly.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    if not reader.ok():
        raise UsageError(f"{path}: not an ArrayRecord file")
    options = reader.writer_options_string()
    if "group_size:1," not in f"{options},":
        raise UsageError(
            f"{path}: written with {options.split(',')[0]}; write it with group_size:1"
        )
    kind = np.dtype(dtype).newbyteorder("<")

    def read() -> Iterator[np.ndarray]:
        for begin in range(0, reader.num_records(), _RECORDS):
            end = min(begin + _RECORDS, reader.num_records())
            for number, record in enumerate(reader.read(begin, end), begin):
                if len(record) % kind.itemsize:
                    raise UsageError(
                        f"{path}: record {number} has {len(record)} bytes, no whole number of "
                        f"{kind} tokens"
                    )
                yield np.frombuffer(record, kind)

    return Source(path, kind, reader.num_records(), read)


def import_documents(
    sources: list[tuple[str, Source]],
    folder: Path,
    tokenizer: Tokenizer,
    advance: Callable[[int], None],
) -> None:
    """Writes a dataset of (split, source) pairs; the folder appears whole or not at all.

    Raises:
      UsageError: a token that the tokenizer does not have, tokens that are too narrow for it.
    """
    vocab, bos = tokenizer.spec.vocab_size, tokenizer.spec.bos
    for _, source in sources:
        if source.dtype == np.uint16 and vocab > 1 << 16:
            raise UsageError(
                f"{source.path}: tokens of uint16 cannot be of a tokenizer with {vocab:,} ids: "
                "another one wrote them, or another --dtype"
            )
    names = ", ".join(str(source.path) for _, source in sources)
    with DatasetWriter(folder, tokenizer, source=names) as writer:
        for split, source in sources:
            for number, tokens in enumerate(source.read()):
                if len(tokens) and tokens[0] != bos:
                    tokens = np.concatenate([[bos], tokens.astype(np.int64)])
                least, largest = int(tokens.min(initial=0)), int(tokens.max(initial=0))
                if least < 0 or largest >= vocab:
                    wrong = least if least < 0 else largest
                    raise UsageError(
                        f"{source.path}: document {number} holds token {wrong}, the tokenizer has "
                        f"{vocab:,}: another one wrote it"
                    )
                writer.add(split, tokens, len(tokenizer.decode_bytes(tokens)))
                advance(1)


def export_arrayrecord(folder: Path, out: Path, advance: Callable[[int], None]) -> None:
    """Writes each shard as an ArrayRecord file, a document a record; all of `out` or nothing.

    Raises:
      UsageError: no dataset, a damaged one, or `out` exists.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    manifest = read_manifest(folder)
    if out.exists():
        raise UsageError(f"{out} exists; choose another folder")
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        for name in definition_files(manifest.tokenizer.kind):
            shutil.copyfile(folder / name, temporary / name)
        for split in manifest.splits:
            shards = TokenShards(folder, split)
            numbers = iter(range(len(shards)))
            for shard in manifest.split(split):
                path = temporary / f"{shard.file.removesuffix('.bin')}.array_record"
                writer = ArrayRecordWriter(str(path), "group_size:1")
                for number in itertools.islice(numbers, shard.docs):
                    writer.write(shards.document(number).tobytes())
                    advance(1)
                writer.close()
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Returns a file as an array that is not read yet."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if size % dtype.itemsize:
        raise UsageError(f"{path}: {size:,} bytes are no whole number of {dtype} tokens")
    return np.asarray(np.memmap(path, dtype, "r")) if size else np.zeros(0, dtype)
