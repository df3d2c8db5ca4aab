"""`torus plan`: fit, speed and cost of a config on TPUs or GPUs, asked before anything is paid.

Everything that can be refused without the compiler is refused before one starts
(trainer/plan/process.py).
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from sharding.errors import UsageError
from sharding.topology import Slice, parse_slice, require_libtpu
from trainer.config import Experiment, check_sizes, joined, parse_flags
from trainer.plan.calibration import add_run, factor, measured_step
from trainer.plan.process import Compilation
from trainer.plan.screen import format_plan, format_search
from trainer.run import read_experiment
from trainer.terminal import bare

USAGE = """\
usage: torus plan --config=CONFIG --on=SLICE [--config.PATH=VALUE ...] [--price=X] [--json]
       torus plan --config=CONFIG --on=SLICE --search [--budget=10m] [--keep=8] [--pareto]
       torus plan --check [--config=CONFIG --on=SLICE]
       torus plan --calibrate=RUN --on=SLICE

Compiles the train step of CONFIG ahead of time for a TPU slice that need not be there, on this
machine's CPU. Prints the memory that the compiler gives each chip and what holds it, an estimate of
the step's time with its range and where it goes, days to the configured tokens, and what the
program does that nobody asked for. A config that fits takes one to three minutes, one that does not
is refused in seconds, with how much it lacks. Needs libtpu: pip install -e '.[aot]'.

  torus plan --config=llama3_8b --on=v5e-256 --price=1.2
  torus plan --config=llama3_8b --on=v5p-128 --config.mesh.tensor=4
  torus plan --config=gemma3_1b --on=v6e-16 --config.model.remat=attention,residual
  torus plan --config=llama3_8b --on=v5e-256 --config.perf=off
  torus plan --config=llama3_8b --on=v5e-256 --search --budget=20m
  torus plan --config=llama3_8b --on=4x8xH200 --search

--search compares meshes, microbatches, what the backward pass keeps and the ways to spread long
rows: all by formula, the best ones compiled. It prints them by tokens per second and chip, and the
options that the best one takes. Ctrl-C ends it with what is known; what was compiled is kept, so
that the same search goes on where it stopped.

SLICE is a name of the cloud's: v5e-256 and v6e-256 count chips; v4-128, v5p-128 and tpu7x-128
count cores, two a chip. Other shapes are written v5p:4x4x12, several slices 2xv5e-256.

