"""Does a part of a run again and compares bits with what the run recorded.

A run's evidence is what its files say of a step: loss and gradient norm of train records,
fingerprints of all arrays where they were logged (`config.log.fingerprint_every`) or the step is a
checkpoint. On the same mesh and kind of device the same step gives the same bits, so where they
differ something else happened then: another config, other data, or hardware that erred. To find
the first step at which two runs part, and who is wrong, by doing only that part again is Verde's
question (arXiv:2502.19405).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.fingerprint import as_text, fingerprints
from checkpoint.manifest import read_meta, read_step
from checkpoint.steps import complete_steps, folder_path
from checkpoint.storage import load_step
from checkpoint.tree import flatten
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from sharding.runtime import start_runtime
from trainer.data.dataset import open_training
from trainer.data.loader import Loader
from trainer.data.rows import resume_row
from trainer.metrics import read_metrics
from trainer.recovery.chaos import Chaos
from trainer.recovery.health import Rewinds, Watch
from trainer.restore import first_state
from trainer.run import CHECKPOINTS, read_experiment
from trainer.state import abstract_state, from_stored, init_state, make_layout, to_stored
from trainer.step import jit_train_step

Evidence = dict[int, dict[str, Any]]  # by step: numbers by name, fingerprints by array


def evidence(run: str) -> Evidence:
    """Returns what the files of a run say of its steps."""
    found: Evidence = {}
    for record in read_metrics(run):
        step = found.setdefault(record["step"], {})
        if record["kind"] == "train":
            step |= {name: record[name] for name in ("loss", "grad_norm")}
        elif record["kind"] == "fingerprints":
            step |= record["arrays"]
    for step in complete_steps(f"{run}/{CHECKPOINTS}"):
        found.setdefault(step, {}).update(read_step(f"{run}/{CHECKPOINTS}", step)[2])
    return {step: facts for step, facts in sorted(found.items()) if facts}


def first_difference(a: Evidence, b: Evidence) -> tuple[int, list[str]] | None:
    """Returns the first step of which both say something different, and the names that differ."""
    for step in sorted(a.keys() & b.keys()):
        both = a[step].keys() & b[step].keys()
        names = [
            name for name in a[step] if name in both and not _same(a[step][name], b[step][name])
        ]
        if names:
            return step, names
    return None


def compared(a: Evidence, b: Evidence) -> tuple[list[int], list[int]]:
    """Returns the steps of which both give a loss and a norm, and those with all of a's arrays."""
    both = sorted(a.keys() & b.keys())
    numbers = [step for step in both if "loss" in a[step] and "loss" in b[step]]
    arrays = {step: a[step].keys() - {"loss", "grad_norm"} for step in both}
    return numbers, [step for step in both if arrays[step] and arrays[step] <= b[step].keys()]


def base_step(run: str, step: int) -> int:
    """Returns the newest checkpoint at or before `step`, 0 for the state that a run begins with."""
    return max((s for s in complete_steps(f"{run}/{CHECKPOINTS}") if s <= step), default=0)


def redo(run: str, base: int, last: int, tick: Callable[[int], None] = lambda _: None) -> Evidence:
    """Does the steps after `base` up to `last` again; returns numbers and fingerprints of each.

    Args:
      base: a checkpoint of the run, or 0.
      tick: told 1 after every step.

    Raises:
      UsageError: the run's mesh does not fit the devices here, its data is not there, or it went
        back to a step in between.
      CheckpointError: the checkpoint is damaged.
    """
    experiment, folder = read_experiment(run), f"{run}/{CHECKPOINTS}"
    config, health = experiment.train, experiment.health
    start_runtime()
    mesh = make_mesh(experiment.mesh)
    layout = make_layout(experiment, mesh)
    dataset = open_training(experiment.data, config.batch_size, experiment.model.vocab)
    past, meta = Rewinds.read(folder_path(run)), read_meta(folder, base) if base else {}
    if past.count > meta.get("rewinds", 0) and base < past.to < last:
        raise UsageError(f"{run} went back to step {past.to}: replay up to it, or from it on")
    row = resume_row(meta["data"], dataset) if base else 0
    if base == past.to:
        row = past.row_after(meta, row)
    chaos = Chaos(health.chaos, config.steps, run)
    watch, found = Watch(health, meta.get("health")), {}
    if pending := meta.get("health", {}).get("pending"):
        watch.judge(pending[0], *(math.nan if v is None else v for v in pending[1:3]), pending[3])
    with jax.set_mesh(mesh):
        if base:
            stored, _ = load_step(folder, base, to_stored(abstract_state(experiment, layout)))
            state = from_stored(stored, experiment, layout)
        else:
            state = init_state(experiment, layout)
            if config.init_from:
                state = first_state(state, experiment, layout)
        train_step, _ = jit_train_step(experiment, layout)
        rows, skipped = NamedSharding(mesh, PartitionSpec(BATCH, SEQ)), int(state.skipped)
        with Loader(chaos.data(dataset), config.batch_size, rows, start_row=row) as loader:
            for step in range(base + 1, last + 1):
                limits = (jax.numpy.asarray(watch.limits(step)),) if health.skip_spikes else ()
                number = row // config.batch_size + step - base
                state, metrics = chaos.step(number, train_step, state, next(loader), *limits)
                numbers = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
                before, skipped = skipped, int(metrics["skipped"])
                watch.judge(step, *numbers.values(), skipped > before)
                stored = to_stored(state)
                found[step] = numbers | as_text(fingerprints(stored), list(flatten(stored)))
                tick(1)
    return found


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN is what it is
