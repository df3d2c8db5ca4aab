"""From files of text to a dataset: the pipeline behind `torus prepare`.

Processes clean, hash and tokenise a unit (readers.py) each and leave a part file, whole or not at
all. This process goes through the parts in the order of the units, drops duplicates and writes the
shards, so the bytes do not depend on who made a part or when. The part files are the journal: after
a SIGKILL the same call finds them beside the folder, reads them again and goes on.
"""

import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

import torus
from checkpoint.steps import write_whole
from sharding.errors import UsageError
from trainer.data.chat import REFUSED
from trainer.data.clean import Duplicates, Rejected, Rules, band_keys, clean, digest
from trainer.data.corpus import HELD_OUT, TRAIN
from trainer.data.manifest import Manifest, read_manifest
from trainer.data.readers import STDIN, Chat, Input, Piece, find_inputs, plan_units, records
from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import HuggingFaceTokenizer, Tokenizer, open_tokenizer, train_bpe

REJECTED = "rejected.jsonl"
SAMPLES = 20  # kept of each reason
BPE_SAMPLE = 64 << 20  # bytes of text that a tokenizer is learned from
_BAD = ("invalid_utf8", "invalid_json", "not_an_object", "no_field", "not_text", REFUSED)
_OVERFLOW = "token_overflow"
_FEW_BAD = 100  # before the end, fewer bad documents stop nothing
_FORMAT = 1  # of the parts: raise it when the same settings give other ones
_DEDUP_KEYS = 1 << 27  # 1 GiB


@dataclass(frozen=True, kw_only=True)
class Settings(Rules):
    """What decides a dataset, and three things that do not decide its bytes."""

    input: tuple[str, ...]
    tokenizer: str = "bytes"
    train_bpe: int = 0  # vocabulary of a tokenizer learned from the input; 0 = use `tokenizer`
    held_out: float = 0.01
    dedup: str = "exact"  # or none, near
    on_error: str = "skip"  # or fail
    shard_tokens: int = 1 << 28
    unit_bytes: int = 4 << 20
    out: Path
    max_bad: float = 0.01  # of the documents
    workers: int = 1

    def decisive(self) -> dict:
        """Returns the settings that decide the bytes, to be written as JSON."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "workers", "max_bad")}


class Progress(NamedTuple):
    """How far a preparation is; bytes are those of the input files."""

    bytes: int
    total_bytes: int
    documents: int
    tokens: int


class _Part(NamedTuple):
    """What became of a unit; all but `tokens` and `facts` have one row per document."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    digests: np.ndarray
    bands: np.ndarray  # (docs, BANDS), for near duplicates only
    places: np.ndarray  # (docs, 2): piece of the unit, record of the piece
    facts: dict  # records of each piece; rejected by reason; samples [reason, piece, record, why]


def prepare(settings: Settings, report: Callable[[Progress], None] = lambda _: None) -> Manifest:
    """Writes the dataset and returns its manifest; calls `report` after every unit.

    Raises:
      UsageError: settings or inputs that cannot be used, more bad documents than tolerated.
    """
    out = settings.out
    inputs, skipped = find_inputs(settings.input)
    if settings.train_bpe and any(source.path == STDIN for source in inputs):
        raise UsageError("--train-bpe reads the input twice, standard input comes only once")
    spec = None if settings.train_bpe else open_tokenizer(settings.tokenizer).spec
    facts = [_FORMAT, settings.decisive(), list(map(asdict, inputs)), spec and asdict(spec)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    work = out.parent / f".{out.name}.{key}.preparing"
    if out.exists() and any(out.iterdir()):
        manifest = read_manifest(out) if work.exists() else None
        if manifest is None or manifest.preparation.get("key") != key:
            raise UsageError(f"dataset {out}: the folder is not empty; choose another")
        shutil.rmtree(work)  # killed between the last two steps
        return manifest
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"dataset {out}: another process is preparing it") from None
        try:
            known = {"key": key, "skipped": dict(sorted(skipped.items()))}
            _write(inputs, settings, work, known, report)
        except UsageError:
            if not any(work.glob("*.npz")):  # nothing to go on with
                shutil.rmtree(work)
            raise
    for folder in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 16}.preparing"):
        shutil.rmtree(folder)  # those of other settings cannot end there any more
    return read_manifest(out)


def _write(
    inputs: list[Input], settings: Settings, work: Path, preparation: dict,
    report: Callable[[Progress], None],
) -> None:  # fmt: skip
    """Writes the dataset to `settings.out` by way of the folder `work`."""
    reference = _train(inputs, settings, work) if settings.train_bpe else settings.tokenizer
    assembly = _Assembly(inputs, settings, open_tokenizer(reference))
    scratch = work / "dataset"
    shutil.rmtree(scratch, ignore_errors=True)
    with DatasetWriter(
        settings.out, assembly.tokenizer, source=" ".join(settings.input),
        shard_tokens=settings.shard_tokens, scratch=scratch,
    ) as writer:  # fmt: skip
        for pieces, part in _parts(inputs, settings, reference, work):
            report(assembly.add(pieces, part, writer))
        writer.preparation = preparation | assembly.finish()
        with open(scratch / REJECTED, "w") as stream:
            stream.writelines(json.dumps(sample) + "\n" for sample in assembly.samples)