GPUS are A100-40, A100-80, H100, H200 or B200: 8xH200 is one host, 4x8xH200 four. For them all is by
formula, in seconds: nothing is compiled or run, and libtpu is not needed.

  --price X      what one chip or GPU costs an hour; prints the cost of the whole run
  --network X    of GPUs: Gb/s that each one can send to other hosts (default 400)
  --budget T     of a search: how long to compile, as 90s, 10m (default) or 2h
  --keep N       of a search: how many that fit to compile (default 8)
  --jobs N       of a search: compilations at a time; default by this machine's cores and memory
  --pareto       of a search: mark with * those than which nothing faster takes as little memory
  --program F    keep the compiled program's text in F, gzipped
  --explain F    draw the program as one HTML page F: roofline, the step by stream with the memory
                 held meanwhile, collectives by mesh axis
  --check        compare a shipped config with its stored plan; without one, all stored plans with
                 the code, and nothing is compiled
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
    switches = {a for a in argv if a in ("--json", "--search", "--pareto", "--check")}
    argv = joined([a for a in argv if a not in switches])
    as_json = "--json" in switches
    if "--check" in switches and not argv:
        return _check_all()
    run = next((a.partition("=")[2] for a in argv if a.startswith("--calibrate=")), "")
    if run and switches - {"--json"}:
        raise UsageError(f"--calibrate plans one run: not with {min(switches - {'--json'})}")
    if run:
        experiment, measured = read_experiment(run), measured_step(run)
        flags = {"on": "", "price": "", "program": "", "explain": ""}
        for argument in argv:
            name, _, value = argument.removeprefix("--").partition("=")
            if name not in (*flags, "calibrate"):
                raise UsageError(f"--calibrate takes the run's own settings: not {argument}")
            flags[name] = value
    else:
        experiment, flags = parse_flags(
            argv,
            on="TPU slice or GPUs to plan for, as v5e-256",
            price="of one chip for an hour",
            network="Gb/s between hosts, of one GPU",
            program="file for the program's text",
            explain="file for the page",
            calibrate="run to compare with",
            budget="time for a search",
            keep="how many a search compiles",
            jobs="how many at a time",
        )
    if not flags["on"]:
        raise UsageError("--on=SLICE is missing; try --on=v5e-256 or --on=8xH200")
    price = _number("price", flags["price"], "what one chip costs an hour, as 1.2")
    target = _target(experiment, flags, switches)
    old = _stored(argv, target) if "--check" in switches else None
    if "--search" in switches:
        return _search(experiment, target, flags, switches)
    searching = [f"--{name}" for name in ("budget", "keep", "jobs") if flags.get(name)]
    if stray := [*searching, *(switches & {"--pareto"})]:
        raise UsageError(f"{stray[0]} is of a search: add --search")
    for name in ("program", "explain"):
        _check_file(name, flags[name])
    check_sizes(experiment, experiment.mesh.sizes(target.devices))
    if not target.gpu:
        require_libtpu()

    status, plan, log = _compile(experiment, target, flags["program"], flags["explain"])
    if plan is None:
        if known := next((text for sign, text in _FAILURES.items() if sign in log), ""):
            raise UsageError(known)
        print(log.rstrip(), file=sys.stderr)
        print(f"torus: error: compiling failed with status {status}", file=sys.stderr)
        return 3
    if "refused" in plan:
        raise UsageError(plan["refused"])
    if old is not None:
        from trainer.plan.stored import changes

        return _report(f"{old['config']} {old['slice']}", changes(old, plan), "as stored")
    if run and plan["forecast"]:
        add_run(run, target.chip, plan, measured)
    own = factor(target.chip)
    if as_json:
        print(json.dumps({**plan, "calibration": own}, indent=2))
    else:
        print(format_plan(plan, experiment, target, price, own))
    return 0 if plan["fits"] else 1


def _check_file(name: str, path: str) -> None:
    """Raises UsageError where no file can be written, before minutes are spent on what goes in."""
    if path and not os.path.isdir(folder := os.path.dirname(path) or "."):
        raise UsageError(f"--{name}={path}: there is no folder {folder}")
    if path and os.path.isdir(path):
        raise UsageError(f"--{name}={path} is a folder; name a file")
    if path and not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"--{name}={path} cannot be written")


def _number(name: str, text: str, meaning: str) -> float | None:
    """Returns the number that a flag gives, None where it is not given."""
    if not text:
        return None
    if not re.fullmatch(r"\d*\.?\d+", text) or not float(text):
        raise UsageError(f"--{name}={text}: a number above 0, {meaning}")
    return float(text)


def _target(experiment: Experiment, flags: dict[str, str], switches: set[str]) -> Slice:
    """Returns what to plan for, after refusing what does not go with it."""
    target, network = parse_slice(flags["on"]), flags.get("network", "")
    compiling = ("program", "explain", "calibrate", "budget", "jobs")
    stray = [f"--{name}" for name in compiling if flags.get(name)] + [*switches & {"--check"}]
    if target.gpu and stray:
        raise UsageError(f"{stray[0]} needs a compiler: {target.name} is planned by formula alone")
    if target.gpu and "," in experiment.perf:
        raise UsageError(f"config.perf = {experiment.perf!r}: on GPUs choose auto, fast or off")
    if network and not target.gpu:
        raise UsageError(f"--network={network} is of GPUs, not of {target.name}")
    rate = _number("network", network, "the Gb/s of one GPU to other hosts, as 400")
    return replace(target, network=rate * 1e9 / 8) if rate else target


