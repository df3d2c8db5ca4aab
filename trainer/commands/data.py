"""`torus data`: looks into datasets, checks them, and moves them from and to other stacks."""

import argparse
import glob
import json
import sys
from pathlib import Path
from typing import Any

from sharding.errors import UsageError, nearest
from trainer.commands.parser import CommandParser
from trainer.commands.progress import progress
from trainer.terminal import bare, printable

USAGE = """\
usage: torus data show   DIR [--split S] [--row N] [--seq-len T]
                         [--collate KIND] [--begin IDS] [--end IDS]
       torus data stats  DIR [--split S] [--seq-len T] [--json]
       torus data verify DIR [--json]
       torus data import [SPLIT=]FILE ... --from FORMAT --tokenizer T --out DIR
                         [--dtype D] [--eot N]
       torus data export DIR --to arrayrecord --out FOLDER

show prints row N as a run reads it: each document in a colour of its own, its positions, and the
padding. stats tells documents, tokens, lengths, exact duplicates, how much of the vocabulary is
used, and how well rows of T fill. verify reads every shard again and lists all that is not as the
manifest says (exit status 1). DIR may be gs://… or s3://… in show and stats.

import makes a dataset of token files of FORMAT, patterns allowed, in the split before the `=`
(train). Every document gets the BOS of the tokenizer unless it begins with it.
  megatron      NAME.bin with NAME.idx
  nanogpt       one flat file of tokens, a document ends with --eot N (the tokenizer's EOS)
  arrayrecord   a document a record, the bytes of its tokens; group_size:1

  --split S        train, val, ... (train)
  --seq-len T      length of a row (512)
  --collate KIND   none, instruction or prefix: with one of these, show counts the tokens that
                   carry loss if config.data.collate has this kind (none) ...
  --begin, --end   ... and these token ids, such as 27,91
  --tokenizer T    what wrote the tokens: `bytes`, a tokenizer.json, .model or .tiktoken file
  --dtype D        of nanogpt and arrayrecord tokens: uint16, uint32 (what the vocabulary needs)

  torus data show data/notes --row 17
  torus data import train=train.bin val=val.bin --from nanogpt --tokenizer gpt2/ --out data/owt
  torus data export data/owt --to arrayrecord --out records
  torus data import 'records/train-*' --from arrayrecord --tokenizer gpt2/ --out data/again
"""
_FORMATS = ("megatron", "nanogpt", "arrayrecord")
_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")


