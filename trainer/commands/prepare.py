"""`torus prepare`: text in files becomes a dataset that `torus train` reads."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.errors import UsageError
from trainer.commands.parser import CommandParser

if TYPE_CHECKING:
    from trainer.data.prepare import Progress

HELP = "turn text, JSONL or Parquet into a dataset"
USAGE = """\
usage: torus prepare --input PATTERN[:FIELD] ... --out FOLDER [--tokenizer bytes|FILE]
                     [--train-bpe N] [--held-out FRACTION] [--dedup none|exact|near] [--workers N]
                     [--min-chars N] [--max-chars N] [--max-control F] [--max-repeated F]
                     [--on-error skip|fail] [--max-bad F] [--shard-tokens N] [--unit-bytes N]

Reads text, cleans it, drops duplicates, tokenises it and writes a dataset folder: the same bytes
whatever the number of workers. Killed or interrupted, the same command goes on where it stopped.
Each PATTERN is a file, a folder, a glob in quotes, or - for standard input. A text or source file
is one document; so is a line of JSONL, a row of Parquet or of a folder saved by Hugging Face
`datasets`, a record of ArrayRecord. Text and JSONL may be compressed (.gz, .zst).

  :FIELD             the field or column with the text (text)
  --tokenizer FILE   tokenizer.json, SentencePiece .model or .tiktoken file (bytes)
  --train-bpe N      learn a tokenizer of N ids from the input instead
  --held-out F       share of the documents for evaluation, chosen by their content (0.01)
  --dedup KIND       what is dropped after its first occurrence: exact or near duplicates (exact)
  --workers N        processes (one per core)
  --min-chars N      shorter documents are rejected (1); --max-chars N: longer ones (no limit)
  --max-control F    so are those with a larger share of control characters (0.05)
  --max-repeated F   or with a larger share of text in repeated lines (0.5)
  --on-error fail    stop at the first document that cannot be read; skip counts it (skip)
  --max-bad F        share of such documents beyond which skip stops, too (0.01)
  --shard-tokens N   longest shard (268M)
  --unit-bytes N     work is cut into pieces of about this size; a longer text file becomes several
                     documents, cut at line ends (4M)

What was rejected is counted in manifest.json, with samples in rejected.jsonl.

  torus prepare --input notes/ --out data/notes
  torus prepare --input 'crawl/*.jsonl.zst:content' --train-bpe 32k --dedup near --out data/crawl
  zcat dump.gz | torus prepare --input - --tokenizer llama/tokenizer.json --out data/dump
"""


def _number(text: str) -> int:
    """Reads "4096", "32k", "100M", "2G"."""
    factor = {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:].lower(), 1)
    return int(float(text[:-1]) * factor) if factor > 1 else int(text)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("prepare")
    parser.add_argument("--input", nargs="+", action="extend", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--dedup", default="exact", choices=("none", "exact", "near"))
    parser.add_argument("--on-error", default="skip", choices=("skip", "fail"))
    limits = {
        "held-out": (0.01, 0, 0.999), "max-control": (0.05, 0, 1), "max-repeated": (0.5, 0, 1),
        "max-bad": (0.01, 0, 1), "train-bpe": (0, 0, 1 << 24), "min-chars": (1, 0, 1 << 40),
        "max-chars": (0, 0, 1 << 40), "shard-tokens": (1 << 28, 1, 1 << 40),
        "unit-bytes": (4 << 20, 1, 1 << 30), "workers": (os.cpu_count() or 1, 1, 4096),
    }  # fmt: skip
    for name, (default, _, _) in limits.items():
        kind = float if isinstance(default, float) else _number
        parser.add_argument(f"--{name}", type=kind, default=default)
    args = parser.parse(argv)
    for name, (_, least, most) in limits.items():
        value = getattr(args, name.replace("-", "_"))
        if not least <= value <= most:
            raise UsageError(f"--{name} {value}: from {least} to {most}")
    return args


def main(argv: list[str]) -> int:
    """Writes the dataset; raises UsageError for arguments or inputs that cannot be used."""
    args = _arguments(argv)
    from trainer.data.clean import Rules
    from trainer.data.prepare import REJECTED, Settings, prepare

    rules = Rules(args.min_chars, args.max_chars, args.max_control, args.max_repeated)
    settings = Settings(
        inputs=tuple(args.input), out=args.out, tokenizer=args.tokenizer, rules=rules,
        train_bpe=args.train_bpe, held_out=args.held_out, dedup=args.dedup,
        on_error=args.on_error, max_bad=args.max_bad, shard_tokens=args.shard_tokens,
        unit_bytes=args.unit_bytes, workers=args.workers,
    )  # fmt: skip
    with _Bar() as bar:
        manifest = prepare(settings, bar.show)
    facts = manifest.preparation
    print(f"{args.out}: {facts['docs']:,} documents, {facts['tokens']:,} tokens")
    for split in manifest.splits:
        docs = sum(shard.docs for shard in manifest.split(split))
        print(f"  {split:6} {docs:,} documents in {len(manifest.split(split))} shards")
    for title, counts in (("rejected", facts["rejected"]), ("other files", facts["skipped"])):
        if counts:
            listed = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            print(f"  {title}: {listed}" + (f" (see {REJECTED})" if title == "rejected" else ""))
    vocab = manifest.tokenizer.vocab_size
    print(f"train on it with --config.data.path={args.out} --config.model.vocab={vocab}")
    return 0


class _Bar:
    """A progress bar on a terminal: bytes, MB/s and the time that is left."""

    def __enter__(self) -> "_Bar":
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[found]}"), console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, found="")
        self._bar.start()
        return self

    def show(self, progress: "Progress") -> None:
        """Moves the bar."""
        found = f"{progress.documents:,} documents, {progress.tokens:,} tokens"
        total = progress.total_bytes or None
        self._bar.update(self._task, completed=progress.bytes, total=total, found=found)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
