"""`torus convert`: checkpoints of other stacks to ours, and ours to theirs."""

import argparse
import ctypes
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.errors import MismatchError, UsageError
from trainer.commands.parser import CommandParser
from trainer.commands.progress import progress

if TYPE_CHECKING:
    from checkpoint.convert.engine import Plan

HELP = "bring weights in from Hugging Face, and take them back"
USAGE = """\
usage: torus convert SOURCE TARGET [--family NAME|FILE.py] [--step N] [--dtype D] [--like FOLDER]
                     [--shard-size GB] [--max-memory MIB] [--dry-run] [--json]

Converts the parameters of a checkpoint, bit for bit, within a bound of memory. SOURCE and TARGET
are `hf:FOLDER` (config.json and safetensors) or `torus:FOLDER` (a run); without a prefix the format
of SOURCE is found out, and TARGET takes the other one. TARGET must not exist: it appears whole,
with the tokenizer files, or not at all.

  --family F       model_type, or a Python file with a table of your own (from config.json; for a
                   run, the first family that can express its model)
  --step N         step of a run (the newest)
  --dtype D        store float32, float16 or bfloat16 instead of what the source has
  --like FOLDER    take tokenizer files, token ids and the rest of config.json from this folder
  --shard-size GB  largest file for Hugging Face (5)
  --max-memory MIB most bytes of tensors in flight; the process holds some 500 MB beside them
                   (256, or what the largest tensor needs)
  --dry-run        check everything, print the plan row by row, write nothing
  --json           print the plan and the result as JSON

Exit status: 2 a wrong command, 3 the source is not what its config or table says (unknown field,
tensor missing, left over or of another shape), 4 a damaged or unsafe file, 1 writing failed.

  torus convert ./Llama-3.2-1B torus:./start
  torus train --config=from_run:./start --workdir=runs/a
  torus convert runs/a hf:./out --like ./Llama-3.2-1B
"""


_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # of malloc.h
_DOING = "converting, verifying"  # each byte counts twice


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("convert")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--family", default="")
    parser.add_argument("--step", type=int)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--like", default="")
    parser.add_argument("--shard-size", type=float, default=5.0)
    parser.add_argument("--max-memory", type=float)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse(argv)
    if not args.shard_size > 0:
        raise UsageError(f"--shard-size {args.shard_size}: more than 0")
    args.memory = None if args.max_memory is None else int(args.max_memory * 2**20)
    return args


def main(argv: list[str]) -> int:
    """Converts; raises UsageError or one of its kinds before anything is written."""
    from checkpoint.convert.formats import open_place, split_format

    args = _arguments(argv)
    kind, source = open_place(args.source)
    target_kind, target = split_format(args.target)
    target_kind = target_kind or ("torus" if kind != "torus" else "hf")
    if (kind == "torus") == (target_kind == "torus"):
        raise UsageError(f"{kind} to {target_kind}: one of the two has to be torus")
    _keep_freed_memory()
    return (_to_theirs if kind == "torus" else _to_ours)(args, source, target)