def main(argv: list[str]) -> int:
    """Returns 1 when `verify` found faults; raises UsageError for what cannot be read."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name not in _ACTIONS:
        choices = ", ".join(_ACTIONS)
        raise UsageError(f"torus data: choose {choices}, not {name!r}{nearest(name, _ACTIONS)}")
    options, action = _ACTIONS[name]
    parser = CommandParser(f"data {name}")
    for flags, settings in options:
        parser.add_argument(*flags, **settings)
    return action(parser.parse(rest))


def _show(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    dataset = _open(args)
    row = dataset.row(args.row)
    tokenizer, segments = dataset.tokenizer, row["segment_ids"]
    if fault := dataset.unmatched():
        print(fault, file=sys.stderr)

    def loss(places: Any) -> str:
        count = int((row["targets"][places] >= 0).sum())
        return "" if args.collate == "none" else f", {count} with loss"

    console = Console(file=bare(sys.stdout), highlight=False, soft_wrap=True)
    console.print(
        f"row {args.row:,} of {dataset.rows_per_epoch:,} an epoch, split {args.split}, "
        f"{len(segments)} positions, {int((segments == 0).sum())} of them padding"
        f"{loss(segments > 0)}"
    )
    for segment in sorted({*segments.tolist()} - {0}):
        places = (segments == segment).nonzero()[0]
        first, last = (int(row["positions"][place]) for place in (places[0], places[-1]))
        style = _COLOURS[(segment - 1) % len(_COLOURS)]
        console.print(
            f"--- segment {segment}: columns {places[0]} to {places[-1]}, positions {first} to "
            f"{last}{loss(places)}", style=f"bold {style}",
        )  # fmt: skip
        # The last target belongs to the document too; as a token it would be in no column.
        ids = [*row["tokens"][places].tolist(), *row["targets"][places[-1:]].clip(0).tolist()]
        console.print(Text(printable(tokenizer.decode(ids)), style=style))
    return 0


def _stats(args: argparse.Namespace) -> int:
    from trainer.data.stats import describe

    dataset = _open(args)
    with progress("reading", int(dataset.shards.starts[-1])) as advance:
        found = describe(dataset.shards, dataset.tokenizer, args.seq_len, advance)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    lengths, most = found["lengths"], max(count for *_, count in found["histogram"])
    print(f"documents   {found['documents']:,}, {found['duplicates']:,} exact duplicates")
    print(f"tokens      {found['tokens']:,}, {found['bytes_per_token']:.2f} bytes of text each")
    print(f"vocabulary  {found['ids_used']:,} of {found['vocab_size']:,} ids used; most frequent:")
    for each in found["most_frequent"]:
        print(f"            {each['count']:>13,}  {each['id']:>6}  {each['text']!r}")
    print(
        f"rows of {found['seq_len']:,}  {found['rows_per_epoch']:,}, {found['padding']:.2%} padding"
    )
    print("lengths     " + ", ".join(f"{name} {value:,}" for name, value in lengths.items()))
    for low, high, count in found["histogram"]:
        print(f"  {low:>9,} to {high - 1:>9,} {count:>11,}  {'#' * round(40 * count / most)}")
    return 0


def _local_folder(dataset: str, action: str) -> Path:
    """Returns the folder of a dataset on the disk, the built-in one too."""
    from checkpoint.steps import is_remote
    from trainer.data.corpus import dataset_folder

    if is_remote(dataset):
        raise UsageError(f"{dataset}: {action} reads a local copy, not object storage")
    return dataset_folder(dataset)


def _verify(args: argparse.Namespace) -> int:
    from trainer.data.manifest import read_manifest
    from trainer.data.shards import faults

    folder = _local_folder(args.dataset, "verify")
    manifest = read_manifest(folder)
    total = sum(shard.bytes for shard in manifest.shards)
    with progress("verifying", total) as advance:
        found = list(faults(folder, advance))
    if args.json:
        listed = [{"file": fault.file, "reason": fault.reason} for fault in found]
        print(json.dumps({"shards": len(manifest.shards), "bytes": total, "faults": listed}))
    else:
        for fault in found:
            print(f"FAULT  {fault}")
        print(f"{folder}: {len(manifest.shards)} shards, {total:,} bytes, {len(found)} faults")
    return 1 if found else 0


def _import(args: argparse.Namespace) -> int:
    from trainer.data import foreign
    from trainer.data.tokenizer import open_tokenizer

    if args.format not in _FORMATS:
        raise UsageError(
            f"--from {args.format}: choose {', '.join(_FORMATS)}{nearest(args.format, _FORMATS)}"
        )
    tokenizer = open_tokenizer(args.tokenizer)
    dtype = args.dtype or ("uint16" if tokenizer.spec.vocab_size < 1 << 16 else "uint32")
    eot = tokenizer.spec.eos if args.eot is None else args.eot
    sources = []
    for source in args.source:
        split, found, pattern = source.rpartition("=")
        paths = sorted(glob.glob(str(Path(pattern).expanduser()))) or [pattern]
        for path in map(Path, paths):
            match args.format:
                case "megatron":
                    opened = foreign.open_megatron(path)
                case "nanogpt":
                    opened = foreign.open_nanogpt(path, dtype, eot)
                case _:
                    opened = foreign.open_arrayrecord(path, dtype)
            sources.append((split if found else "train", opened))
    with progress("importing", sum(source.count for _, source in sources)) as advance:
        foreign.import_documents(sources, Path(args.out), tokenizer, advance)
    return _verify(argparse.Namespace(dataset=args.out, json=False))


def _export(args: argparse.Namespace) -> int:
    from trainer.data.foreign import export_arrayrecord
    from trainer.data.manifest import read_manifest

    if args.format != "arrayrecord":
        raise UsageError(f"--to {args.format}: choose arrayrecord")
    folder = _local_folder(args.dataset, "export")
    with progress("exporting", sum(s.docs for s in read_manifest(folder).shards)) as advance:
        export_arrayrecord(folder, Path(args.out), advance)
    print(f"{args.out}: {len(list(Path(args.out).glob('*.array_record')))} files")
    return 0


def _open(args: argparse.Namespace) -> Any:
    from trainer.data.config import CollateConfig, DataConfig
    from trainer.data.dataset import open_dataset

    collate = CollateConfig()
    if getattr(args, "collate", "none") != "none":
        collate = CollateConfig(args.collate, begin=args.begin, end=args.end)
    config = DataConfig(path=args.dataset, seq_len=args.seq_len, collate=collate)
    return open_dataset(config, args.split)


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        reason = f"{text!r} is not token ids like 27,91"
        raise argparse.ArgumentTypeError(reason) from None


def _option(*flags: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, settings


_DATASET = _option("dataset", metavar="DIR")
_OUT = _option("--out", required=True)
_JSON = _option("--json", action="store_true")
_ROWS = (_option("--split", default="train"), _option("--seq-len", type=int, default=512))
_ACTIONS = {
    "show": (
        (
            _DATASET,
            *_ROWS,
            _option("--row", type=int, default=0),
            _option("--collate", choices=("none", "instruction", "prefix"), default="none"),
            _option("--begin", type=_ids, default=()),
            _option("--end", type=_ids, default=()),
        ),
        _show,
    ),
    "stats": ((_DATASET, *_ROWS, _JSON), _stats),
    "verify": ((_DATASET, _JSON), _verify),
    "import": (
        (
            _option("source", nargs="+"),
            _option("--from", dest="format", required=True),
            _option("--tokenizer", required=True),
            _option("--dtype", choices=("uint16", "uint32")),
            _option("--eot", type=int),
            _OUT,
        ),
        _import,
    ),
    "export": ((_DATASET, _option("--to", dest="format", required=True), _OUT), _export),
}
