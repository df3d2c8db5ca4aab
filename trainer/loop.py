"""The training loop, top to bottom: devices, data, state, and one step after another.

Start reading here. `train` is the whole of a run: it resumes by itself from the newest complete
checkpoint of its folder, and the data position is the step, so a run that was killed and started
again ends on the same bits as one that was not.
"""

import dataclasses
import itertools
from dataclasses import dataclass

import jax
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.manager import CheckpointManager
from models import spec
from models.decoder import param_specs
from models.flops import train_flops_per_token
from sharding.hardware import peak_flops
from sharding.mesh import make_mesh, start_runtime
from sharding.rules import BATCH, SEQ
from trainer.config import Experiment, check_sizes, validate
from trainer.console import Console
from trainer.data.corpus import HELD_OUT
from trainer.data.dataset import open_dataset, resume_row
from trainer.data.loader import Loader
from trainer.evaluate import baselines, evaluate, to_bits_per_byte
from trainer.metrics import MetricsWriter, StepTimer, memory_gib
from trainer.packages import library_versions
from trainer.profiler import Profiler
from trainer.run import CHECKPOINTS, check_workdir, write_experiment
from trainer.signals import StopSignals
from trainer.state import abstract_state, from_stored, init_state, make_layout, to_stored
from trainer.step import make_eval_step, make_train_step


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended: the step it reached, and why it stopped before the last."""

    step: int
    stopped_by: str  # "" when it reached its end, else the name of the signal
    last_eval: dict[str, float] | None


def train(experiment: Experiment, workdir: str) -> TrainResult:
    """Trains `experiment` in `workdir`, resuming what is there.

    Raises:
      UsageError: a config, dataset or folder that cannot be used; nothing has been written then.
      CheckpointError: a save failed, or a stored step is damaged.
    """
    validate(experiment)
    check_workdir(workdir, experiment)

    # ------------------------------------------------------------ devices
    start_runtime()
    mesh = make_mesh(experiment.mesh)
    check_sizes(experiment, dict(mesh.shape))
    layout = make_layout(experiment, mesh)
    rows = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))

    # ------------------------------------------------------------ data
    config, batch_size = experiment.train, experiment.train.batch_size
    dataset = open_dataset(experiment.data)
    dataset.check_vocab(experiment.model.vocab)
    held_out = open_dataset(experiment.data, HELD_OUT) if experiment.eval.every else None

    # ------------------------------------------------------------ the run's folder
    if lead := jax.process_index() == 0:
        write_experiment(workdir, experiment)
    with (
        jax.set_mesh(mesh),
        CheckpointManager(f"{workdir}/{CHECKPOINTS}", experiment.checkpoint) as checkpoints,
        Console(config.steps) as console,
        StopSignals() as signals,
        Profiler(f"{workdir}/profile", experiment.log) as profiler,
    ):
        # -------------------------------------------------------- state: restored or new
        start, start_row = checkpoints.latest() or 0, 0
        if start:
            stored, meta = checkpoints.restore(start, to_stored(abstract_state(experiment, layout)))
            state = from_stored(stored, experiment, layout)
            start_row = resume_row(meta["data"], dataset, allow_change=experiment.data.allow_change)
        else:
            state = init_state(experiment, layout)

        # -------------------------------------------------------- compiled functions, metrics
        train_step = jax.jit(make_train_step(experiment, layout), donate_argnums=0)
        eval_step = jax.jit(make_eval_step(experiment))
        tokens_per_step = batch_size * experiment.data.seq_len
        flops = train_flops_per_token(experiment.model, experiment.data.seq_len)
        timer = StepTimer(
            total_steps=config.steps, tokens_per_step=tokens_per_step,
            flops_per_step=flops * tokens_per_step,
            peak_flops=peak_flops(jax.devices(), 0.3, experiment.model.dtype),
            device_count=mesh.size,
        )
        writer = MetricsWriter(
            workdir, console=console, tensorboard=experiment.log.tensorboard,
            resumed_from=start if start else None, process_index=jax.process_index(),
        )
        loader = Loader(
            dataset, batch_size, rows, start_row=start_row, prefetch=experiment.data.prefetch
        )

        def log(step: int, metrics: dict) -> None:
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            writer.train(step, {
                "loss": values["loss"],
                "bits_per_byte": to_bits_per_byte(values["loss"], dataset),
                "grad_norm": values["grad_norm"],
                "learning_rate": values["learning_rate"],
                "skipped_steps": values["skipped"],
                "memory_gib": memory_gib(jax.local_devices()),
                **timer.report(step),
            })  # fmt: skip

        def evaluated(step: int) -> dict[str, float]:
            with timer.pause(state.step):
                result = evaluate(
                    eval_step, state.params, held_out, batch_size, rows, experiment.eval.batches
                )
            writer.eval(step, result)
            return result

        def save(step: int) -> bool:
            meta = {"data": loader.state(), "experiment": dataclasses.asdict(experiment)}
            with timer.pause(state.step):
                return checkpoints.save(step, to_stored(state), meta, force=True)

        with writer, loader:
            if not start:
                writer.event(0, "start", **_facts(experiment, mesh, dataset, tokens_per_step))
                if lead and held_out is not None and (found := baselines(held_out)):
                    writer.event(0, "baseline", **found)

            # ---------------------------------------------------- the loop
            step, last = start, config.stop_at or config.steps
            pending, last_eval = None, None  # metrics of the newest step, fetched one step late
            while step < last and not signals.stop_at_step(step):
                with timer.data_wait():
                    batch = next(loader)
                profiler.before(step)
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch)
                step += 1
                if pending is not None:
                    jax.block_until_ready(pending[1])  # at most two steps are in flight
                    if pending[0] % experiment.log.every == 0 or pending[0] == start + 1:
                        log(*pending)
                pending = (step, metrics)
                profiler.after(step, metrics)
                checkpoints.poll()
                if checkpoints.due(step) and save(step):
                    writer.event(step, "checkpoint")
                if experiment.eval.every and step % experiment.eval.every == 0 and step < last:
                    last_eval = evaluated(step)
            if pending is not None:
                log(*pending)
                if held_out is not None and step == last:
                    last_eval = evaluated(step)
                if save(step):
                    writer.event(step, "checkpoint")
            writer.event(step, "stopped" if step < config.steps else "finished",
                         **({"by": signals.name} if signals.name else {}))
    return TrainResult(step, signals.name, last_eval)


def _facts(experiment: Experiment, mesh, dataset, tokens_per_step: int) -> dict:
    """What the report says about a run."""
    device = mesh.devices.flat[0]
    return {
        "parameters": spec.count(param_specs(experiment.model)),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "devices": mesh.size,
        "device": device.device_kind,
        "processes": jax.process_count(),
        "versions": library_versions(),
        "steps": experiment.train.steps,
        "tokens_per_step": tokens_per_step,
        "rows_per_epoch": dataset.rows_per_epoch,
    }
