"""What watches over a run from inside its loop: spikes, rewinds, silent corruption, cadence.

The loop hands every step through `Guard.step` and its metrics to `Guard.observe`, one step late, so
that the device never waits. The rules are in trainer/recovery/health.py, the comparisons in
trainer/integrity.py; this file owns when they are asked and what follows: a line in the records, a
checkpoint called good, a rewind, or the end with a status that says why.
"""

import functools
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, reshard

from checkpoint.agreement import first
from checkpoint.fingerprint import as_text, fingerprints
from checkpoint.manager import CheckpointManager
from checkpoint.manifest import read_meta
from checkpoint.steps import folder_path
from checkpoint.tree import flatten
from sharding.config import AXES
from trainer.config import Experiment
from trainer.data.rows import Steps
from trainer.goodput import failures
from trainer.integrity import Odd, device_sums, odd_repeats, odd_replicas, replicated, self_check
from trainer.journal import Journal
from trainer.recovery.cadence import hours_between_failures, steps_between_saves
from trainer.recovery.chaos import Chaos
from trainer.recovery.health import DIVERGED, Rewinds, Unhealthy, Watch
from trainer.recovery.progress import VARIABLE, ProgressPage
from trainer.recovery.stragglers import Scores
from trainer.restore import Start
from trainer.state import Layout, TrainState, to_stored

_TIMED = 64  # steps whose median is the step time
_ENOUGH = 8


class Rewind(Exception):
    """The run goes back: where to is in its folder."""


@dataclass(frozen=True)
class _Sums:
    """Sums of bits under way on the devices: of a step's replicas, or of it and of its repeat."""

    step: int
    specs: dict[str, PartitionSpec]
    once: jax.Array
    again: jax.Array | None


