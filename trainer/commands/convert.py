"""`torus convert`: checkpoints of other stacks to ours, and ours to theirs."""

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.inflight import MEMORY
from checkpoint.steps import COMMITTED, is_remote
from sharding.config import cache_folder
from sharding.errors import MismatchError, UsageError
from trainer.commands.parser import CommandParser
from trainer.commands.progress import progress
from trainer.terminal import one_line

if TYPE_CHECKING:
    from checkpoint.convert.families import Family
    from checkpoint.convert.moves import Move
    from checkpoint.convert.sources import Source
    from models.config import ModelConfig

USAGE = """\
usage: torus convert SOURCE TARGET [--with-optimizer] [--family NAME|FILE.py] [--step N] [--dtype D]
                     [--like FOLDER] [--shard-size GB] [--max-memory MIB] [--dry-run] [--json]

Converts the parameters of a checkpoint, bit for bit, within a bound of memory. One of SOURCE and
TARGET is a run of ours. Formats are found out or named before the place:

  torus:FOLDER     a run
  hf:FOLDER        Hugging Face: config.json and safetensors
  torch:PLACE      a file of torch.save with a state dict, or a folder with pytorch_model.bin
  dcp:FOLDER       torch.distributed.checkpoint, as of FSDP and torchtitan
  zero:FOLDER      a run of DeepSpeed ZeRO 1, 2 or 3, or one of its steps
  ucp:FOLDER       DeepSpeed's universal checkpoint
  orbax:FOLDER     any tree of arrays of Orbax: an item, a step, or a manager's newest step
  msgpack:FILE     Flax's msgpack, or EasyLM's stream
  megatron:FOLDER  a run of Megatron-LM or megatron-core, or one of its iterations

torus:, hf: and orbax: are read from gs://… and s3://… too, no more of them than is needed; torus:
and hf: are written there, by way of $TORUS_CACHE/converting, which needs room for all of it.

All are read; torus, hf, dcp and ucp are written (TARGET without a format: torus, or hf for a run).
TARGET must not exist: it appears whole, with the tokenizer files, or not at all. Nothing that a
pickle names is ever imported or called.

  --with-optimizer carry Adam's moments and its count of updates too (not hf; ucp always does)
  --family F       model_type, a Python file with a table of your own, or maxtext for a tree of
                   MaxText (from config.json; for a run, the first that can express its model)
  --step N         step of a run (the newest)
  --dtype D        store float32, float16 or bfloat16 weights instead of what the source has
  --like FOLDER    take config.json, where SOURCE has none, tokenizer files and token ids from there
  --shard-size GB  largest file for Hugging Face (5; in a bucket half of --max-memory)
  --max-memory MIB most bytes of tensors in flight; the process holds some 500 MB beside them
                   (what the largest tensor needs and 128)
  --dry-run        check everything, print the plan row by row, write nothing
  --json           print the plan and the result as JSON

Exit status: 2 a wrong command, 3 the source is not what its config or table says (unknown field,
tensor missing, left over or of another shape), 4 a damaged or unsafe file, 5 a bucket that is not
there, refuses access or does not answer, 1 writing failed.

  torus convert ./Llama-3.2-1B torus:./start
  torus train --config=from_run:./start --workdir=runs/a
  torus convert runs/a hf:./out --like ./Llama-3.2-1B
  torus convert ./zero3_run torus:./start --with-optimizer --like ./Llama-3.2-1B
  torus convert orbax:./maxtext/checkpoints torus:./start --family maxtext --like ./Llama-3.1-8B
  torus convert ./megatron_run torus:./start --with-optimizer
  torus convert runs/a dcp:./out --with-optimizer
  torus convert gs://bucket/Llama-3.2-1B gs://bucket/start
"""


_DOING = "converting, verifying"  # each byte counts twice


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("convert")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--family", default="")
    parser.add_argument("--step", type=int)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--like", default="")
    parser.add_argument("--shard-size", type=float)
    parser.add_argument("--with-optimizer", action="store_true")
    parser.add_argument("--max-memory", type=float)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse(argv)
    if args.shard_size is not None and not args.shard_size > 0:
        raise UsageError(f"--shard-size {args.shard_size}: more than 0")
    args.memory = None if args.max_memory is None else int(args.max_memory * 2**20)
    return args


