"""Experiment: the typed tree that a config file returns, its overrides, checks and JSON form.

A config file is Python; `get_config()` returns an `Experiment`. Any leaf is overridden on the
command line (`--config.optimizer.peak_lr=1e-3`). Everything here runs before JAX is imported, so
a mistake is refused at once, in one line, with nothing written.
"""

import dataclasses
import json
import re
import runpy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from absl import flags
from ml_collections import config_flags

from checkpoint.config import CheckpointConfig
from checkpoint.config import validate as validate_checkpoint
from models.attention.sequence_plan import Sizes, sequence_plan
from models.config import COMPUTATION, ModelConfig
from sharding.config import AXES, MeshConfig
from sharding.errors import UsageError, nearest
from trainer.data.config import DataConfig
from trainer.metrics import LogConfig
from trainer.plan.recipe import check_perf
from trainer.recovery.health import HealthConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) with warm-up and cosine decay, in the terms of `schedules.py`."""

    peak_lr: float = 3e-4
    warmup_steps: int = 100
    schedule: str = "cosine"  # cosine | constant, after the warm-up
    final_lr_fraction: float = 0.1  # of peak_lr, at the last step of a cosine
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms and biases never decay
    clip_norm: float = 1.0  # of the global gradient; 0 = off
    moment_dtype: str = "float32"  # of the first moment: float32 | bfloat16


@dataclass
class TrainConfig:
    """How long, how much at a time, from which seed."""

    steps: int = 1000
    batch_size: int = 32  # rows per step over all devices
    accumulation: int = 1  # microbatches per step, each batch_size / accumulation rows
    seed: int = 0
    z_loss: float = 0.0
    init_from: str = ""  # run whose newest parameters are the first ones here; "" = random ones
    self_check: bool = False  # try devices, links and files first; always so under torus launch
    stop_at: int = 0  # stop and save after this step without changing the schedule; 0 = steps


@dataclass
class EvalConfig:
    """Held-out evaluation inside a run."""

    every: int = 200  # steps between evaluations, and one at the end; 0 = never
    batches: int = 0  # of train.batch_size rows; 0 = the whole held-out split


@dataclass
class Experiment:
    """All of one run. Its JSON form is written to the run's folder and is enough to repeat it."""

    name: str = "experiment"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    # auto | fast | off, then ",xla_NAME=VALUE" or ",-xla_NAME": trainer/plan/recipe.py
    perf: str = "auto"


# Fields that a resumed run may change: they alter speed, place or reporting, not the experiment.
FREE = (
    "mesh", "eval", "checkpoint", "log", "health", "name", "perf", "train.stop_at",
    "train.accumulation", "train.self_check", "data.prefetch", "data.allow_change", "data.path",
    "data.mixture", "data.remote",
    *(f"model.{f}" for f in COMPUTATION),
)  # fmt: skip


# ---------------------------------------------------------------- checks


def validate(experiment: Experiment) -> None:
    """Checks each part and the parts against one another; raises UsageError on the first fault."""
    model, data = experiment.model, experiment.data
    train, optimizer = experiment.train, experiment.optimizer
    model.validate()
    experiment.mesh.validate()
    data.validate()
    experiment.log.validate()
    experiment.health.validate()
    check_perf(experiment.perf)
    validate_checkpoint(experiment.checkpoint)
    for path, choices in {
        "optimizer.schedule": ("cosine", "constant"),
        "optimizer.moment_dtype": ("float32", "bfloat16"),
    }.items():
        value = _get(experiment, path)
        if value not in choices:
            raise UsageError(
                f"config.{path} = {value!r}: choose {', '.join(choices)}{nearest(value, choices)}"
            )
    for path, least in {
        "train.steps": 1, "train.batch_size": 1, "train.accumulation": 1, "train.stop_at": 0,
        "eval.every": 0, "eval.batches": 0, "optimizer.warmup_steps": 0, "optimizer.peak_lr": 0,
        "optimizer.clip_norm": 0,
    }.items():  # fmt: skip
        if (value := _get(experiment, path)) < least:
            raise UsageError(f"config.{path} = {value}: at least {least}")
    if train.batch_size % train.accumulation:
        raise UsageError(
            f"config.train.batch_size = {train.batch_size} does not divide into "
            f"config.train.accumulation = {train.accumulation} microbatches"
        )
    if data.seq_len > model.max_length:
        raise UsageError(
            f"config.data.seq_len = {data.seq_len} is longer than config.model.max_length = "
            f"{model.max_length}"
        )
    if optimizer.warmup_steps > train.steps:
        raise UsageError(
            f"config.optimizer.warmup_steps = {optimizer.warmup_steps} exceeds "
            f"config.train.steps = {train.steps}"
        )
    # An axis of -1 is not known yet: the loop checks again once the devices are.
    check_sizes(experiment, {axis: max(getattr(experiment.mesh, axis), 1) for axis in AXES})


