"""Experiment: the typed tree that a config file returns, its overrides, checks and JSON form.

A config file is Python; `get_config()` returns an `Experiment`. Any leaf is overridden on the
command line (`--config.optimizer.peak_lr=1e-3`). Everything here runs before JAX is imported, so
a mistake is refused at once, in one line, with nothing written.
"""

import contextlib
import dataclasses
import inspect
import json
import runpy
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from checkpoint.config import CheckpointConfig
from checkpoint.config import validate as validate_checkpoint
from models.attention.sequence_plan import Sizes, sequence_plan
from models.config import COMPUTATION, ModelConfig
from sharding.config import AXES, MeshConfig
from sharding.errors import UsageError, nearest
from sharding.fields import FieldError, Fields, convert, field_type, field_types, type_name
from torus import PACKAGES
from trainer.data.config import DataConfig
from trainer.metrics import LogConfig
from trainer.plan.recipe import check_perf
from trainer.recovery.health import HealthConfig

ROOT = Path(__file__).resolve().parent.parent
_BOOLEANS = ("true", "t", "1", "false", "f", "0")


@dataclass
class OptimizerConfig(Fields, at="config.optimizer"):
    """AdamW (arXiv:1711.05101) with warm-up and cosine decay, in the terms of `schedules.py`."""

    peak_lr: float = 3e-4  # highest learning rate, reached after the warm-up
    warmup_steps: int = 100  # steps in which the rate rises from 0, linearly
    schedule: str = "cosine"  # cosine | constant, after the warm-up
    final_lr_fraction: float = 0.1  # of peak_lr, at the last step of a cosine
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # on matrices; norms and biases never decay
    clip_norm: float = 1.0  # of the global gradient; 0 = off
    moment_dtype: str = "float32"  # of the first moment: float32 | bfloat16


@dataclass
class TrainConfig(Fields, at="config.train"):
    """How long, how much at a time, from which seed."""

    steps: int = 1000  # updates in the whole run; the schedule ends here
    batch_size: int = 32  # rows per step over all devices
    accumulation: int = 1  # microbatches per step, each batch_size / accumulation rows
    seed: int = 0  # of the first parameters, 0 to 2**32 - 1
    z_loss: float = 0.0  # weight of log(Z) squared in the loss (arXiv:2204.02311); 0 = none
    init_from: str = ""  # run whose newest parameters are the first ones here; "" = random ones
    self_check: bool = False  # try devices, links and files first; always so under torus launch
    stop_at: int = 0  # stop and save after this step without changing the schedule; 0 = steps


@dataclass
class EvalConfig(Fields, at="config.eval"):
    """Held-out evaluation inside a run."""

    every: int = 200  # steps between evaluations, and one at the end; 0 = never
    batches: int = 0  # of train.batch_size rows; 0 = the whole held-out split