def main(argv: list[str]) -> int:
    """Converts; raises UsageError or one of its kinds before anything is written."""
    from checkpoint.convert.formats import REMOTE, WRITTEN, open_place, split_format

    args = _arguments(argv)
    kind, source = open_place(args.source)
    target_kind, target = split_format(args.target)
    target_kind = target_kind or ("torus" if kind != "torus" else "hf")
    if (kind == "torus") == (target_kind == "torus"):
        raise UsageError(f"{kind} to {target_kind}: one of the two has to be torus")
    if target_kind not in WRITTEN:
        raise UsageError(f"{target_kind} is only read; written are {', '.join(WRITTEN)}")
    if args.with_optimizer and "hf" in (kind, target_kind):
        raise UsageError("--with-optimizer: Hugging Face folders hold no optimizer")
    args.sent = is_remote(target)
    if args.sent and target_kind not in REMOTE:
        raise UsageError(f"{target}: {target_kind} is not written to buckets; torus and hf are")
    from sharding.runtime import keep_freed_memory

    keep_freed_memory()
    todo = partial(_to_ours, args, kind, source)
    if kind == "torus":
        todo = partial(_to_theirs, args, source, target_kind)
    return _send(args, kind, source, target, todo) if args.sent else todo(target)


def _send(
    args: argparse.Namespace, kind: str, source: Path, target: Any, convert: Callable[[Path], int]
) -> int:
    """Converts into a folder of the cache and sends that; what was converted is not done again."""
    from checkpoint import objects
    from checkpoint.convert.formats import find_step
    from checkpoint.convert.huggingface import CONFIG

    objects.check_free(target)
    if args.dry_run:
        return convert(target)
    if kind == "torus":
        steps, step = find_step(source, args.step)
        source = steps / str(step)
    what = json.dumps([sorted(vars(args).items()), objects.state_of(source)])
    local = cache_folder() / "converting" / hashlib.sha256(what.encode()).hexdigest()[:16]
    local /= target.name or target.bucket
    if not local.exists():
        convert(local)
    elif not args.json:
        print(f"converted before, in {local}")
    if kind != "torus":
        (local / "checkpoints/0" / COMMITTED).touch()  # how a step in a bucket is told
    sizes = [path.stat().st_size for path in local.rglob("*") if path.is_file()]
    last = CONFIG if kind == "torus" else COMMITTED
    with progress(f"sending to {target}", 2 * sum(sizes), in_bytes=True) as advance:
        objects.send(local, target, last, advance, args.memory or MEMORY)
    shutil.rmtree(local.parent)
    if not args.json:
        print(f"{target}: {len(sizes)} objects, {sum(sizes):,} bytes, sent and read back")
    return 0


def _read(
    args: argparse.Namespace, kind: str, source: Path
) -> "tuple[Path, dict[str, Any], Family, ModelConfig, Source]":
    """Returns the folder beside a source, its config.json, the table, the model and the tensors."""
    from checkpoint.convert import huggingface, maxtext, megatron
    from checkpoint.convert.families import chosen_family, find_family
    from checkpoint.convert.formats import as_path
    from checkpoint.convert.sources import config_folder, open_source

    beside = config_folder(source) if kind != "hf" else source
    beside = beside or (as_path(args.like) if args.like else source)
    has_config = (beside / huggingface.CONFIG).exists()
    if kind == megatron.NAME and not args.family:
        found = open_source(kind, source)
        if found.described is not None:
            config = huggingface.read_config(beside) if has_config else {}
            model = megatron.read_args(found.described)
            return beside, config, *megatron.adapted(model, found), found
    if kind != "hf" and not has_config:
        raise UsageError(f"{source} has no config.json; name a folder that has one with --like")
    config = huggingface.read_config(beside)
    name = config.get("model_type")
    of_maxtext = args.family == maxtext.NAME
    chosen = args.family and not of_maxtext
    family = chosen_family(args.family) if chosen else find_family(name)
    if name != family.model_type:
        raise MismatchError(f"config.json: model_type = {name!r} is not {family.model_type!r}")
    model = family.read(config)
    found = open_source(kind, source)
    if of_maxtext:
        family, model = maxtext.adapted(family, model)
    elif kind == megatron.NAME and not args.family:
        family, model = megatron.adapted(model, found)
    return beside, config, family, model, found