class Guard:
    """One run's guard: made before the devices are asked for, begun when its state is there."""

    def __init__(self, experiment: Experiment, workdir: str) -> None:
        """Raises UsageError for a schedule of faults that is none."""
        self._experiment, self._config = experiment, experiment.health
        self._workdir, self._identity = workdir, asdict(experiment)
        self._chaos = Chaos(self._config.chaos, experiment.train.steps, workdir)

    def page(self) -> ProgressPage:
        """Returns the page that this process's supervisor watches."""
        return self._chaos.page(ProgressPage.of_this_process())

    def data(self, dataset: Steps) -> Steps:
        """Returns the dataset that training reads."""
        return self._chaos.data(dataset)

    def check(self, mesh: Mesh) -> None:
        """Tries devices, links and files where that was asked for, and under a supervisor.

        Raises:
          Unhealthy: naming what failed.
        """
        if self._experiment.train.self_check or VARIABLE in os.environ:
            self_check(mesh, self._workdir)

    def begin(
        self, start: Start, layout: Layout, journal: Journal, checkpoints: CheckpointManager
    ) -> None:
        """Takes up the watch where the checkpoint that the run goes on from left it."""
        self._start, self._layout = start, layout
        self._journal, self._checkpoints = journal, checkpoints
        self._step = self._agreed = start.step
        self._skipped = int(start.state.skipped)
        self._newest: dict[str, jax.Array] | None = None  # metrics that nobody has looked at
        self._sums: deque[_Sums] = deque()
        self._prints: deque[tuple[int, list[str], jax.Array]] = deque()
        self._unproven = sorted(set(checkpoints.steps()) - set(checkpoints.good_steps()))
        self._seconds, self._looked = deque(maxlen=_TIMED), math.nan
        self._scores, self._times, self._dispatched = Scores(), None, 0.0
        self._told = start.step, 0.0, 0.0  # when times were last exchanged: step and totals
        self._past = start.past
        kept = start.meta.get("health", {})
        self._watch = Watch(self._config, kept)
        if pending := kept.get("pending"):
            step, loss, norm, left_out = pending
            self._judge(step, *(math.nan if v is None else v for v in (loss, norm)), left_out)

    def meta(self, data: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """Returns what gives the meta of a state after the newest step, waiting until it is done.

        data: where the data is, for the same step.
        """
        known = self._watch.state(), self._past.count, self._newest, self._step, self._skipped
        return functools.partial(self._meta, data, *known)

    def _meta(
        self, data: dict[str, Any], watch: dict[str, Any], rewinds: int,
        newest: dict[str, jax.Array] | None, step: int, before: int,
    ) -> dict[str, Any]:  # fmt: skip
        pending = None
        if newest is not None:
            loss, norm, skipped = _numbers(newest)
            known = (value if math.isfinite(value) else None for value in (loss, norm))
            pending = [step, *known, skipped > before]
        return {
            "data": data,
            "experiment": self._identity,
            "rewinds": rewinds,
            "health": watch | {"pending": pending},
        }

    def saved(self, step: int) -> None:
        """Takes note of a checkpoint, and of what it cost."""
        seconds = self._checkpoints.blocked
        self._journal.event(step, "checkpoint", seconds=round(seconds, 4))
        self._unproven.append(step)
        if self._experiment.checkpoint.every >= 0 or len(self._seconds) < _ENOUGH:
            return
        took = statistics.median(self._seconds)
        every, hours = first(lambda: self._cadence(seconds, took))
        if every != self._checkpoints.every:
            self._checkpoints.every = every
            self._journal.event(
                step, "cadence", every=every, save_seconds=round(seconds, 4),
                step_seconds=round(took, 4), hours_between_failures=round(hours, 1),
            )  # fmt: skip

    def _cadence(self, seconds: float, took: float) -> tuple[int, float]:
        """Returns the steps between saves, and the hours between failures that they follow from."""
        hours = hours_between_failures(jax.device_count(), *failures(self._workdir))
        return steps_between_saves(seconds, took, hours), hours

    # ------------------------------------------------------------ every step

    def programs(self, batch: dict) -> Hashable:
        """Returns a name for what the next step and its comparisons run: new ones are compiled."""
        number = self._step + 1
        due = (
            _due(number, every)
            for every in (
                self._config.replay_every,
                self._config.compare_every,
                self._experiment.log.fingerprint_every,
            )
        )
        # The second step waits for the first one, which is run without its phase being left.
        second = number - self._start.step > 1
        exchange = self._told[0] == self._start.step and self._journal.due(self._step)
        return batch["tokens"].shape[1], *due, second, exchange

    def step(self, train_step: Callable, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        """Takes one step, and starts whatever comparison of its result is due."""
        number = self._step + 1
        state, config = self._chaos.flip(number, state), self._config
        arguments = (batch, self._limits(number)) if config.skip_spikes else (batch,)
        again = None
        if _due(number, config.replay_every):
            again, _ = train_step(_copy(state), *arguments)
            again = device_sums(list(flatten(to_stored(again)).values()))
        batch_number = self._row(number) // self._experiment.train.batch_size
        began = time.monotonic()
        state, self._newest = self._chaos.step(batch_number, train_step, state, *arguments)
        self._dispatched += time.monotonic() - began
        self._step = number
        if again is not None:
            once = device_sums(list(flatten(to_stored(state)).values()))
            self._sums.append(_Sums(number, {}, once, again))
        if _due(number, config.compare_every):
            shared = replicated(flatten(to_stored(state)))
            specs = {name: array.sharding.spec for name, array in shared.items()}
            if shared:
                self._sums.append(_Sums(number, specs, device_sums(list(shared.values())), None))
        if _due(number, self._experiment.log.fingerprint_every):
            stored = to_stored(state)
            self._prints.append((number, list(flatten(stored)), fingerprints(stored)))
        return state, self._newest

    def observe(self, step: int, metrics: dict[str, jax.Array], *, last: bool = False) -> None:
        """Records a step that is done, and judges it.

        Raises:
          Rewind: it will not get better by itself. Unhealthy: nor by going back; or a device lies.
        """
        self._journal.step(step, metrics, last=last, **self._slowest(step))
        now = time.monotonic()
        self._seconds.extend([now - self._looked] if self._looked == self._looked else [])
        self._looked = now
        if step == self._step:
            self._newest = None
        while self._prints and self._prints[0][0] <= step:
            number, names, found = self._prints.popleft()
            self._journal.fingerprints(number, as_text(found, names))
        self._compare(step)
        loss, norm, skipped = _numbers(metrics)
        left_out, self._skipped = skipped > self._skipped, skipped
        self._judge(step, loss, norm, left_out)
        if last and skipped == step:  # too short a run for a rewind
            raise Unhealthy(DIVERGED, f"all {step} updates were left out: nothing was learned")

    def _slowest(self, step: int) -> dict[str, Any]:
        """Who was the slowest at the last exchange of times; begins another at log steps."""
        if jax.process_count() == 1 or not self._journal.due(step) or step <= self._told[0]:
            return {}
        mesh, found = self._layout.mesh, {}
        if self._times is not None:
            rows = dict(zip(mesh.devices.flat, np.asarray(self._times), strict=True))
            of_process = {device.process_index: row for device, row in rows.items()}
            found = {
                "slowest": self._scores.update(v.tolist() for _, v in sorted(of_process.items()))
            }
        now = step, self._journal.waited, self._dispatched
        mine = [
            1e3 * (b - a) / (step - self._told[0]) for a, b in zip(self._told, now, strict=True)
        ]
        self._told, times = now, np.asarray([mine[1:]], np.float32)
        with jax.transfer_guard("allow"):
            own = jax.make_array_from_callback(
                (mesh.size, 2), NamedSharding(mesh, PartitionSpec(AXES)), lambda _: times
            )
        self._times = _everywhere(own)
        return found

    def _limits(self, step: int) -> jax.Array:
        limits = np.asarray(self._watch.limits(step), np.float32)
        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback(
                limits.shape, self._layout.replicated, lambda index: limits[index]
            )

    def _row(self, step: int) -> int:
        """The first row of data after `step`."""
        return self._start.row + (step - self._start.step) * self._experiment.train.batch_size

    def _judge(self, step: int, loss: float, norm: float, left_out: bool) -> None:
        if verdict := self._watch.judge(step, loss, norm, left_out):
            update = "left out" if left_out else "kept"
            self._journal.event(step, verdict, loss=loss, grad_norm=norm, update=update)
            if self._watch.sustained:
                self._rewind(step)
        self._mark_good()

    def _mark_good(self) -> None:
        if proven := [step for step in self._unproven if step <= self._watch.good]:
            marked = self._checkpoints.mark_good(proven)
            self._unproven = [step for step in self._unproven if step not in marked]

    # ------------------------------------------------------------ consequences

    def _rewind(self, step: int) -> None:
        budget = self._config.rewinds
        if self._past.spent >= budget:
            raise Unhealthy(
                DIVERGED,
                f"step {step}: {self._config.sustained} of the last {2 * self._config.sustained} "
                f"steps were unhealthy, and all {budget} rewinds are spent: lower the learning "
                "rate, or look at the data (torus report)",
            )
        self._checkpoints.wait()
        self._mark_good()  # those too that were still being written when they had proved good
        to = first(lambda: max(self._checkpoints.good_steps(), default=0))
        self._go_back(step, to, self._row(step), self._past.spent + 1)
        raise Rewind

    def _compare(self, step: int) -> None:
        mesh = self._layout.mesh
        while self._sums and self._sums[0].step <= step:
            sums = self._sums.popleft()
            once = np.asarray(sums.once)
            if sums.again is not None:
                odd = odd_repeats(once, np.asarray(sums.again), mesh)
            else:
                odd = odd_replicas(once, sums.specs, mesh)
            if odd is not None:
                self._suspect(sums.step, odd)
            self._agreed = sums.step

    def _suspect(self, step: int, odd: Odd) -> None:
        """Gives up what was saved since the devices last agreed, and ends the run here."""
        self._journal.event(step, "corruption", what=str(odd))
        self._checkpoints.wait()
        to, row = first(self._intact)
        self._go_back(step, to, row, self._past.spent)
        raise Unhealthy(odd.status, f"step {step}: {odd}; the run goes on from step {to}")

    def _intact(self) -> tuple[int, int]:
        """Returns the newest step saved before the devices differed, and the row after it."""
        to = max((step for step in self._checkpoints.steps() if step <= self._agreed), default=0)
        if not to:
            return 0, self._past.row if self._past.count else 0
        meta = read_meta(self._checkpoints.folder, to)
        return to, self._past.row_after(meta, meta["data"]["next_row"])

    def _go_back(self, step: int, to: int, row: int, spent: int) -> None:
        past = Rewinds(self._past.count + 1, spent, to, row)
        first(lambda: past.write(folder_path(self._workdir)))
        self._journal.event(step, "rewind", to=to, lost_steps=step - to, row=row)


@jax.jit
def _everywhere(array: jax.Array) -> jax.Array:
    return reshard(array, PartitionSpec())


@jax.jit
def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _numbers(metrics: dict[str, jax.Array]) -> tuple[float, float, int]:
    names = ("loss", "grad_norm", "skipped")
    loss, norm, skipped = jax.device_get([metrics[name] for name in names])
    return float(loss), float(norm), int(skipped)