class _Assembly:
    """Adds parts to a dataset in the order of the units, and counts."""

    def __init__(self, inputs: list[Input], settings: Settings, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.samples: list[dict[str, str]] = []
        self._inputs, self._settings = inputs, settings
        self._duplicates = Duplicates(_DEDUP_KEYS)
        self._rejected: Counter[str] = Counter()
        self._docs = [0] * len(inputs)
        self._records = [0] * len(inputs)  # read of each input so far
        self._progress = Progress(0, sum(source.bytes for source in inputs), 0, 0)

    def add(self, pieces: list[Piece], part: _Part, writer: DatasetWriter) -> Progress:
        """Adds one part; raises UsageError for what --on-error and --max-bad do not tolerate."""
        starts = []
        for piece, count in zip(pieces, part.facts["records"], strict=True):
            starts.append(self._records[piece.input])
            self._records[piece.input] += count
        for reason, piece, record, detail in part.facts["samples"]:
            place = self._place(pieces[piece], starts[piece] + record)
            if reason == _OVERFLOW or (reason in _BAD and self._settings.on_error == "fail"):
                raise UsageError(f"input {place}: {reason}: {detail}")
            self._sample(reason, place, detail)
        self._rejected.update(part.facts["rejected"])
        dedup = self._settings.dedup
        keep = np.ones(len(part.lengths), bool)
        if dedup != "none" and len(keep):
            keep = self._duplicates.first(part.bands if dedup == "near" else part.digests[:, None])
        held_out = part.digests < self._settings.held_out * 2.0**64
        ends = np.cumsum(part.lengths)
        for number, (piece, record) in enumerate(part.places.tolist()):
            tokens = part.tokens[ends[number] - part.lengths[number] : ends[number]]
            if keep[number]:
                split = HELD_OUT if held_out[number] else TRAIN
                writer.add(split, tokens, int(part.text_bytes[number]))
                self._docs[pieces[piece].input] += 1
                continue
            reason = f"{dedup}_duplicate"
            if self._rejected[reason] < SAMPLES:
                place = self._place(pieces[piece], starts[piece] + record)
                self._sample(reason, place, self.tokenizer.decode(tokens[:50]))
            self._rejected[reason] += 1
        self._stop_if_bad(_FEW_BAD)
        self._progress = Progress(
            self._progress.bytes + sum(piece.size for piece in pieces),
            self._progress.total_bytes,
            self._progress.documents + int(keep.sum()),
            self._progress.tokens + int(part.lengths[keep].sum()),
        )
        return self._progress

    def finish(self) -> dict:
        """Returns what the manifest says of the preparation; UsageError if nothing is left."""
        self._stop_if_bad(0)
        if not self._progress.documents:
            reasons = ", ".join(f"{n:,} {name}" for name, n in self._rejected.most_common())
            raise UsageError(f"no document is left: {reasons or 'all are empty'}")
        counted = zip(self._inputs, self._docs, strict=True)
        return {
            "settings": self._settings.decisive(),
            "inputs": [{**asdict(source), "docs": docs} for source, docs in counted],
            "docs": self._progress.documents,
            "tokens": self._progress.tokens,
            "rejected": dict(sorted(self._rejected.items())),
        }

    def _sample(self, reason: str, place: str, detail: str) -> None:
        if sum(sample["reason"] == reason for sample in self.samples) < SAMPLES:
            self.samples.append({"reason": reason, "place": place, "detail": detail})

    def _place(self, piece: Piece, record: int) -> str:
        """Names a record of an input: `file:line`, or where part of a text file begins."""
        source = self._inputs[piece.input]
        if source.kind == "text":
            return source.path + (f" from byte {piece.begin:,}" if piece.begin else "")
        return f"{source.path}:{record + 1}"

    def _stop_if_bad(self, few: int) -> None:
        bad, limit = sum(self._rejected[reason] for reason in _BAD), self._settings.max_bad
        read = sum(self._docs) + self._rejected.total()
        if bad > max(few, limit * read):
            shown = [sample for sample in self.samples if sample["reason"] in _BAD][:3]
            raise UsageError(
                f"{bad:,} of {read:,} documents are bad, --max-bad allows {limit:.2%}: "
                + "; ".join("{place}: {reason}: {detail}".format(**sample) for sample in shown)
            )


def _parts(
    inputs: list[Input], settings: Settings, tokenizer: str, work: Path
) -> Iterator[tuple[list[Piece], _Part]]:
    """Yields every unit with its part, in order; makes those that are not there yet."""
    waiting: deque[tuple[list[Piece], Path, Future[None] | None]] = deque()
    workers = settings.workers
    # One worker needs no process. More are spawned, not forked, because threads run here.
    context = multiprocessing.get_context("spawn")
    pool: Executor = ThreadPoolExecutor(1)
    now = _started(work)
    if workers > 1:
        pool = ProcessPoolExecutor(workers, context, torus.call, (__name__, "_start_worker"))

    def first() -> tuple[list[Piece], _Part]:
        pieces, path, job = waiting.popleft()
        if job:
            job.result()
        with np.load(path) as arrays:
            content = {name: arrays[name] for name in arrays.files}
        return pieces, _Part(**{**content, "facts": json.loads(content["facts"].tobytes())})

    try:
        for number, pieces in enumerate(plan_units(inputs, settings.unit_bytes)):
            # No size and date tell one standard input from another: its content does.
            lines = [piece.data for piece in pieces if inputs[piece.input].path == STDIN]
            path = work / f"{number:08d}-{digest(b''.join(lines)):016x}.npz"
            owners = {piece.input: inputs[piece.input] for piece in pieces}
            job = None
            if not path.exists():
                job = pool.submit(_make_part, pieces, owners, settings, tokenizer, path, now)
            waiting.append(([piece._replace(data=b"") for piece in pieces], path, job))
            if len(waiting) > 2 * workers:
                yield first()
        while waiting:
            yield first()
    except BrokenProcessPool:
        # The pool ends the workers it has; one just being started is left waiting, and awaited.
        for process in multiprocessing.active_children():
            process.kill()
        raise UsageError(
            "a worker was killed, for want of memory perhaps: try fewer --workers or a smaller "
            "--unit-bytes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _started(work: Path) -> datetime:
    """Returns when the preparation began: one time for all parts, also after it was killed."""
    if not (path := work / "started").exists():
        write_whole(path, datetime.now().isoformat().encode())
    return datetime.fromisoformat(path.read_text())


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's; units under way are finished
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


@cache
def _tokenizer(reference: str) -> Tokenizer:
    return open_tokenizer(reference)


def _make_part(
    pieces: list[Piece], inputs: dict[int, Input], settings: Settings, tokenizer: str, path: Path,
    now: datetime,
) -> None:  # fmt: skip
    """Cleans, hashes and tokenises a unit, and writes its part; chat templates are told `now`."""
    made = _tokenizer(tokenizer)
    spec = made.spec
    dtype = Manifest(spec, ()).dtype
    tokens, lengths, sizes, digests, bands, places = [np.zeros(0, dtype)], [], [], [], [], []
    counts = [0] * len(pieces)
    rejected: Counter[str] = Counter()
    samples = []
    for piece, record, data in records(pieces, inputs):
        counts[piece] = record + 1
        if data is None:
            continue
        try:
            if chat := isinstance(data, Chat):
                data = _chat_bytes(data, made, now)
            text, kept = clean(data, settings)
            ids = made.encode_chat(text) if chat else made.encode(text)
            if (largest := int(ids.max(initial=0))) >= spec.vocab_size:
                raise Rejected(_OVERFLOW, f"id {largest:,}, the vocabulary has {spec.vocab_size:,}")
        except Rejected as why:
            rejected[why.reason] += 1
            if rejected[why.reason] <= SAMPLES:
                samples.append([why.reason, piece, record, why.detail])
            continue
        tokens.append(spec.document(ids).astype(dtype))
        lengths.append(len(tokens[-1]))
        sizes.append(len(kept))
        digests.append(digest(kept))
        places.append((piece, record))
        if settings.dedup == "near":
            bands.append(band_keys(text))
    facts = {"records": counts, "rejected": rejected, "samples": samples}
    part = _Part(
        tokens=np.concatenate(tokens), lengths=np.asarray(lengths, np.int64),
        text_bytes=np.asarray(sizes, np.int64), digests=np.asarray(digests, np.uint64),
        bands=np.asarray(bands, np.uint64), places=np.asarray(places, np.int64),
        facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
    )  # fmt: skip
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        np.savez(stream, **part._asdict())
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _chat_bytes(chat: Chat, tokenizer: Tokenizer, now: datetime) -> bytes:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UsageError("a conversation needs a tokenizer.json and the chat template beside it")
    try:
        return tokenizer.chat_text(chat.messages, now).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise Rejected("invalid_utf8", str(error)) from None


def _train(inputs: list[Input], settings: Settings, work: Path) -> str:
    """Returns the folder of a tokenizer learned from a sample of the training split."""
    folder, temporary = work / "tokenizer", work / "tokenizer.tmp"
    if not folder.exists():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, data in train_bpe(_sample(inputs, settings), settings.train_bpe).files().items():
            (temporary / name).write_bytes(data)
        temporary.replace(folder)
    return str(folder)


def _sample(inputs: list[Input], settings: Settings) -> Iterator[str]:
    """Yields the training documents of every n-th unit, together about BPE_SAMPLE bytes."""
    total = sum(source.bytes * (4 if source.compression else 1) for source in inputs)
    stride, left = -(-total // BPE_SAMPLE) or 1, BPE_SAMPLE
    for pieces in islice(plan_units(inputs, settings.unit_bytes), 0, None, stride):
        for _, _, data in records(pieces, dict(enumerate(inputs))):
            try:
                text, kept = clean(b"" if isinstance(data, Chat) else data or b"", settings)
            except Rejected:
                continue
            if left > 0 and digest(kept) >= settings.held_out * 2.0**64:
                left -= len(kept)
                yield text