def _to_ours(args: argparse.Namespace, kind: str, source: Path, target: Path) -> int:
    beside, config, family, model, found = _read(args, kind, source)

    import numpy as np

    from checkpoint.convert import engine, huggingface, moves, native
    from checkpoint.convert.families import FAMILIES
    from checkpoint.convert.fields import NEUTRAL
    from checkpoint.fingerprint import rows_sums
    from checkpoint.storage import try_restore
    from trainer.config import Experiment, to_json

    todo, left = moves.to_ours(found, family, model, args.dtype, optimizer=args.with_optimizer)
    carried = {"step": found.step, **found.optimizer} if args.with_optimizer else None
    memory = max(engine.memory_limit(move.plan, args.memory) for move in todo)
    if args.dry_run:
        return _report(todo, args, left, carried)
    neutral = {k: v for k, v in config.items() if k in NEUTRAL | family.neutral}
    known = family.model_type if args.family or family.model_type in FAMILIES else ""
    meta = {"source": {"format": kind, "family": known, "config": neutral}}
    facts = {
        moves.PREFIXES[m.part] + name: fact for m in todo for name, fact in m.plan.target.items()
    }
    if carried:
        meta["source"]["optimizer"] = carried
        facts[moves.COUNT] = np.dtype(np.int32), ()
    experiment = Experiment(name=target.name, model=model)
    if "betas" in (carried or {}):
        experiment.optimizer.b1, experiment.optimizer.b2 = map(float, carried["betas"])
        experiment.optimizer.eps = float(carried.get("eps", experiment.optimizer.eps))
    bar = progress(_DOING, 2 * sum(m.plan.nbytes for m in todo), in_bytes=True)
    with engine.staged(target) as folder, bar as advance:
        (folder / "experiment.json").write_text(to_json(experiment))
        huggingface.copy_extras(beside, folder / "tokenizer")
        arrays = native.create_step(folder / "checkpoints", 0, facts, meta, prefix="")
        sums, peak = {}, 0
        for move in todo:
            prefix = moves.PREFIXES[move.part]
            below = native.NativeTensors(folder / "checkpoints", 0, prefix, checked=False)
            moved = engine.run(
                move.plan, move.tensors, below, advance, memory,
                fingerprints=True, far=is_remote(source),
            )  # fmt: skip
            sums |= {prefix + name: found_sums for name, found_sums in moved.sums.items()}
            peak = max(peak, moved.in_flight)
        if carried:
            count = np.array(found.step, np.int32)
            arrays.put(moves.COUNT, (), count)
            sums[moves.COUNT] = rows_sums(count, (), 0, ())
        found.close()
        arrays.finish(sums)
        try_restore(folder / "checkpoints", 0)
    return _report(todo, args, left, carried, in_flight=peak)