def _keep_freed_memory() -> None:
    """Has glibc keep large blocks that are freed: asking for them anew costs more than copying."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, 2**30), (_ARENA_MAX, 1)):
            mallopt(option, value)


def _to_ours(args: argparse.Namespace, source: Path, target: Path) -> int:
    from checkpoint.convert import huggingface
    from checkpoint.convert.families import find_family

    config = huggingface.read_config(source)
    name = config.get("model_type")
    family = find_family(args.family or str(name))
    if name != family.model_type:
        raise MismatchError(f"config.json: model_type = {name!r} is not {family.model_type!r}")
    model = family.read(config)
    stored = huggingface.find_tensors(source)

    from checkpoint.convert import engine, native
    from checkpoint.convert.fields import NEUTRAL
    from checkpoint.convert.safetensors import Tensors
    from trainer.config import Experiment, to_json

    facts = {name: (t.dtype, t.shape) for name, t in stored.items()}
    plan = engine.plan_to_ours(family, model, facts, args.dtype)
    memory = engine.memory_limit(plan, args.memory)
    if args.dry_run:
        return _report(plan, args)
    neutral = {k: v for k, v in config.items() if k in NEUTRAL | family.neutral}
    meta = {"source": {"format": "hf", "family": family.model_type, "config": neutral}}
    experiment = Experiment(name=target.name, model=model)
    bar = progress(_DOING, 2 * plan.nbytes, in_bytes=True)
    with engine.staged(target) as folder, bar as advance:
        (folder / "experiment.json").write_text(to_json(experiment))
        huggingface.copy_extras(source, folder / "tokenizer")
        arrays = native.create_step(folder / "checkpoints", 0, plan.target, meta)
        tensors = Tensors(stored)
        moved = engine.run(plan, tensors, arrays, advance, memory)
        tensors.close()
        arrays.finish(moved.sums)
    return _report(plan, args, in_flight=moved.in_flight)


def _to_theirs(args: argparse.Namespace, source: Path, target: Path) -> int:
    from checkpoint.convert.formats import find_step
    from checkpoint.manifest import read_meta
    from trainer.run import read_experiment

    model = read_experiment(source).model
    steps, step = find_step(source, args.step)

    from checkpoint.convert import engine, huggingface, native
    from checkpoint.convert.families import family_of, find_family
    from checkpoint.convert.fields import NEUTRAL

    origin = read_meta(steps, step).get("source", {})
    named = args.family or origin.get("family", "")
    family = find_family(named) if named else family_of(model)
    config = family.write(model)
    neutral, extras = origin.get("config", {}), source / "tokenizer"
    if args.like:
        extras = Path(args.like)
        neutral = huggingface.read_config(extras)
    known = (NEUTRAL | family.neutral) - {"dtype"}
    config = {k: v for k, v in neutral.items() if k in known} | config
    tensors = native.NativeTensors(steps, step)
    plan = engine.plan_to_theirs(family, model, tensors.facts, args.dtype)
    memory = engine.memory_limit(plan, args.memory)
    config["torch_dtype"] = max((str(d) for d, _ in plan.target.values()), key=_width)
    if args.dry_run:
        return _report(plan, args)
    bar = progress(_DOING, 2 * plan.nbytes, in_bytes=True)
    with engine.staged(target) as folder, bar as advance:
        huggingface.copy_extras(extras, folder)
        entries = [(name, *facts) for name, facts in plan.target.items()]
        files = huggingface.create_folder(folder, config, entries, int(args.shard_size * 1e9))
        reads = native.CheckedReads(tensors)
        moved = engine.run(plan, reads, files, advance, memory)
        reads.finish()
        files.close()
    return _report(plan, args, in_flight=moved.in_flight)


def _width(dtype: str) -> int:
    return int(dtype.removeprefix("bfloat").removeprefix("float"))


def _report(plan: "Plan", args: argparse.Namespace, *, in_flight: int = 0) -> int:
    """Prints what was done, with the most bytes held at once, or, for a dry run, would be."""
    written = not args.dry_run
    facts = {
        "family": plan.family.model_type, "source": args.source, "target": args.target,
        "written": written, "verified": written, "tensors": len(plan.target),
        "bytes": plan.nbytes, "in_flight": in_flight,
        "casts": plan.casts, "ignored": list(plan.buffers),
        "repeated": [copy for copy, _ in plan.copies],
        "rows": [row.text for row in plan.rows],
    }  # fmt: skip
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    if args.dry_run:
        print("\n".join(facts["rows"]))
    for name, cast in plan.casts.items():
        print(f"cast: {name} {cast}")
    for what in ("ignored", "repeated"):
        for name in facts[what]:
            print(f"{what}: {name}")
    done = "would be written"
    if written:
        done = f"written and read back, at most {in_flight / 2**20:.0f} MiB in flight"
    print(f"{plan.family.model_type}: {len(plan.target)} tensors, {plan.nbytes:,} bytes, {done}")
    return 0
