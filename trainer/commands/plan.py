"""`torus plan`: fit, speed and cost of a config on a TPU slice, asked before anything is paid.

The compiler runs in a process of its own (trainer/plan/compile.py as a module): it needs another
environment than a command has, takes minutes in which Ctrl-C must still work, and may crash.
Everything that can be refused without it is refused before it starts.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from sharding.errors import UsageError
from sharding.topology import Slice, compiler_environment, parse_slice, require_libtpu
from trainer.config import ROOT, Experiment, check_sizes, parse_flags
from trainer.plan.calibration import add_run, factor, measured_step
from trainer.plan.screen import format_plan
from trainer.run import read_experiment

HELP = "say whether a config fits a TPU slice and how fast it goes, without any TPU"
USAGE = """\
usage: torus plan --config=CONFIG --on=SLICE [--config.PATH=VALUE ...] [--price=X] [--json]
       torus plan --calibrate=RUN --on=SLICE

Compiles the train step of CONFIG ahead of time for a TPU slice that need not be there, on this
machine's CPU. Prints the memory that the compiler gives each chip and what holds it, an estimate of
the step's time with its range and where it goes, days to the configured tokens, and what the
program does that nobody asked for. A config that fits takes one to three minutes, one that does not
is refused in seconds, with how much it lacks. Needs libtpu: pip install 'torus-train[aot]'.

  torus plan --config=llama3_8b --on=v5e-256 --price=1.2
  torus plan --config=llama3_8b --on=v5p-128 --config.mesh.tensor=4
  torus plan --config=gemma3_1b --on=v6e-16 --config.model.remat=attention,residual
  torus plan --config=llama3_8b --on=v5e-256 --config.perf=off

SLICE is a name of the cloud's: v5e-256 and v6e-256 count chips; v4-128, v5p-128 and tpu7x-128
count cores, two a chip. Other shapes are written v5p:4x4x12, several slices 2xv5e-256.

  --price X      what one chip costs an hour; prints the cost of the whole run
  --program F    keep the compiled program's text in F, gzipped
  --calibrate R  plan what run R ran, compare with the step time that it measured, and keep both:
                 plans for that chip then also show the estimate times measured/estimated
  --json         one JSON object; sizes in bytes per device, times in seconds per step
Exit status: 0 it fits, 1 it does not, 2 a mistake in the command, 3 the compiler failed.
"""

# What of a compiler's log is worth a line of its own, and the line.
_FAILURES = {
    "libtpu multi-process lockfile": "another process holds libtpu on this machine, and its lock "
    "protects a TPU that is in use: plan when it has ended",
}


def main(argv: list[str]) -> int:
    """Returns 0 when the config fits, 1 when it does not, 3 when the compiler failed."""
    as_json = "--json" in argv
    argv = [a for a in argv if a != "--json"]
    run = next((a.partition("=")[2] for a in argv if a.startswith("--calibrate=")), "")
    if run:
        experiment, measured = read_experiment(run), measured_step(run)
        flags = {"on": "", "price": "", "program": ""}
        for argument in argv:
            name, _, value = argument.removeprefix("--").partition("=")
            if name not in (*flags, "calibrate"):
                raise UsageError(f"--calibrate takes the run's own settings: not {argument}")
            flags[name] = value
    else:
        experiment, flags = parse_flags(
            argv,
            on="TPU slice to plan for, as v5e-256",
            price="of one chip for an hour",
            program="file for the program's text",
            calibrate="run to compare with",
        )
    if not flags["on"]:
        raise UsageError("--on=SLICE is missing; try --on=v5e-256")
    price = _price(flags["price"])
    target = parse_slice(flags["on"])
    check_sizes(experiment, experiment.mesh.sizes(target.devices))
    require_libtpu()

    status, plan, log = _compile(experiment, target, flags["program"])
    if plan is None:
        if known := next((text for sign, text in _FAILURES.items() if sign in log), ""):
            raise UsageError(known)
        print(log.rstrip(), file=sys.stderr)
        print(f"torus: error: compiling failed with status {status}", file=sys.stderr)
        return 3
    if "refused" in plan:
        raise UsageError(plan["refused"])
    if run and plan["forecast"]:
        add_run(run, target.chip, plan, measured)
    own = factor(target.chip)
    if as_json:
        print(json.dumps({**plan, "calibration": own}, indent=2))
    else:
        print(format_plan(plan, experiment, target, price, own))
    return 0 if plan["fits"] else 1


def _price(text: str) -> float | None:
    """Returns the price of a chip-hour, None where none is given."""
    if not text:
        return None
    if not re.fullmatch(r"\d*\.?\d+", text):
        raise UsageError(f"--price={text}: a number, what one chip costs an hour, as 1.2")
    return float(text)


def _compile(
    experiment: Experiment, target: Slice, save: str = ""
) -> tuple[int, dict[str, Any] | None, str]:
    """Runs trainer.plan.compile; returns exit status, answer (None when it failed) and log."""
    environment = {**os.environ, **compiler_environment()}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    request = {"experiment": dataclasses.asdict(experiment), "slice": target.name, "save": save}
    with (
        _spinner(f"compiling {experiment.name} for {target.name}"),
        subprocess.Popen(
            [sys.executable, "-m", "trainer.plan.compile"],
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
