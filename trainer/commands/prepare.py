"""`torus prepare`: text in files becomes a dataset that `torus train` reads."""

import argparse
import os
import sys
from pathlib import Path

from sharding.errors import UsageError
from trainer.commands.parser import CommandParser
from trainer.terminal import bare

USAGE = """\
usage: torus prepare --input PATTERN[:FIELD] ... --out FOLDER [--tokenizer bytes|FILE] [...]

Cleans text, drops duplicates, tokenises the rest and writes a dataset folder: the same bytes
whatever the number of workers. Killed or interrupted, the same command goes on where it stopped.
Each PATTERN is a file, a folder, a glob in quotes, or - for standard input. A text or source file
is one document; so is a line of JSONL, a row of Parquet or of a folder saved by Hugging Face
`datasets`, a record of ArrayRecord. Text and JSONL may be compressed (.gz, .zst).

  :FIELD             the field or column with the text (text); in JSONL it may hold a conversation,
                     a list of {role, content}, written as the tokenizer's chat template does
  --tokenizer FILE   tokenizer.json, SentencePiece .model or .tiktoken file (bytes)
  --train-bpe N      learn a tokenizer of N ids from the input instead
  --held-out F       share of the documents for evaluation, chosen by their content (0.01)
  --dedup KIND       none, exact or near: which repetitions are dropped (exact)
  --workers N        processes (one per core)
  --min-chars N, --max-chars N        shorter or longer documents are rejected (1, no limit)
  --max-control F, --max-repeated F   also those with a larger share of control characters, or of
                                      text in repeated lines (0.05, 0.5)
  --on-error KIND    fail: stop at the first document that cannot be read; skip: count it (skip)
  --max-bad F        the share of such documents beyond which skip stops, too (0.01)
  --shard-tokens N   longest shard (268M)
  --unit-bytes N     size of a unit of work; a longer text file becomes several documents (4M)

N may end in k, M or G: thousands, millions, billions, so 8k is 8,000.

What was rejected is counted in manifest.json, with samples in rejected.jsonl.

  torus prepare --input notes/ --out data/notes
  torus prepare --input 'crawl/*.jsonl.zst:content' --train-bpe 32k --dedup near --out data/crawl
  zcat dump.gz | torus prepare --input - --tokenizer llama/tokenizer.json --out data/dump
"""
_NUMBERS = {  # default, least, most
    "held-out": (0.01, 0, 0.999), "max-control": (0.05, 0, 1), "max-repeated": (0.5, 0, 1),
    "max-bad": (0.01, 0, 1), "train-bpe": (0, 0, 1 << 24), "min-chars": (1, 0, 1 << 40),
    "max-chars": (0, 0, 1 << 40), "shard-tokens": (1 << 28, 1, 1 << 40),
    "unit-bytes": (4 << 20, 1, 1 << 30), "workers": (os.cpu_count() or 1, 1, 4096),
}  # fmt: skip


def _whole(text: str) -> int:
    """Reads "4096", "32k" (32,000), "100M", "1.5G"."""
    factor = {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:].lower(), 1)
    try:
        return int(float(text[:-1]) * factor) if factor > 1 else int(text)
    except (ValueError, OverflowError):
        reason = f"{text!r} is not a whole number like 4096, 32k (32,000), 100M or 2G"
        raise argparse.ArgumentTypeError(reason) from None


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("prepare")
    parser.add_argument("--input", nargs="+", action="extend", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--dedup", default="exact", choices=("none", "exact", "near"))
    parser.add_argument("--on-error", default="skip", choices=("skip", "fail"))
    for name, (default, _, _) in _NUMBERS.items():
        kind = float if isinstance(default, float) else _whole
        parser.add_argument(f"--{name}", type=kind, default=default)
    args = parser.parse(argv)
    for name, (_, least, most) in _NUMBERS.items():
        if not least <= (value := getattr(args, name.replace("-", "_"))) <= most:
            raise UsageError(f"--{name} {value}: from {least} to {most}")
    args.input = tuple(args.input)
    return args


def main(argv: list[str]) -> int:
    """Writes the dataset; raises UsageError for arguments or inputs that cannot be used."""
    args = _arguments(argv)
    from rich import progress as bars
    from rich.console import Console

    from trainer.data.corpus import FEW_HELD_OUT, HELD_OUT
    from trainer.data.prepare import REJECTED, Progress, Settings, prepare

    with bars.Progress(
        bars.BarColumn(24), bars.DownloadColumn(), bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(), bars.TextColumn("{task.description}"),
        console=Console(file=bare(sys.stderr)), disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)

        def report(now: Progress) -> None:
            text = f"{now.documents:,} documents, {now.tokens:,} tokens"
            total = now.total_bytes or None  # that of standard input is not known
            bar.update(task, completed=now.bytes, total=total, description=text)

        manifest = prepare(Settings(**vars(args)), report)
    facts = manifest.preparation
    print(f"{args.out}: {facts['docs']:,} documents, {facts['tokens']:,} tokens")
    for split in manifest.splits:
        print(f"  {split}: {sum(shard.docs for shard in manifest.split(split)):,} documents")
    for title, counts in (("rejected", facts["rejected"]), ("other files", facts["skipped"])):
        if counts:
            print(f"  {title}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
    if facts["rejected"]:
        print(f"  samples of what was rejected: {args.out / REJECTED}")
    held_out = sum(shard.docs for shard in manifest.split(HELD_OUT))
    flags = f"--config.data.path={args.out} --config.model.vocab={manifest.tokenizer.vocab_size}"
    if held_out < FEW_HELD_OUT:
        print(f"  {held_out} documents are few to evaluate on: a larger --held-out gives more")
    if not held_out:
        flags += " --config.eval.every=0"
    print(f"train on it with {flags}")
    return 0
