"""The training loop, top to bottom: devices, data, state, and one step after another.

Start reading here. `train` is the whole of a run: it resumes by itself from the newest complete
checkpoint of its folder, and the data position is the step, so a run that was killed and started
again ends on the same bits as one that was not.
"""

import contextlib
import gc
from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.agreement import first
from checkpoint.manager import CheckpointManager
from checkpoint.memory.snapshots import Snapshots
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from sharding.runtime import start_runtime
from trainer.config import Experiment, check_sizes, validate
from trainer.data.corpus import HELD_OUT, TRAIN
from trainer.data.dataset import open_dataset, open_training
from trainer.data.loader import Loader
from trainer.evaluate import baselines, check_loss_tokens, evaluate
from trainer.guard import Guard, Rewind
from trainer.journal import Journal
from trainer.lock import RunLock, job_lock
from trainer.profiler import Profiler
from trainer.restore import begin
from trainer.run import CHECKPOINTS, check_start, check_workdir, write_experiment
from trainer.signals import StopSignals
from trainer.state import TrainState, make_layout, to_stored
from trainer.step import jit_train_step, make_eval_step


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended: the step it reached and the signal that stopped it, if any."""

    step: int
    stopped_by: str
    last_eval: dict[str, float] | None


def train(experiment: Experiment, workdir: str) -> TrainResult:
    """Trains `experiment` in `workdir`, resuming what is there.

    Raises:
      UsageError: a config, dataset or folder that cannot be used, or that another job uses; nothing
        has been written then.
      CheckpointError: a save failed, a stored step is damaged, or another job took the run over.
      Unhealthy: steps stay unhealthy after all rewinds, or a device gives other bits.
    """
    validate(experiment)
    check_workdir(workdir, experiment)
    check_start(workdir, experiment)
    Guard(experiment, workdir).page()  # what `torus launch` watches
    start_runtime()
    with job_lock(workdir) as lock, StopSignals() as signals:
        while True:
            try:
                return _attempt(experiment, workdir, lock, signals)
            except Rewind:  # the run's folder says where to
                pass
            gc.collect()  # the state of the attempt that ended, or both would need memory


def _attempt(
    experiment: Experiment, workdir: str, lock: RunLock, signals: StopSignals
) -> TrainResult:
    """Trains from the newest state on, to the end of the run, a signal, or a Rewind."""
    guard = Guard(experiment, workdir)
    progress = guard.page()
    mesh = make_mesh(experiment.mesh)
    check_sizes(experiment, dict(mesh.shape))
    guard.check(mesh)
    layout = make_layout(experiment, mesh)
    rows = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))

    # -------------------------------------------------------------------- data
    progress.enter("data")
    config, batch_size = experiment.train, experiment.train.batch_size
    dataset = open_training(experiment.data, batch_size, experiment.model.vocab)
    held_out = open_dataset(experiment.data, HELD_OUT) if experiment.eval.every else None
    for split, data in ((TRAIN, dataset), (HELD_OUT, held_out)):
        if data is not None:
            check_loss_tokens(data, experiment.data.collate, batch_size, split)
    dataset = guard.data(dataset)

    with contextlib.ExitStack() as stack:
        # ---------------------------------------------------------------- state: restored or new
        signals.remember()
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = CheckpointManager(f"{workdir}/{CHECKPOINTS}", experiment.checkpoint)
        snapshots = stack.enter_context(Snapshots(experiment.checkpoint.snapshot_every))
        start = begin(experiment, layout, dataset, checkpoints, snapshots, progress)
        state = start.state
        train_step, choice = jit_train_step(experiment, layout)
        eval_step = jax.jit(make_eval_step(experiment))
        ahead = experiment.data.prefetch
        loader = Loader(dataset, batch_size, rows, start_row=start.row, prefetch=ahead)
        stack.enter_context(loader)

        # ---------------------------------------------------------------- nothing is refused now
        first(lambda: write_experiment(workdir, experiment))
        stack.enter_context(checkpoints)
        if start.past.count:
            checkpoints.discard_where(start.past.gave_up)
        journal = Journal(experiment, workdir, mesh, dataset, start.step, int(state.skipped))
        stack.enter_context(journal)
        profiler = stack.enter_context(Profiler(f"{workdir}/profile", experiment.log))
        guard.begin(start, layout, journal, checkpoints)
        if choice.options:
            journal.event(start.step, "recipe", chosen=str(choice))
        if not start.step and held_out is not None and (found := baselines(held_out)):
            journal.event(0, "baseline", **found)
        for reason in start.damaged:
            journal.event(start.step, "damaged checkpoint passed over", reason=reason)

        def evaluated(step: int, state: TrainState) -> dict[str, float | None]:
            compiles = progress.is_new("eval")
            progress.enter("compile" if compiles else "eval", step)
            with journal.paused(state.step):
                found = evaluate(
                    eval_step, state.params, held_out, batch_size, rows, experiment.eval.batches,
                    compiled=partial(progress.enter, "eval") if compiles else None,
                )  # fmt: skip
            journal.eval(step, found)
            return found

        def save(step: int, state: TrainState) -> None:
            if progress.is_new("save"):
                progress.enter("compile", step)
                checkpoints.compile(to_stored(state))
            progress.enter("save", step)
            meta = guard.meta(loader.state())()
            with journal.paused(state.step):
                if checkpoints.save(step, to_stored(state), meta, force=True):
                    guard.saved(step)

        # ---------------------------------------------------------------- the loop
        step, last = start.step, config.stop_at or config.steps
        running, last_eval = None, None  # the newest step and its metrics, still on the device
        while step < last and not signals.stop_at_step(step):
            lock.check()
            progress.enter("data", step)
            with journal.waiting_for_data():
                batch = next(loader)
            progress.enter("compile" if progress.is_new(guard.programs(batch)) else "step")
            profiler.before(step)
            with jax.transfer_guard("disallow"):
                state, metrics = guard.step(train_step, state, batch)
            step += 1
            if running is not None:
                guard.observe(*running)  # one step late: the device never waits for the host
            running = step, metrics
            if snapshots.due(step):
                snapshots.take(step, to_stored(state), guard.meta(loader.state()))
            profiler.after(step, metrics)
            checkpoints.poll()
            if checkpoints.due(step):
                save(step, state)
            if held_out is not None and step % experiment.eval.every == 0 and step < last:
                last_eval = evaluated(step, state)

        # ---------------------------------------------------------------- the end
        progress.enter("end", step)
        if running is not None:
            lock.check()
            guard.observe(*running, last=True)
            if held_out is not None and step == last:
                last_eval = evaluated(step, state)
            save(step, state)
        if step == config.steps:
            journal.event(step, "finished")
        else:
            journal.event(step, "stopped", by=signals.name or "config.train.stop_at")
    return TrainResult(step, signals.name, last_eval)