@dataclass
class Experiment(Fields, at="config"):
    """All of one run. Its JSON form is written to the run's folder and is enough to repeat it."""

    name: str = "experiment"  # in titles and records
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    # Compile options: auto | fast | off, then ",xla_NAME=VALUE" or ",-xla_NAME"; see docs/plan.md.
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
        "train.seed": 0, "train.z_loss": 0, "eval.every": 0, "eval.batches": 0,
        "optimizer.warmup_steps": 0, "optimizer.peak_lr": 0, "optimizer.final_lr_fraction": 0,
        "optimizer.b1": 0, "optimizer.b2": 0, "optimizer.eps": 0, "optimizer.weight_decay": 0,
        "optimizer.clip_norm": 0,
    }.items():  # fmt: skip
        if (value := _get(experiment, path)) < least:
            raise UsageError(f"config.{path} = {value}: at least {least}")
    for path, bound in {"train.seed": 2**32, "optimizer.b1": 1, "optimizer.b2": 1}.items():
        if (value := _get(experiment, path)) >= bound:
            raise UsageError(f"config.{path} = {value}: must be below {bound}")
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
    if train.seed >= 1 << 32:
        raise UsageError(f"config.train.seed = {train.seed}: below 2**32")
    if train.stop_at > train.steps:
        raise UsageError(
            f"config.train.stop_at = {train.stop_at} lies beyond config.train.steps = "
            f"{train.steps}, where the schedule ends: raise steps (in a new run), or lower stop_at"
        )
    if optimizer.warmup_steps > train.steps:
        raise UsageError(
            f"config.optimizer.warmup_steps = {optimizer.warmup_steps} exceeds "
            f"config.train.steps = {train.steps}; to stop early on the same schedule, leave steps "
            f"as they are and set config.train.stop_at = {train.steps}"
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


def from_dict(data: Any, cls: type[Fields] = Experiment) -> Any:
    """Builds a config from nested dicts; raises FieldError on a field or type it does not have."""
    if not isinstance(data, dict):
        raise FieldError(f"{cls.at}: {type(data).__name__} found where fields are expected")
    values = dict(data)
    for name, kind in field_types(cls).items():
        if name in data and dataclasses.is_dataclass(kind):
            values[name] = from_dict(data[name], kind)
    return cls(**values)


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
    shipped = _shipped()
    candidates = [Path(name), ROOT / name, *([shipped[name]] if name in shipped else [])]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise UsageError(
            f"no config file {name!r}; shipped: {', '.join(shipped)}"
            f"{nearest(Path(name).stem, shipped)}"
        )
    return _run_config(path, argument)


def load_shipped(reference: str) -> Experiment:
    """Returns the experiment of a shipped config that a file names: never that of another path.

    Raises:
      UsageError: no such config is shipped.
    """
    name, _, argument = reference.partition(":")
    if (path := _shipped().get(name)) is None:
        raise UsageError(f"no config {name!r} is shipped{nearest(name, _shipped())}")
    return _run_config(path, argument)


def _shipped() -> dict[str, Path]:
    return {p.stem: p for p in sorted((ROOT / "configs").glob("*.py")) if p.stem != "__init__"}


def _run_config(path: Path, argument: str) -> Experiment:
    try:
        experiment = _call(path, argument)
    except FieldError as error:
        raise UsageError(f"{path}{_line(path, error)}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"get_config() of {path} returned {type(experiment).__name__}, not an Experiment"
        )
    return experiment


def _call(path: Path, argument: str) -> Any:
    """Runs a config file; what goes wrong in it keeps its traceback, which names its lines."""
    get_config = _run(path).get("get_config")
    if not callable(get_config):
        raise UsageError(f"{path} has no function get_config()")
    if not argument:
        return get_config()
    if not inspect.signature(get_config).parameters:
        raise UsageError(f"get_config() of {path} takes no argument, got {argument!r}")
    return get_config(argument)


def _line(path: Path, error: BaseException) -> str:
    """Returns " line N" for the line of the file that the error came through last."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f" line {lines[-1]}" if lines else ""


def _run(path: Path) -> dict[str, Any]:
    """Runs a config file, which may import modules that lie beside it; these are found last."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return runpy.run_path(str(path))
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        raise UsageError(
            f"{path}: {error}; `{package}` is a package of Torus, so yours needs another name"
        ) from error


def parse_flags(argv: Sequence[str], **extra: str) -> tuple[Experiment, dict[str, str]]:
    """Parses `--config=FILE --config.a.b=value` and the string flags named in `extra`.

    Returns the checked experiment, and the other flags' values ("" when not given).

    Raises:
      UsageError: unknown flag or field, value of a wrong type, missing file, failed check.
    """
    argv = joined(argv)
    references = [a.partition("=")[2] for a in argv if a.startswith("--config=")]
    argv = [_checked(a, extra) for a in argv if not a.startswith("--config=")]
    if not references:
        raise UsageError("--config=FILE is missing; try --config=quickstart")
    values = flags.FlagValues()
    config_flags.DEFINE_config_dataclass(
        "config", load_config(references[-1]), flag_values=values, sys_argv=argv
    )
    for name, text in extra.items():
        flags.DEFINE_string(name, "", text, flag_values=values)
    try:
        values(["torus", *argv])
        experiment = values["config"].value
    except (flags.Error, ValueError) as error:  # a tuple that Python does not read, for one
        raise UsageError(" ".join(str(error).split())) from error
    validate(experiment)
    return experiment, {name: values[name].value for name in extra}


def joined(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with `--name value` written as `--name=value`."""
    found: list[str] = []
    for argument in argv:
        flag = found[-1].removeprefix("--") if found else ""
        if argument.startswith("--") or not found or "=" in flag or not found[-1].startswith("--"):
            found.append(argument)
        elif flag.startswith("config.") and _flag_type(flag) is bool:
            found.append(argument)  # a switch: what follows is not its value
        else:
            found[-1] += f"={argument}"
    return found


def _flag_type(flag: str) -> Any:
    """Returns the type of `config.a.b`; raises FieldError for a part that does not exist."""
    kind: Any = Experiment
    path = "config"
    for part in flag.split(".")[1:]:
        if not dataclasses.is_dataclass(kind):
            raise FieldError(f"no field {part!r} in {path}, which is a value, not a group")
        kind, path = field_type(kind, part), f"{path}.{part}"
    return kind


def _checked(argument: str, extra: Iterable[str]) -> str:
    """Returns one flag as absl reads it, after refusing what it would refuse less clearly."""
    name, given, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--"):
        raise UsageError(f"unexpected argument {argument!r}; options start with --")
    if not name.startswith("config."):
        if name not in extra:
            known = ["config", *extra]
            raise UsageError(
                f"unknown flag --{name}; known: {', '.join('--' + n for n in known)}"
                f"{nearest(name, known)}"
            )
        if not given:
            raise UsageError(f"--{name} needs a value: --{name}=VALUE")
        return argument
    kind = _flag_type(name)
    if dataclasses.is_dataclass(kind):
        fields = ", ".join(field_types(kind))
        raise UsageError(f"{name} is a group of fields ({fields}), not a value")
    if kind is bool:
        if given and text.lower() not in _BOOLEANS:
            raise UsageError(f"{argument}: {text!r} is not of type bool; write true or false")
        return argument
    if not given:
        raise UsageError(f"{argument} needs a value: {argument}={type_name(kind)}")
    if kind not in (int, float):
        return argument
    return f"--{name}={convert(name, _literal(text), kind)}"


def _literal(text: str) -> int | float | str:
    """Returns the number that a flag gives, such as 1e3, or the text that is none."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