def _to_theirs(args: argparse.Namespace, source: Path, kind: str, target: Path) -> int:
    from checkpoint.convert.formats import as_path, find_step
    from checkpoint.manifest import read_meta, source_of
    from trainer.run import read_experiment

    model = read_experiment(source).model
    steps, step = find_step(source, args.step)

    from checkpoint.convert import engine, huggingface, moves
    from checkpoint.convert.families import chosen_family, family_of, find_family
    from checkpoint.convert.fields import NEUTRAL
    from checkpoint.convert.sources import PARAMS

    origin = source_of(read_meta(steps, step))
    recorded = origin.get("family")
    if args.family:
        family = chosen_family(args.family)
    else:
        family = find_family(recorded) if recorded else family_of(model)
    config = family.write(model)
    neutral, extras = origin.get("config", {}), source / "tokenizer"
    if args.like:
        extras = as_path(args.like)
        neutral = huggingface.read_config(extras)
    known = (NEUTRAL | family.neutral) - {"dtype"}
    carried_over = {k: v for k, v in neutral.items() if k in known}
    config = family.defaults(model) | carried_over | config
    optimizer = args.with_optimizer or kind == "ucp"
    found = moves.native_source(steps, step, optimizer=optimizer)
    dtype = args.dtype or ("float32" if kind == "ucp" else None)
    todo = moves.to_theirs(found, family, model, dtype)
    plan = todo[0].plan
    memory = max(engine.memory_limit(move.plan, args.memory) for move in todo)
    shard_bytes = _shard_bytes(args, plan)
    config["torch_dtype"] = max((str(d) for d, _ in plan.target.values()), key=_width)
    carried = {"step": found.step} if optimizer else None
    if args.dry_run:
        return _report(todo, args, [], carried)
    run = partial(_run, todo, memory, is_remote(source))
    bar = progress(_DOING, 2 * sum(m.plan.nbytes for m in todo), in_bytes=True)
    with engine.staged(target) as folder, bar as advance:
        huggingface.copy_extras(extras, folder)
        if kind == "hf":
            entries = [(name, *facts) for name, facts in plan.target.items()]
            files = huggingface.create_folder(folder, config, entries, shard_bytes)
            peak = run({PARAMS: files}, advance)
            files.close()
        else:
            (folder / huggingface.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
            writer = _writer(kind, folder, found.step)
            peak = run(writer.parts, advance)
            writer.finish()
    return _report(todo, args, [], carried, in_flight=peak)


def _run(
    todo: "list[Move]",
    memory: int,
    far: bool,
    parts: dict[str, Any],
    advance: Callable[[int], None],
) -> int:
    """Moves everything, checking what is read of ours; returns the most bytes held at once."""
    from checkpoint.convert import engine, native

    peak = 0
    for move in todo:
        reads = native.CheckedReads(move.tensors)
        moved = engine.run(move.plan, reads, parts[move.part], advance, memory, far=far)
        peak = max(peak, moved.in_flight)
        reads.finish()
    return peak


def _writer(kind: str, folder: Path, step: int | None) -> Any:
    if kind == "dcp":
        from checkpoint.convert.torch_dcp import DcpWriter

        return DcpWriter(folder, step)
    from checkpoint.convert.deepspeed import UcpWriter

    return UcpWriter(folder, step)


def _shard_bytes(args: argparse.Namespace, plan: Any) -> int:
    """Returns the largest file for Hugging Face: in a bucket half of the memory, sent as a whole.

    Raises:
      UsageError: --shard-size, or the largest tensor, is more than that.
    """
    if not args.sent:
        return int((args.shard_size or 5) * 1e9)
    largest = max(math.prod(shape) * dtype.itemsize for dtype, shape in plan.target.values())
    room = args.memory // 2 if args.memory else max(MEMORY, largest)
    wanted = int(args.shard_size * 1e9) if args.shard_size else room
    if max(largest, wanted) > room:
        needed = -(-2 * max(largest, wanted) // 2**20)
        raise UsageError(f"files are sent to a bucket as a whole: this needs --max-memory {needed}")
    return wanted


def _width(dtype: str) -> int:
    return int(dtype.removeprefix("bfloat").removeprefix("float"))


def _report(
    moves: "list[Move]", args: argparse.Namespace, left: list[str], carried: dict | None, *,
    in_flight: int = 0,
) -> int:  # fmt: skip
    """Prints what was done, with the most bytes held at once, or, for a dry run, would be."""
    written = not args.dry_run
    plan, plans = moves[0].plan, [move.plan for move in moves]
    casts = plan.casts | {f"{m.part}/{n}": c for m in moves[1:] for n, c in m.plan.casts.items()}
    overflows = {
        (f"{m.part}/" if m is not moves[0] else "") + n: c
        for m in moves for n, c in m.plan.overflows.items() if c
    }  # fmt: skip
    facts = {
        "family": plan.family.model_type, "source": args.source, "target": args.target,
        "written": written, "verified": written, "tensors": sum(len(p.target) for p in plans),
        "bytes": sum(p.nbytes for p in plans), "in_flight": in_flight,
        "casts": casts, "overflows": overflows, "ignored": list(plan.buffers),
        "repeated": [copy for copy, _ in plan.copies], "optimizer": carried, "left": left,
        "rows": [row.text for row in plan.rows],
    }  # fmt: skip
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    if args.dry_run:
        print("\n".join(facts["rows"]))
    for name, cast in casts.items():
        print(one_line(f"cast: {name} {cast}"))
    for name, count in overflows.items():
        where = casts[name]
        print(one_line(f"OVERFLOW: {name}: {count:,} finite values are too large for {where}"))
    for what in ("ignored", "repeated"):
        for name in facts[what]:
            print(one_line(f"{what}: {name}"))
    if left:
        some = ", ".join(left[:4]) + (", …" if len(left) > 4 else "")
        print(one_line(f"left behind: {len(left)} values ({some})"))
    if carried:
        settings = ", ".join(f"{key} {value}" for key, value in carried.items())
        print(one_line(f"moments of Adam: {settings}"))
    done = "would be written"
    if written:
        done = f"written and read back, at most {in_flight / 2**20:.0f} MiB in flight"
    print(f"{facts['family']}: {facts['tensors']} tensors, {facts['bytes']:,} bytes, {done}")
    return 0
