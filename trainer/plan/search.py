"""Which mesh, microbatch, remat and sequence strategy make a config fastest on a slice.

All that can be laid out are ranked by formula (analytic.py for time, recipe.py for memory) in
seconds; the best are compiled, each in a process of its own, until enough fit or time is up.
Times in the end are the compiler's estimates; the formula only chooses. Of GPUs it is the answer.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from models.config import SEQ_STRATEGIES
from sharding.config import AXES
from sharding.errors import UsageError
from sharding.topology import Slice, program_bytes
from trainer.config import Experiment, check_sizes, leaves
from trainer.plan.analytic import step_seconds
from trainer.plan.forecast import setting_of
from trainer.plan.formula import formula_plan
from trainer.plan.process import Compilation
from trainer.plan.recipe import GROUPS, fixed_bytes, kept_bytes, resolve_remat

SLACK = 1.06  # by how much the memory formula may exceed what there is: it was up to 6% too high
FAILURES = 3  # after which a search ends: a compiler that fails for no lack of memory does so again
PER_MESH = 2  # candidates of one mesh that may be compiled
COMPILER_BYTES = 4 * 2.0**30  # of this machine's memory that one compilation may take


@dataclass(frozen=True)
class Candidate:
    """One way to run an experiment. experiment: mesh, accumulation, remat and strategy chosen."""

    experiment: Experiment
    mesh: dict[str, int]
    seconds: float  # of a step, by formula; infinite where memory does not last
    needed: float  # bytes of one device, by formula


@dataclass
class Space:
    """All ways to run an experiment: those that may fit, fastest first, and how many cannot."""

    fit: list[Candidate]
    too_large: list[Candidate]
    indivisible: int


@dataclass
class Found:
    """What a search has compiled so far.

    compiled: candidates with their plans, those refused for memory included; of GPUs by formula.
    failed: candidates on which it failed otherwise, with the end of its log.
    """

    space: Space
    compiled: list[tuple[Candidate, dict[str, Any]]] = field(default_factory=list)
    failed: list[tuple[Candidate, str]] = field(default_factory=list)
    stopped: str = ""  # why before its end

    def ranked(self) -> list[tuple[Candidate, dict[str, Any]]]:
        """Returns those that fit, most tokens per second and chip first."""
        fit = [pair for pair in self.compiled if pair[1]["fits"]]
        return sorted(fit, key=lambda pair: -pair[1]["forecast"]["tokens_per_second"])

    def to_json(self, base: Experiment) -> dict[str, Any]:
        """Returns the search as a JSON object; options are those to add to `base`'s command."""

        def row(candidate: Candidate, **more: Any) -> dict[str, Any]:
            options = overrides(base, candidate.experiment)
            return {"mesh": candidate.mesh, "options": options, **more}

        ranked = self.ranked()
        best = frontier(ranked)
        return {
            "config": base.name,
            "candidates": len(self.space.fit) + len(self.space.too_large),
            "too_large": len(self.space.too_large),
            "smallest": self.space.too_large[0].needed if self.space.too_large else None,
            "stopped": self.stopped,
            "ranked": [
                row(c, accumulation=c.experiment.train.accumulation, frontier=i in best, plan=plan)
                for i, (c, plan) in enumerate(ranked)
            ],
            "refused": [row(c, plan=plan) for c, plan in self.compiled if not plan["fits"]],
            "failed": [row(c, reason=reason) for c, reason in self.failed],
        }


def space(experiment: Experiment, target: Slice) -> Space:
    """Returns all candidates; several TPU slices hold replicas, joined by `data` alone.

    Raises:
      UsageError: no mesh divides what the config holds; the refusal of replicas alone says why.
    """
    fit, too_large, refusals = [], [], []
    for sizes in meshes(target):
        try:
            found = list(_of_mesh(experiment, target, sizes))
        except UsageError as error:
            refusals.append(str(error))
            continue
        for candidate in found:
            (fit if candidate.seconds < math.inf else too_large).append(candidate)
    if not fit and not too_large:
        raise UsageError(f"no mesh of {target.name} suits {experiment.name}: {refusals[0]}")
    return Space(
        sorted(fit, key=lambda c: c.seconds),
        sorted(too_large, key=lambda c: c.needed),
        len(refusals),
    )


