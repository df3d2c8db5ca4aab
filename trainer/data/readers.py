"""What `torus prepare` reads: patterns become files, files units of work, units records.

Units follow from the inputs and `unit_bytes` alone and are read in order by one process, which does
no more than the format's library must: JSONL is parsed, and all text cleaned, by whoever gets the
unit. Libraries are imported when a file of their format is there.
"""

import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpoint.files import read_json
from sharding.errors import UsageError, nearest
from trainer.data.clean import Rejected
from trainer.packages import data_library

if TYPE_CHECKING:
    import pyarrow

STDIN = "-"
_TEXT = (
    "txt text md markdown rst tex org html htm css xml yaml yml toml ini cfg py pyi c h cc cpp cxx "
    "hpp hh cu cuh java kt scala js jsx ts tsx go rs rb php pl lua r jl m swift cs fs hs ml ex erl "
    "clj lisp el sh bash zsh ps1 sql proto cmake tf dart zig nim v sv vhd asm s"
)
_KNOWN = (
    ".txt, .md, .py and other text and source code, .jsonl (each also .gz or .zst), .parquet, "
    ".arrow, .arrayrecord"
)
_LONGEST_LINE = 1 << 16  # a text without line ends is cut this far beyond a unit's end
_PIECE = 1 << 10  # what a piece weighs besides its bytes, so that units hold a bounded number
_ROWS = 64  # of a column held at once


@dataclass(frozen=True)
class Input:
    """One file to read; `path` "-" is standard input, whose size is unknown."""

    path: str
    kind: str
    compression: str
    field: str
    bytes: int
    mtime_ns: int


class Chat(NamedTuple):
    """A record that is a conversation: messages with a role and a content each."""

    messages: list[dict]


class Piece(NamedTuple):
    """Part of an input: whole lines of text or JSONL, or some rows of a column."""

    input: int
    begin: int  # byte of the text at which `data` begins
    size: int  # bytes of the file: what progress counts
    data: bytes | list[bytes | None]


def find_inputs(patterns: Sequence[str]) -> tuple[list[Input], Counter[str]]:
    """Returns the files that `PATH[:FIELD]` patterns name, in order, each once.

    Folders are walked without hidden entries. The counter tells the extensions that were skipped in
    folders and globs.

    Raises:
      UsageError: a pattern that matches nothing, a named file of an unknown kind.
    """
    inputs: dict[str, Input] = {}
    skipped: Counter[str] = Counter()
    for pattern in patterns:
        name, _, field = pattern.rpartition(":")
        if not name or "/" in field or os.path.lexists(pattern):
            name, field = pattern, ""
        if name == STDIN:
            inputs[name] = Input(name, "jsonl" if field else "text", "", field, 0, 0)
            continue
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            folder, _, last = name.rstrip("/").rpartition("/")
            siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
            raise UsageError(f"input {name}: nothing matches{nearest(last, siblings)}")
        for path in (file for match in matches for file in _files(match)):
            extension = os.path.splitext(path)[1]
            if found := _describe(path, field):
                inputs.setdefault(path, found)
            elif path == name:
                hint = nearest(extension[1:], _READERS)
                raise UsageError(f"input {path}: `{extension}` is unknown{hint}; known: {_KNOWN}")
            else:
                skipped[extension or "no extension"] += 1
    if not inputs:
        kinds = ", ".join(f"{count} {name}" for name, count in skipped.most_common(5)) or "nothing"
        raise UsageError(f"input {' '.join(patterns)}: holds {kinds}; known: {_KNOWN}")
    return list(inputs.values()), skipped


def plan_units(inputs: Sequence[Input], unit_bytes: int) -> Iterator[list[Piece]]:
    """Yields the units of work in order, each of about `unit_bytes`.

    Raises:
      UsageError: an input that cannot be opened, is damaged, or has no such column.
    """
    unit: list[Piece] = []
    weight = 0
    for number, source in enumerate(inputs):
        with _reading(source):
            begin = 0
            for size, data in _READERS[source.kind](source, unit_bytes):
                unit.append(Piece(number, begin, size, data))
                length = len(data) if isinstance(data, bytes) else sum(len(x or b"") for x in data)
                begin += length
                weight += length + _PIECE
                if weight >= unit_bytes:
                    yield unit
                    unit, weight = [], 0
    if unit:
        yield unit


def records(
    pieces: Sequence[Piece], inputs: Mapping[int, Input]
) -> Iterator[tuple[int, int, bytes | Rejected | None]]:
    """Yields (piece, record of the piece, its text); None where a line is empty."""
    for number, piece in enumerate(pieces):
        source = inputs[piece.input]
        if source.kind == "jsonl":
            found = _parse(piece, source.field)
        elif isinstance(piece.data, bytes):
            found = iter([piece.data])
        else:
            found = (Rejected("not_text", "null") if row is None else row for row in piece.data)
        yield from ((number, record, data) for record, data in enumerate(found))


def _describe(path: str, field: str) -> Input | None:
    names = os.path.basename(path).lower().split(".")[1:]
    compression = names.pop() if names and names[-1] in ("gz", "zst") else ""
    kind = "text" if names and names[-1] in _TEXT.split() else "".join(names[-1:])
    if kind not in _READERS or (compression and kind not in ("text", "jsonl")):
        return None
    field = "" if kind in ("text", "arrayrecord") else field or "text"
    facts = os.stat(path)
    return Input(path, kind, compression, field, facts.st_size, facts.st_mtime_ns)