def check_sizes(experiment: Experiment, sizes: dict[str, int]) -> None:
    """Checks that batch, sequence, heads, MLP and vocabulary divide over the mesh axes `sizes`.

    Raises:
      UsageError: naming the field, its value, the axis and the axis size; or why the strategy
        asked for cannot spread attention over seq.
    """
    model, train = experiment.model, experiment.train
    rows = train.batch_size // train.accumulation
    shards = sizes["data"] * sizes["fsdp"]
    if rows % shards:
        micro = f" / accumulation {train.accumulation}" if train.accumulation > 1 else ""
        raise UsageError(
            f"config.train.batch_size = {train.batch_size}{micro} does not divide over data × fsdp "
            f"= {sizes['data']} × {sizes['fsdp']} devices; the next multiple is "
            f"{-(-rows // shards) * shards * train.accumulation}"
        )
    for length in experiment.data.buckets:
        micro = experiment.data.rows_per_step(length, train.batch_size) / train.accumulation
        if micro % shards:
            raise UsageError(
                f"config.data.buckets: {micro:g} rows of {length} in a microbatch do not divide "
                f"over data × fsdp = {shards} devices"
            )
    tensor = sizes["tensor"]
    for name, value, axis in (
        *(("data.buckets", length, "seq") for length in experiment.data.buckets),
        ("data.seq_len", experiment.data.seq_len, "seq"),
        ("model.heads", model.heads, "tensor"),
        # Fewer KV heads than devices are on all of them: sharding/rules.py.
        ("model.kv_heads", max(model.kv_heads, 0 if tensor % model.kv_heads else tensor), "tensor"),
        ("model.mlp", model.mlp, "tensor"),
        ("model.padded_vocab", model.padded_vocab, "tensor"),
    ):
        if value % sizes[axis]:
            raise UsageError(
                f"config.{name} = {value} does not divide over mesh axis {axis} = {sizes[axis]}"
            )
    if experiment.data.collate.kind == "prefix" and sizes["seq"] > 1:
        raise UsageError(
            f"config.data.collate.kind = 'prefix' needs rows on one device, mesh axis seq = "
            f"{sizes['seq']}"
        )
    sequence_plan(model, Sizes.of(model, sizes, experiment.data.seq_len, chip=None))


# ---------------------------------------------------------------- trees, JSON, differences


