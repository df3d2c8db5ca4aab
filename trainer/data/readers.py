"""What `torus prepare` reads: patterns become files, files become units of work, units records.

Units follow from the inputs and `unit_bytes` alone, never from the workers, so any of them can be
done by anyone, again, or not at all. The lines of text files and JSONL, compressed or not, travel
with their unit; of the formats with an index only the place does.
"""

import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from sharding.errors import UsageError, nearest
from trainer.data.clean import Rejected

if TYPE_CHECKING:
    import pyarrow

STDIN = "-"
_TEXT = (
    "txt text md markdown rst tex org html htm css xml yaml yml toml ini cfg py pyi c h cc cpp cxx "
    "hpp hh cu cuh java kt scala js jsx ts tsx go rs rb php pl lua r jl m swift cs fs hs ml ex erl "
    "clj lisp el sh bash zsh ps1 sql proto cmake tf dart zig nim v sv vhd asm s"
)
_RECORDS = ("jsonl", "parquet", "arrow", "arrayrecord")
_KINDS = {**{name: "text" for name in _TEXT.split()}, **{name: name for name in _RECORDS}}
_KNOWN = (
    ".txt, .md, .py and other text and source code, .jsonl (each also .gz or .zst), .parquet, "
    ".arrow, .arrayrecord"
)
_LONGEST_LINE = 1 << 16  # a text without line ends is cut this far beyond a unit's end
_PIECE = 1 << 10  # what a file weighs besides its bytes, so that units hold a bounded number
_ROWS = 256  # of a column held as Python objects at once


@dataclass(frozen=True)
class Input:
    """One file to read; `path` "-" is standard input."""

    path: str
    kind: str
    compression: str
    field: str
    bytes: int
    mtime_ns: int


class Piece(NamedTuple):
    """Part of an input: bytes (then with `data`), row group, batch or records `begin` to `end`."""

    input: int
    begin: int
    end: int
    size: int  # bytes of the file: what progress counts
    data: bytes = b""


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
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            folder, _, last = name.rstrip("/").rpartition("/")
            siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
            raise UsageError(f"input {name}: nothing matches{nearest(last, siblings)}")
        for path in (file for match in matches for file in _files(match)):
            found = _describe(path, field)
            extension = os.path.splitext(path)[1]
            if found:
                inputs.setdefault(path, found)
            elif path == name:
                hint = nearest(extension[1:], _KINDS)
                raise UsageError(f"input {path}: `{extension}` is unknown{hint}; known: {_KNOWN}")
            else:
                skipped[extension or "no extension"] += 1
    if not inputs:
        kinds = ", ".join(f"{count} {name}" for name, count in skipped.most_common(5)) or "nothing"
        raise UsageError(f"input {' '.join(patterns)}: holds {kinds}; known: {_KNOWN}")
    return list(inputs.values()), skipped


def plan_units(inputs: Sequence[Input], unit_bytes: int) -> Iterator[list[Piece]]:
    """Yields the units of work in order, each of about `unit_bytes` or one row group.

    Raises:
      UsageError: an input that cannot be opened, is damaged, or has no such column.
    """
    unit: list[Piece] = []
    weight = 0
    for number, source in enumerate(inputs):
        with _reading(source):
            for piece in _CUT[source.kind](source, unit_bytes):
                unit.append(piece._replace(input=number))
                weight += len(piece.data) + _PIECE if piece.data else unit_bytes
                if weight >= unit_bytes:
                    yield unit
                    unit, weight = [], 0
    if unit:
        yield unit


def records(source: Input, piece: Piece) -> Iterator[bytes | Rejected | None]:
    """Yields the texts of one piece, `Rejected` for what is no text, None for an empty line.

    Raises:
      UsageError: the file cannot be read.
    """
    with _reading(source):
        yield from _READ[source.kind](source, piece)


def _describe(path: str, field: str) -> Input | None:
    names = os.path.basename(path).lower().split(".")[1:]
    compression = names.pop() if names and names[-1] in ("gz", "zst") else ""
    kind = _KINDS.get(names[-1]) if names else None
    if kind is None or (compression and kind not in ("text", "jsonl")):
        return None
    field = "" if kind in ("text", "arrayrecord") else field or "text"
    facts = os.stat(path)
    return Input(path, kind, compression, field, facts.st_size, facts.st_mtime_ns)


def _files(path: str) -> Iterator[str]:
    """Yields the files below a folder in sorted order; those of a saved `datasets` in its own."""
    if not os.path.isdir(path):
        yield path
        return
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if "dataset_dict.json" in names:
        splits = ", ".join(name for name in names if os.path.isdir(f"{path}/{name}"))
        raise UsageError(f"input {path}: holds the splits {splits}: name one, as in {path}/SPLIT")
    if "dataset_info.json" in names and "state.json" in names:
        with open(f"{path}/state.json") as stream:
            names = [entry["filename"] for entry in json.load(stream)["_data_files"]]
    for name in names:
        yield from _files(os.path.join(path, name))


def _library(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UsageError(f"{package} is not installed: pip install 'torus-train[data]'") from None


@contextmanager
def _reading(source: Input) -> Iterator[None]:
    errors: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, zlib.error)
    if source.compression == "zst":
        errors += (_library("zstandard").ZstdError,)
    try:
        yield
    except UsageError:
        raise
    except errors as error:
        raise UsageError(f"input {source.path}: cannot be read: {error}") from None


