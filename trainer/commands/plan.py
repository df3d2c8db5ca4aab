"""`torus plan`: whether a config fits a TPU slice, asked of the compiler before anything is paid.

The compiler runs in a process of its own (trainer/plan.py as a module): it needs another
environment than a command has, takes minutes in which Ctrl-C must still work, and may crash.
Everything that can be refused without it is refused before it starts.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from sharding.errors import UsageError
from sharding.hardware import CHIPS
from sharding.topology import Slice, compiler_environment, parse_slice, require_libtpu
from trainer.config import ROOT, Experiment, check_sizes, parse_flags
from trainer.console import format_duration

USAGE = """\
usage: torus plan --config=CONFIG --on=SLICE [--config.PATH=VALUE ...] [--json]

Compiles the train step of CONFIG ahead of time for a TPU slice that need not be there, on this
machine's CPU, and prints the memory that the compiler gives each chip. A config that fits takes one
to three minutes, one that does not is refused in seconds, with how much it lacks. Needs libtpu:
pip install 'torus-train[aot]'.

  torus plan --config=llama3_8b --on=v5e-256
  torus plan --config=llama3_8b --on=v5p-128 --config.mesh.tensor=4
  torus plan --config=gemma3_1b --on=v6e-16 --config.model.remat=attention,residual

SLICE is a name of the cloud's: v5e-256 and v6e-256 count chips; v4-128, v5p-128 and tpu7x-128
count cores, two a chip. Other shapes are written v5p:4x4x12, several slices 2xv5e-256.

--json prints the plan as one JSON object, sizes in bytes per device.
Exit status: 0 it fits, 1 it does not, 2 a mistake in the command, 3 the compiler failed.
"""

_GIB = 2.0**30


def main(argv: list[str]) -> int:
    """Returns 0 when the config fits, 1 when it does not, 3 when the compiler failed."""
    as_json = "--json" in argv
    experiment, flags = parse_flags(
        [a for a in argv if a != "--json"], on="TPU slice to plan for, as v5e-256"
    )
    if not flags["on"]:
        raise UsageError("--on=SLICE is missing; try --on=v5e-256")
    target = parse_slice(flags["on"])
    check_sizes(experiment, experiment.mesh.sizes(target.devices))
    require_libtpu()

    status, plan, log = _compile(experiment, target)
    if plan is None:
        print(log.rstrip(), file=sys.stderr)
        print(f"torus: error: compiling failed with status {status}", file=sys.stderr)
        return 3
    if "refused" in plan:
        raise UsageError(plan["refused"])
    print(json.dumps(plan, indent=2) if as_json else format_plan(plan, experiment, target))
    return 0 if plan["fits"] else 1


def _compile(experiment: Experiment, target: Slice) -> tuple[int, dict[str, Any] | None, str]:
    """Runs trainer.plan; returns its exit status, its answer (None when it failed), its log."""
    environment = {**os.environ, **compiler_environment()}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    request = {"experiment": dataclasses.asdict(experiment), "slice": target.name}
    with (
        _spinner(f"compiling {experiment.name} for {target.name}"),
        subprocess.Popen(
            [sys.executable, "-m", "trainer.plan"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process,
    ):
        try:
            answer, log = process.communicate(json.dumps(request))
        finally:
            process.kill()  # an interrupted compilation would run to its end first
    if process.returncode:
        return process.returncode, None, log
    return 0, json.loads(answer.splitlines()[-1]), log


@contextlib.contextmanager
def _spinner(text: str) -> Iterator[None]:
    """Shows on a terminal that something goes on, and for how long; else one line."""
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        print(f"{text}; a config that fits takes some minutes", file=sys.stderr, flush=True)
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True) as progress:
        terminal.show_cursor(True)  # a kill must not leave the terminal without one
        progress.add_task(text, total=None)
        yield


def format_plan(plan: dict[str, Any], experiment: Experiment, target: Slice) -> str:
    """Returns the screen of a plan (`Plan.to_json`), without a line end."""
    unit = "chip" if CHIPS[target.chip].devices_per_chip == 1 else "core"
    model, train = experiment.model, experiment.train
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    micro = f" in {train.accumulation} microbatches" if train.accumulation > 1 else ""
    shape = "x".join(map(str, target.shape))
    lines = [
        f"{plan['config']} on {plan['slice']} ({plan['chips']:,} chips, {shape})",
        f"  mesh        {axes or 'one device'}; zero {experiment.mesh.zero}, remat {model.remat}",
        f"  parameters  {plan['parameters']:,}",
        f"  batch       {train.batch_size:,} rows{micro} x {experiment.data.seq_len:,} tokens = "
        f"{plan['tokens_per_step']:,} per step",
        f"  memory per {unit}, GiB",
    ]
    parts = {
        "parameters": plan["parameter_bytes"],
        "optimizer": plan["optimizer_bytes"],
        "temporaries": plan["temporary_bytes"],
        "peak" if plan["fits"] else "needed": plan["needed"],
        "capacity": plan["capacity"],
        "on the host": plan["host_bytes"] or None,
    }
    lines += [f"    {name:<12}{b / _GIB:8.2f}" for name, b in parts.items() if b is not None]
    free = plan["capacity"] - plan["needed"]
    if plan["fits"]:
        lines.append(f"fits: {free / plan['capacity']:.0%} of a {unit}'s memory is left")
    else:
        lines.append(
            f"does not fit: needs {-free / _GIB:.2f} GiB more than the "
            f"{plan['capacity'] / _GIB:.2f} GiB per {unit}"
        )
        lines += [f"  try {option}" for option in _ways_out(experiment, plan["mesh"])]
    seconds = plan["trace_seconds"] + plan["compile_seconds"]
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    done = "compiled" if plan["fits"] else "refused"
    return "\n".join([*lines, f"{done} in {format_duration(seconds)} by {versions}"])


def _ways_out(experiment: Experiment, mesh: dict[str, int]) -> list[str]:
    """Options that use less memory and change no result, those that cost least first."""
    train, rows = experiment.train, experiment.train.batch_size // (mesh["data"] * mesh["fsdp"])
    options = []
    if experiment.mesh.zero < 3 and mesh["fsdp"] > 1:
        options.append("--config.mesh.zero=3")
    if mesh["data"] > 1:
        options.append("--config.mesh.data=1 --config.mesh.fsdp=-1")
    if experiment.model.remat != "full":
        options.append("--config.model.remat=full")
    if rows > train.accumulation:
        options.append(f"--config.train.accumulation={rows}")
    return options or ["a larger slice, or a larger config.mesh.tensor"]
