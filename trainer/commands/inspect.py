"""`torus inspect`: what a checkpoint holds, read without model code, JAX or the arrays."""

import json
import math
from pathlib import Path
from typing import Any

from trainer.commands.parser import CommandParser
from trainer.terminal import one_line

USAGE = """\
usage: torus inspect PATH [--step N] [--json]

Lists every array of a checkpoint with its dtype, shape and bytes, and what the checkpoint says
about itself. PATH is a run, a folder of steps, one step, a Hugging Face folder, a .safetensors
file, or what torch, DeepSpeed, Megatron, Orbax or Flax wrote (see `torus convert --help`); moments
of Adam are called mu/… and nu/…. Only headers and manifests are read, also of gs://… and s3://….

  torus inspect runs/a
  torus inspect runs/a --step 350 --json
  torus inspect ./Llama-3.2-1B
"""


def main(argv: list[str]) -> int:
    """Prints the list; raises UsageError for what is not a checkpoint, or a damaged one."""
    from checkpoint.convert.formats import open_place

    parser = CommandParser("inspect")
    parser.add_argument("path")
    parser.add_argument("--step", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse(argv)
    kind, path = open_place(args.path)
    facts = _ours(path, args.step) if kind == "torus" else _theirs(kind, path)
    facts = {"path": str(path), "format": kind} | facts
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    arrays = facts.pop("arrays")
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(one_line(f"{name:<12} {text}"))
    arrays = {one_line(name): array for name, array in arrays.items()}
    width = max(map(len, arrays), default=0)
    total = 0
    for name, array in sorted(arrays.items()):
        size = math.prod(array["shape"]) * _itemsize(array["dtype"])
        total += size
        print(f"{name:<{width}}  {array['dtype']:<9} {array['shape']!s:<24} {size:>16,}")
    print(f"{len(arrays)} arrays, {total:,} bytes")
    return 0


def _ours(path: Path, step: int | None) -> dict[str, Any]:
    from checkpoint.convert.formats import find_step
    from checkpoint.manifest import read_manifest, read_meta, source_of
    from checkpoint.steps import complete_steps, interrupted_saves

    folder, step = find_step(path, step)
    manifest, meta = read_manifest(folder, step), read_meta(folder, step)
    known = {k: v for k, v in manifest.items() if isinstance(v, str | int)}
    facts = {"step": step, "steps": complete_steps(folder), "saved": manifest["saved"],
             "manifest": known, "interrupted": interrupted_saves(folder)}  # fmt: skip
    experiment = meta.get("experiment")
    model = experiment.get("model") if isinstance(experiment, dict) else None
    if isinstance(model, dict) and model:
        facts["model"] = {k: model[k] for k in ("layers", "width", "heads", "vocab") if k in model}
    if source := source_of(meta):
        facts["converted"] = f"from {source.get('format', '?')} {source.get('family', '')}"
    return facts | {"arrays": manifest["arrays"]}


def _theirs(kind: str, path: Path) -> dict[str, Any]:
    if kind != "hf":
        return _of_torch(kind, path)
    from checkpoint.convert import huggingface
    from checkpoint.convert.safetensors import read_header

    facts: dict[str, Any] = {}
    if path.is_dir():
        stored = huggingface.find_tensors(path)
        if (path / huggingface.CONFIG).exists():
            config = huggingface.read_config(path)
            for name in ("model_type", "architectures", "transformers_version"):
                if name in config:
                    facts[name] = config[name]
    else:
        stored, facts["metadata"] = read_header(path)
    facts["files"] = len({tensor.file for tensor in stored.values()})
    arrays = {n: {"shape": list(t.shape), "dtype": str(t.dtype)} for n, t in stored.items()}
    return facts | {"arrays": arrays}


def _of_torch(kind: str, path: Path) -> dict[str, Any]:
    from checkpoint.convert.sources import open_source

    found = open_source(kind, path)
    facts: dict[str, Any] = {} if found.step is None else {"step": found.step}
    if found.optimizer:
        facts["optimizer"] = [f"{key} {value}" for key, value in found.optimizer.items()]
    if found.left:
        facts["also"] = found.left[:8]
    arrays = {n: {"shape": list(s), "dtype": str(d)} for n, (d, s) in found.facts.items()}
    return facts | {"arrays": arrays}


def _itemsize(dtype: str) -> int:
    import ml_dtypes  # gives numpy the names bfloat16 and float8
    import numpy as np

    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