def meshes(target: Slice) -> Iterator[dict[str, int]]:
    """Yields all sizes of the axes data, fsdp, seq, tensor over the devices of a target."""
    inside = target.devices if target.gpu else target.devices // target.count
    for tensor in _divisors(inside):
        for seq in _divisors(inside // tensor):
            for fsdp in _divisors(inside // tensor // seq):
                data = target.devices // (tensor * seq * fsdp)
                yield dict(zip(AXES, (data, fsdp, seq, tensor), strict=True))


def _of_mesh(experiment: Experiment, target: Slice, sizes: dict[str, int]) -> Iterator[Candidate]:
    slices = 1 if target.gpu else target.count
    mesh = replace(experiment.mesh, **sizes, dcn_data=slices, dcn_fsdp=1)
    rows = experiment.train.batch_size // (sizes["data"] * sizes["fsdp"])
    check_sizes(replace(experiment, train=replace(experiment.train, accumulation=1)), sizes)
    setting = setting_of(experiment, target, sizes)
    capacity = program_bytes(target.chip)
    limit = capacity if target.gpu else SLACK * capacity  # no compiler has the last word
    asked = experiment.model.seq_strategy
    strategies = SEQ_STRATEGIES[1:] if sizes["seq"] > 1 and asked == "auto" else (asked,)
    for accumulation in _divisors(rows):
        train = replace(experiment.train, accumulation=accumulation)
        for strategy in strategies:
            model = replace(experiment.model, seq_strategy=strategy)
            one = replace(experiment, train=train, mesh=mesh, model=model)
            try:
                check_sizes(one, sizes)
            except UsageError:  # a strategy for which heads or length do not divide
                continue
            fixed = fixed_bytes(one, sizes)
            auto = resolve_remat(one, capacity, sizes).model.remat
            for remat in _remats(experiment):
                named = replace(one, model=replace(model, remat=remat))
                kept = [n for part in named.model.remat_names() or ((),) for n in part]
                needed = fixed + sum(kept_bytes(one, name, sizes) for name in kept)
                seconds = math.inf
                if needed <= limit:
                    seconds = sum(step_seconds(named, setting).values())
                if remat == auto:  # the shorter line
                    named = replace(one, model=replace(model, remat=experiment.model.remat))
                yield Candidate(named, sizes, seconds, needed)


def _remats(experiment: Experiment) -> list[str]:
    """What the backward pass may find: more and more of it, unless the config says."""
    if experiment.model.remat != "auto":
        return [experiment.model.remat]
    glu = "glu" in experiment.model.activation
    names = [tuple(n for n in group if glu or n != "gate") for group in GROUPS]
    return ["full", *(",".join(sum(names[: i + 1], ())) for i in range(len(names)))]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def shortlist(fit: list[Candidate]) -> Iterator[Candidate]:
    """Yields candidates in the order in which to compile them: the best few of each mesh."""
    taken: Counter = Counter()
    for candidate in fit:
        mesh = tuple(candidate.mesh.values())
        taken[mesh] += 1
        if taken[mesh] <= PER_MESH:
            yield candidate


def search(
    experiment: Experiment,
    target: Slice,
    keep: int,
    budget: float,
    jobs: int = 0,
    show: Callable[[str, int], None] = lambda text, done: None,
) -> Found:
    """Compiles the best candidates until `keep` fit; Ctrl-C and the budget end it early.

    Args:
      budget: seconds.
      jobs: compilations at a time; 0 as many as the machine has cores and memory for.
      show: called a few times a second with what goes on and how many fit.
    """
    found = Found(space(experiment, target))
    if target.gpu:
        for candidate in list(shortlist(found.space.fit))[:keep]:
            found.compiled.append((candidate, formula_plan(candidate.experiment, target)))
        return found
    waiting, running = shortlist(found.space.fit), {}
    jobs, end = jobs or _jobs(), time.monotonic() + budget
    try:
        while True:
            if len(found.failed) >= FAILURES:
                found.stopped = "the compiler fails"
                break
            fitting = sum(plan["fits"] for _, plan in found.compiled)
            while len(running) < min(jobs, keep - fitting):
                if (candidate := next(waiting, None)) is None:
                    break
                running[Compilation(candidate.experiment, target)] = candidate
            if not running:
                break
            if time.monotonic() > end:
                found.stopped = "the budget is spent"
                break
            for done in [c for c in running if not c.running()]:
                with done:
                    _record(found, running.pop(done), done)
            ranked = found.ranked()
            best = f"{ranked[0][1]['forecast']['tokens_per_second']:,.0f}" if ranked else "none yet"
            show(f"{len(running)} compiling; best {best} tokens/s per chip", len(ranked))
            if running:
                time.sleep(0.1)
    except KeyboardInterrupt:
        found.stopped = "interrupted"
    finally:
        for compilation in running:
            compilation.stop()
    return found


def _record(found: Found, candidate: Candidate, done: Compilation) -> None:
    status, plan, log = done.result()
    if plan is None or "refused" in plan:
        lines = [f"status {status}", *log.strip().splitlines()]
        found.failed.append((candidate, lines[-1] if plan is None else plan["refused"]))
    else:
        found.compiled.append((candidate, plan))


def _jobs() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, int(memory / COMPILER_BYTES)))


def overrides(base: Experiment, chosen: Experiment) -> str:
    """Returns the options that make `chosen` of `base`, as they are written after a command."""
    before = dict(leaves(base))
    return " ".join(
        f"--config.{path}={value}" for path, value in leaves(chosen) if before[path] != value
    )


def frontier(ranked: list[tuple[Candidate, dict[str, Any]]]) -> set[int]:
    """Returns the places in `ranked` than which nothing faster needs as little memory."""
    least, found = math.inf, set()
    for place, (_, plan) in enumerate(ranked):
        if plan["needed"] < least:
            least = plan["needed"]
            found.add(place)
    return found