@contextmanager
def _open(source: Input) -> Iterator[tuple[BinaryIO, Any]]:
    """Yields the file, and the buffered stream of what it holds."""
    if source.path == STDIN:
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(source.path, "rb") as raw:
        if source.compression == "gz":
            yield raw, gzip.GzipFile(fileobj=raw)
        elif source.compression == "zst":
            stream = _library("zstandard").ZstdDecompressor().stream_reader
            yield raw, io.BufferedReader(stream(raw, read_across_frames=True))
        else:
            yield raw, raw


def _cut_lines(source: Input, unit_bytes: int) -> Iterator[Piece]:
    begin = done = 0
    with _open(source) as (raw, stream):
        while data := stream.read(unit_bytes):
            if source.kind == "jsonl":
                data += stream.readline()
            else:
                data += stream.readline(_LONGEST_LINE)
                # A text of endless lines is cut between two characters.
                while data[-1] != 10 and (stream.peek(1)[:1] or b"\0")[0] & 0xC0 == 0x80:
                    data += stream.read(1)
            at = raw.tell() if source.bytes else 0
            yield Piece(0, begin, begin + len(data), at - done, data)
            begin, done = begin + len(data), at


def _read_text(source: Input, piece: Piece) -> Iterator[bytes]:
    yield piece.data


def _read_jsonl(source: Input, piece: Piece) -> Iterator[bytes | Rejected | None]:
    data = piece.data if piece.begin else piece.data.removeprefix(b"\xef\xbb\xbf")
    for line in io.BytesIO(data):
        if not line.strip():
            yield None
            continue
        try:
            yield _field_text(json.loads(line), source.field)
        except UnicodeError:
            yield Rejected("invalid_utf8", repr(line[:80]))
        except (ValueError, RecursionError) as error:
            yield Rejected("invalid_json", str(error))


def _field_text(record: object, field: str) -> bytes | Rejected:
    if not isinstance(record, dict):
        return Rejected("not_an_object", f"a JSON {type(record).__name__}, not an object")
    if field not in record:
        names = ", ".join(record) or "none"
        return Rejected("no_field", f"no field `{field}`, there is {names}{nearest(field, record)}")
    if not isinstance(record[field], str):
        return Rejected("not_text", f"field `{field}` is {record[field]!r:.40}, not text")
    return record[field].encode()


def _check_column(source: Input, schema: "pyarrow.Schema") -> None:
    """Raises UsageError when the schema has no such column of text."""
    field, names = source.field, schema.names
    if field not in names:
        raise UsageError(
            f"input {source.path}: no column `{field}`, there is {', '.join(names)}"
            f"{nearest(field, names)}"
        )
    kind = schema.field(field).type
    if str(getattr(kind, "value_type", kind)) not in ("string", "large_string", "binary"):
        raise UsageError(f"input {source.path}: column `{field}` is {kind}, not text")


def _texts(column: "pyarrow.Array", field: str) -> Iterator[bytes | Rejected]:
    for begin in range(0, len(column), _ROWS):
        for value in column.slice(begin, _ROWS).cast("large_binary").to_pylist():
            yield Rejected("not_text", f"`{field}` is null") if value is None else value


def _cut_parquet(source: Input, unit_bytes: int) -> Iterator[Piece]:
    with _library("pyarrow.parquet").ParquetFile(source.path) as file:
        _check_column(source, file.schema_arrow)
        facts = file.metadata
        for group in range(facts.num_row_groups):
            share = facts.row_group(group).num_rows / max(facts.num_rows, 1)
            yield Piece(0, group, group + 1, int(source.bytes * share))


def _read_parquet(source: Input, piece: Piece) -> Iterator[bytes | Rejected]:
    with _library("pyarrow.parquet").ParquetFile(source.path) as file:
        for batch in file.iter_batches(_ROWS, [piece.begin], [source.field], use_threads=False):
            yield from _texts(batch.column(0), source.field)


def _arrow_batches(source: Input) -> Iterator["pyarrow.RecordBatch"]:
    arrow = _library("pyarrow")
    with arrow.memory_map(source.path) as file, arrow.ipc.open_stream(file) as stream:
        _check_column(source, stream.schema)
        yield from stream


def _cut_arrow(source: Input, unit_bytes: int) -> Iterator[Piece]:
    for number, batch in enumerate(_arrow_batches(source)):
        yield Piece(0, number, number + 1, batch.nbytes)


def _read_arrow(source: Input, piece: Piece) -> Iterator[bytes | Rejected]:
    for batch in islice(_arrow_batches(source), piece.begin, piece.end):
        yield from _texts(batch.column(source.field), source.field)


def _array_record(source: Input) -> Any:
    return _library("array_record.python.array_record_module").ArrayRecordReader(source.path)


def _cut_array_record(source: Input, unit_bytes: int) -> Iterator[Piece]:
    count = _array_record(source).num_records()
    step = max(1, count * unit_bytes // source.bytes)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        yield Piece(0, begin, end, source.bytes * (end - begin) // count)


def _read_array_record(source: Input, piece: Piece) -> Iterator[bytes]:
    reader = _array_record(source)
    for begin in range(piece.begin, piece.end, _ROWS):
        yield from reader.read(list(range(begin, min(begin + _ROWS, piece.end))))


_CUT = {
    "text": _cut_lines, "jsonl": _cut_lines, "parquet": _cut_parquet, "arrow": _cut_arrow,
    "arrayrecord": _cut_array_record,
}  # fmt: skip
_READ = {
    "text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "arrow": _read_arrow,
    "arrayrecord": _read_array_record,
}  # fmt: skip
