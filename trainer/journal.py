"""What a run says while it goes: one object for its records, its clock and its console."""

import math
import statistics
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models import spec
from models.decoder import param_specs
from models.flops import train_flops
from sharding.hardware import peak_flops
from trainer.config import Experiment
from trainer.console import Console
from trainer.data.corpus import is_builtin
from trainer.data.rows import Steps
from trainer.evaluate import to_bits_per_byte
from trainer.metrics import MetricsWriter, StepTimer, memory_gib
from trainer.packages import library_versions

_SAMPLED = 16  # steps whose packing says what attention costs: each may pack a window
LARGE = 100_000_000  # parameters from which the built-in text is too little to learn from
_LITTLE_TEXT = (
    "{parameters:,} parameters and the built-in text, 9 MB of Python's documentation and sources: "
    "for a real run give --config.data.path=DATASET, made by `torus prepare`"
)


class Journal:
    """Records of one run of `train`: a context manager around console, files and step timer."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: str,
        mesh: Mesh,
        dataset: Steps,
        start: int,
        skipped: int,
    ) -> None:
        """Opens the records; `start` is the step resumed from (0 for a new run), `skipped` the
        number of updates left out until then."""
        train = experiment.train
        self._dataset = dataset
        self._batch_size = train.batch_size
        self._every = experiment.log.every
        self._first = start + 1
        self._skipped = skipped
        self._console = Console(train.steps)
        self._writer = MetricsWriter(
            workdir,
            console=self._console,
            tensorboard=experiment.log.tensorboard,
            resumed_from=start or None,
            process_index=jax.process_index(),
        )
        tokens = train.batch_size * experiment.data.seq_len
        self._losses: list[jax.Array] = []  # since the last record
        peak = peak_flops(jax.devices())
        writes = jax.process_index() == 0
        self._timer = StepTimer(
            total_steps=train.steps,
            tokens_per_step=tokens,
            flops_per_step=_step_flops(experiment, dataset, start) if peak and writes else None,
            peak_flops=peak,
            device_count=mesh.size,
        )
        if not start:
            facts = _facts(experiment, mesh, dataset, tokens)
            self.event(0, "start", **facts)
            data = experiment.data
            if facts["parameters"] >= LARGE and is_builtin(data.path) and not data.mixture:
                self.event(0, "warning", text=_LITTLE_TEXT.format(**facts))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._console.close()
        self._writer.close()

    def waiting_for_data(self) -> AbstractContextManager:
        return self._timer.data_wait()

    def paused(self, pending: jax.Array) -> AbstractContextManager:
        """Leaves the time inside out of the rates, after waiting for `pending`."""
        return self._timer.pause(pending)

    @property
    def waited(self) -> float:
        """Seconds in all that the loop waited for data."""
        return self._timer.waited

    def due(self, step: int) -> bool:
        """Whether `step` is recorded, also if it is not the last."""
        return step == self._first or step % self._every == 0

    def step(
        self, step: int, metrics: dict[str, jax.Array], *, last: bool = False, **more: Any
    ) -> None:
        """Waits until `step` is done, and records it, with `more`, if its turn has come."""
        jax.block_until_ready(metrics)
        self._losses.append(metrics["loss"])
        if not (last or self.due(step)):
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        losses = [loss for loss in map(float, jax.device_get(self._losses)) if math.isfinite(loss)]
        self._losses = []
        mean = math.fsum(losses) / len(losses) if losses else math.nan
        record = {
            "loss": values["loss"],
            "mean_loss": mean,
            "bits_per_byte": to_bits_per_byte(mean, self._dataset, step * self._batch_size),
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "skipped_steps": values["skipped"] - self._skipped,
            "memory_gib": memory_gib(jax.local_devices()),
        }
        self._skipped = values["skipped"]
        self._writer.train(step, record | self._timer.report(step) | more)

    def eval(self, step: int, result: dict[str, float]) -> None:
        seconds = round(self._timer.last_pause, 4)
        self._writer.eval(step, result | {"seconds": seconds})

    def fingerprints(self, step: int, arrays: dict[str, str]) -> None:
        self._writer.fingerprints(step, arrays)

    def event(self, step: int, name: str, **details: Any) -> None:
        self._writer.event(step, name, **details)


def _step_flops(experiment: Experiment, dataset: Steps, start: int) -> float:
    """Returns the mean model FLOPs of the steps to come, estimated from a sample of them.

    Attention is counted within each packed document, padding not at all.
    """
    size, last = experiment.train.batch_size, max(experiment.train.steps - 1, start)
    steps = np.unique(np.linspace(start, last, _SAMPLED).astype(np.int64)).tolist()
    return statistics.fmean(
        train_flops(experiment.model, dataset.segments(step * size, size)) for step in steps
    )


def _facts(experiment: Experiment, mesh: Mesh, dataset: Steps, tokens: int) -> dict[str, Any]:
    """What the report says about a run."""
    return {
        "parameters": spec.count(param_specs(experiment.model)),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "devices": mesh.size,
        "device": mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "versions": library_versions(),
        "steps": experiment.train.steps,
        "tokens_per_step": tokens,
        "rows_per_epoch": dataset.rows_per_epoch,
    }