def _get(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = getattr(tree, part)
    return tree


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("model.rope.theta", value) for every leaf of a dataclass tree."""
    for f in dataclasses.fields(tree):
        value, path = getattr(tree, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, path + ".")
        else:
            yield path, value


def to_json(experiment: Experiment) -> str:
    return json.dumps(dataclasses.asdict(experiment), indent=2) + "\n"


def from_dict(data: dict, cls: type = Experiment) -> Any:
    """Builds a dataclass tree from nested dicts; raises UsageError on a field it does not know."""
    hints = get_type_hints(cls)
    if unknown := set(data) - set(hints):
        name = sorted(unknown)[0]
        raise UsageError(f"{cls.__name__} has no field {name!r}{nearest(name, hints)}")

    def value(name: str, raw: Any) -> Any:
        if dataclasses.is_dataclass(hints[name]):
            return from_dict(raw, hints[name])
        return _tuples(raw)

    return cls(**{name: value(name, raw) for name, raw in data.items()})


def _tuples(raw: Any) -> Any:
    """Returns JSON lists as the tuples they were."""
    return tuple(map(_tuples, raw)) if isinstance(raw, list) else raw


def differences(old: Experiment, new: Experiment) -> list[str]:
    """Returns "field: old → new" for every field that makes `new` another experiment than `old`."""
    before = dict(leaves(old))
    return [
        f"config.{path}: {before.get(path)!r} → {value!r}"
        for path, value in leaves(new)
        if before.get(path) != value
        and not any(path == f or path.startswith(f + ".") for f in FREE)
    ]


# ---------------------------------------------------------------- loading


def load_config(reference: str) -> Experiment:
    """Returns the experiment of a config: a path, a path in the package, or a shipped name.

    A part after ":" is handed to `get_config` as its argument: `ladder:100m`.

    Raises:
      UsageError: there is no such file, or it does not return an Experiment.
    """
    name, _, argument = reference.partition(":")
    shipped = {p.stem: p for p in sorted((ROOT / "configs").glob("*.py")) if p.stem != "__init__"}
    candidates = [Path(name), ROOT / name, *([shipped[name]] if name in shipped else [])]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise UsageError(
            f"no config file {name!r}; shipped: {', '.join(shipped)}"
            f"{nearest(Path(name).stem, shipped)}"
        )
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise UsageError(f"{path} has no function get_config()")
    experiment = get_config(argument) if argument else get_config()
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"get_config() of {path} returned {type(experiment).__name__}, not an Experiment"
        )
    return experiment


def parse_flags(argv: Sequence[str], **extra: str) -> tuple[Experiment, dict[str, str]]:
    """Parses `--config=FILE --config.a.b=value` and the string flags named in `extra`.

    Returns the checked experiment, and the other flags' values ("" when not given).

    Raises:
      UsageError: unknown flag or field, value of a wrong type, missing file, failed check.
    """
    references = [a.partition("=")[2] for a in argv if a.startswith("--config=")]
    argv = [a for a in argv if not a.startswith("--config=")]
    if not references:
        raise UsageError("--config=FILE is missing; try --config=quickstart")
    experiment = load_config(references[-1])
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dataclass(
            "config", experiment, flag_values=values, sys_argv=argv
        )
        for name, text in extra.items():
            flags.DEFINE_string(name, "", text, flag_values=values)
        rest = values(["torus", *argv])[1:]
        experiment = values["config"].value
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        if name.startswith("config."):
            _field_type(name)
            raise UsageError(f"{name} cannot be set from the command line") from error
        raise UsageError(
            f"unknown flag --{name}; known: --config, {', '.join('--' + n for n in extra)}"
            f"{nearest(name, extra)}"
        ) from error
    except (KeyError, AttributeError, TypeError, ValueError, flags.Error) as error:
        raise UsageError(_bad_override(argv, error)) from error
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}; options start with --")
    validate(experiment)
    return experiment, {name: values[name].value for name in extra}


def _field_type(flag: str) -> Any:
    """Returns the type of field `config.a.b`; raises UsageError for a part that does not exist."""
    tree: Any = Experiment
    path = "config"
    for part in flag.split(".")[1:]:
        hints = get_type_hints(tree) if dataclasses.is_dataclass(tree) else {}
        if part not in hints:
            known = ", ".join(hints) or "none, it is a value"
            raise UsageError(f"no field {part!r} in {path} (fields: {known}){nearest(part, hints)}")
        path, tree = f"{path}.{part}", hints[part]
    return tree


def _bad_override(argv: Sequence[str], error: Exception) -> str:
    """Finds the override whose value does not fit its field; else repeats the error in one line."""
    for argument in argv:
        match = re.match(r"--(config\.[\w.]+)=(.*)$", argument, re.DOTALL)
        if not match:
            continue
        flag, text = match.groups()
        tree = _field_type(flag)
        if dataclasses.is_dataclass(tree):
            return f"{flag} is a group of fields ({', '.join(get_type_hints(tree))}), not a value"
        if not _parses(text, tree):
            name = getattr(tree, "__name__", str(tree)) if not get_args(tree) else str(tree)
            return f"--{flag}={text}: {text!r} is not of type {name}"
    return " ".join(str(error).split())


def _parses(text: str, kind: type) -> bool:
    try:
        if kind is bool:
            return text.lower() in ("true", "false", "1", "0", "t", "f")
        if kind in (int, float):
            kind(text)
    except ValueError:
        return False
    return True