def _search(
    experiment: Experiment, target: Slice, flags: dict[str, str], switches: set[str]
) -> int:
    budget, keep = _seconds(flags["budget"] or "10m"), _count("keep", flags["keep"] or "8")
    jobs = _count("jobs", flags["jobs"]) if flags["jobs"] else 0
    if not target.gpu:
        require_libtpu()
    from trainer.plan.search import search  # imports JAX

    text = f"searching for the fastest mesh of {experiment.name} on {target.name}"
    with _progress(text, keep) as show:
        found = search(experiment, target, keep, budget, jobs, show)
    answer = {**found.to_json(experiment), "compiled": not target.gpu}
    if "--json" in switches:
        print(json.dumps(answer, indent=2))
    else:
        print(format_search(answer, target, pareto="--pareto" in switches))
    if found.stopped == "interrupted":
        return 130
    return 0 if found.ranked() else 3 if found.failed else 1


def _check_all() -> int:
    """Says what of the stored plans does not follow from the code; compiles nothing."""
    from trainer.plan.stored import stale, stored  # imports JAX

    plans = stored()
    found = [f"{' '.join(key)}: {line}" for key, plan in plans.items() for line in stale(plan)]
    return _report(f"{len(plans)} stored plans", found, "as the code")


def _stored(argv: list[str], target: Slice) -> dict[str, Any]:
    from trainer.plan.stored import stored

    reference = next(a.partition("=")[2] for a in argv if a.startswith("--config="))
    plans = stored()
    if (plan := plans.get((reference, target.name))) is None:
        there = ", ".join(name for config, name in plans if config == reference) or "none"
        raise UsageError(f"no plan of {reference} on {target.name} is stored (there is: {there})")
    return plan


def _report(what: str, found: list[str], fine: str) -> int:
    print("\n".join([f"{what}: {fine if not found else f'{len(found)} changes'}", *found]))
    return 1 if found else 0


def _seconds(text: str) -> float:
    """Returns the seconds of "90s", "10m" or "2h"."""
    if not (match := re.fullmatch(r"(\d*\.?\d+)([smh])", text)):
        raise UsageError(f"--budget={text}: a number and s, m or h, as 10m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _count(name: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UsageError(f"--{name}={text}: a whole number of at least 1")
    return int(text)


def _compile(
    experiment: Experiment, target: Slice, save: str, page: str
) -> tuple[int, dict[str, Any] | None, str]:
    """Runs trainer.plan.compile; returns exit status, answer (None when it failed) and log."""
    if target.gpu:
        from trainer.plan.formula import formula_plan  # imports JAX

        return 0, formula_plan(experiment, target), ""
    text = f"compiling {experiment.name} for {target.name}; a config that fits takes some minutes"
    with _progress(text), Compilation(experiment, target, save, page) as compilation:
        return compilation.result()


@contextlib.contextmanager
def _progress(text: str, total: int | None = None) -> Iterator[Callable[[str, int], None]]:
    """Yields the function that shows what goes on, and how much of `total` is done.

    On a terminal that is a bar with the time it takes, else a line each time that more is done.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        print(text, file=sys.stderr, flush=True)
        before = [0]

        def say(text: str, done: int) -> None:
            if done > before[0]:
                before[0] = done
                print(f"{done} of {total}: {text}", file=sys.stderr, flush=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    terminal = Console(file=bare(sys.stderr))
    columns = (BarColumn(bar_width=24), TimeElapsedColumn())
    words = TextColumn("{task.description}", markup=False)
    with Progress(*columns, words, console=terminal, transient=True) as progress:
        terminal.show_cursor(True)  # a kill must not leave the terminal without one
        task = progress.add_task(text, total=total)
        yield lambda text, done: progress.update(task, completed=done, description=text)