def _files(path: str) -> Iterator[str]:
    """Yields a file, or those below a folder: sorted, of a saved `datasets` in its own order."""
    if not os.path.isdir(path):
        if os.path.isfile(path):  # a pipe would wait, a broken link be missed
            yield path
        return
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if "dataset_dict.json" in names:
        splits = ", ".join(name for name in names if os.path.isdir(f"{path}/{name}"))
        raise UsageError(f"input {path}: holds the splits {splits}: name one, as in {path}/SPLIT")
    if "dataset_info.json" in names and "state.json" in names:
        found = read_json(Path(path, "state.json")).get("_data_files")
        entries = found if isinstance(found, list) else [None]
        wanted = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
        if any(name not in names for name in wanted):
            raise UsageError(f"input {path}: state.json does not name files of this folder")
        names = wanted
    for child in (os.path.join(path, name) for name in names):
        if not (os.path.islink(child) and os.path.isdir(child)):  # it may lead back here
            yield from _files(child)


@contextmanager
def _reading(source: Input) -> Iterator[None]:
    errors: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, zlib.error)
    if source.compression == "zst":
        errors += (data_library("zstandard").ZstdError,)
    try:
        yield
    except UsageError:
        raise
    except errors as error:
        raise UsageError(f"input {source.path}: cannot be read: {error}") from None


@contextmanager
def _open(source: Input) -> Iterator[tuple[Any, Any]]:
    """Yields the file, and the buffered stream of what it holds."""
    if source.path == STDIN:
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(source.path, "rb") as raw:
        if source.compression == "gz":
            yield raw, gzip.GzipFile(fileobj=raw)
        elif source.compression == "zst":
            stream = data_library("zstandard").ZstdDecompressor().stream_reader
            yield raw, io.BufferedReader(stream(raw, read_across_frames=True))
        else:
            yield raw, raw


def _lines(source: Input, unit_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yields a file in blocks that end with a line; texts of endless lines between characters."""
    longest = -1 if source.kind == "jsonl" else _LONGEST_LINE
    done = 0
    with _open(source) as (raw, stream):
        while data := stream.read(unit_bytes):
            data += stream.readline(longest)
            while data[-1] != 10 and (stream.peek(1)[:1] or b"\0")[0] & 0xC0 == 0x80:
                data += stream.read(1)
            at = raw.tell() if source.bytes else 0
            yield at - done, data
            done = at


def _parse(piece: Piece, field: str) -> Iterator[bytes | Chat | Rejected | None]:
    data = piece.data if piece.begin else piece.data.removeprefix(b"\xef\xbb\xbf")
    for line in io.BytesIO(data):
        try:
            yield _field_text(json.loads(line), field) if line.strip() else None
        except UnicodeError:
            yield Rejected("invalid_utf8", repr(line[:80]))
        except (ValueError, RecursionError) as error:
            yield Rejected("invalid_json", str(error))


def _field_text(record: object, field: str) -> bytes | Chat | Rejected:
    if not isinstance(record, dict):
        return Rejected("not_an_object", f"a JSON {type(record).__name__}, not an object")
    if field not in record:
        names = ", ".join(record) or "none"
        return Rejected("no_field", f"no field `{field}`, there is {names}{nearest(field, record)}")
    if _is_chat(record[field]):
        return Chat(record[field])
    if not isinstance(record[field], str):
        return Rejected("not_text", f"field `{field}` is {record[field]!r:.40}, not text")
    return record[field].encode()


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in value)
    )


def _check_column(source: Input, schema: "pyarrow.Schema") -> None:
    field, names = source.field, schema.names
    if field not in names:
        there = f"{', '.join(names)}{nearest(field, names)}"
        raise UsageError(f"input {source.path}: no column `{field}`, there is {there}")
    kind = schema.field(field).type
    if str(getattr(kind, "value_type", kind)) not in ("string", "large_string", "binary"):
        raise UsageError(f"input {source.path}: column `{field}` is {kind}, not text")


def _parquet(source: Input, _: int) -> Iterator[tuple[int, list[bytes | None]]]:
    with data_library("pyarrow.parquet").ParquetFile(source.path) as file:
        _check_column(source, file.schema_arrow)
        for batch in file.iter_batches(_ROWS, columns=[source.field], use_threads=False):
            size = source.bytes * len(batch) // file.metadata.num_rows
            yield size, batch.column(0).cast("large_binary").to_pylist()


def _arrow(source: Input, _: int) -> Iterator[tuple[int, list[bytes | None]]]:
    arrow = data_library("pyarrow")
    with arrow.memory_map(source.path) as file, arrow.ipc.open_stream(file) as stream:
        _check_column(source, stream.schema)
        for batch in stream:
            for begin in range(0, len(batch), _ROWS):
                part = batch.slice(begin, _ROWS)
                yield part.nbytes, part.column(source.field).cast("large_binary").to_pylist()


def _array_record(source: Input, _: int) -> Iterator[tuple[int, list[bytes | None]]]:
    module = data_library("array_record.python.array_record_module")
    reader = module.ArrayRecordReader(source.path)
    count = reader.num_records()
    for begin in range(0, count, _ROWS):
        rows = reader.read(list(range(begin, min(begin + _ROWS, count))))
        yield source.bytes * len(rows) // count, rows


_READERS = {
    "text": _lines, "jsonl": _lines, "parquet": _parquet, "arrow": _arrow,
    "arrayrecord": _array_record,
}  # fmt: skip
