"""What a run says about itself: the records of metrics.jsonl, and honest step timing.

`MetricsWriter` appends one JSON object per line to <run>/metrics.jsonl, mirrors the numbers to
TensorBoard and hands every record to the console; only process 0 writes. `StepTimer` turns clock
readings into rates. `read_metrics` is the only reader. Nothing here imports JAX, so that configs
and reports load at once.

A record has "kind" ("train", "eval" or "event"), "step" (updates done when it was written: the
record of step n describes the state that checkpoint n holds) and "time" (Unix seconds). Train
records carry the fields of `TRAIN_FIELDS`. NaN and infinities, which JSON lacks, are written as
the strings "NaN", "Infinity" and "-Infinity", and come back from `read_metrics` as floats.
"""

import contextlib
import importlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from checkpoint.files import LINE, open_file, read_lines
from checkpoint.steps import folder_path, is_remote
from sharding.errors import UsageError
from sharding.fields import Fields

TRAIN_FIELDS = (
    "loss",  # nats per target token, of this step
    "mean_loss",  # of the steps since the last record whose loss is finite
    "bits_per_byte",  # of mean_loss; only where bytes per token are known and all text is predicted
    "grad_norm",  # global norm before clipping
    "learning_rate",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "mfu",  # share of the devices' peak, 0 to 1; null where the peak is not known, as on CPU
    "step_ms",
    "data_wait_ms",  # per step, the time the loop waited for the next batch
    "skipped_steps",  # updates not applied since the last record, because they were not finite
    "memory_gib",  # highest device memory in use; of the process on CPU
    "tokens_seen",
    "eta_seconds",
    "slowest",  # by phase: which process, times the others' median, times its own; several only
)
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class LogConfig(Fields, at="config.log"):
    """What is written while training runs, and which steps are profiled."""

    every: int = 10  # steps between log lines, each a record of metrics.jsonl
    fingerprint_every: int = 0  # steps between fingerprints for `torus replay`; 0 = never
    tensorboard: bool = True  # also write the numbers to RUN/tensorboard
    profile_start: int = -1  # first step that is traced into RUN/profile; -1 = none
    profile_steps: int = 3  # how many steps are traced

    def validate(self) -> None:
        """Raises UsageError for values that cannot be used."""
        if self.every < 1:
            raise UsageError(f"config.log.every = {self.every}: must be at least 1")
        if self.fingerprint_every < 0:
            raise UsageError(f"config.log.fingerprint_every = {self.fingerprint_every}: at least 0")
        if self.profile_start < -1:
            raise UsageError(
                f"config.log.profile_start = {self.profile_start}: a step number, or -1 for none"
            )
        if self.profile_steps < 1:
            raise UsageError(f"config.log.profile_steps = {self.profile_steps}: must be at least 1")


class RecordSink(Protocol):
    """Anything that shows records as they are written, such as `trainer.console.Console`."""

    def show(self, record: Mapping[str, Any]) -> None: ...


class MetricsWriter:
    """Writes the records of one run. A context manager; processes other than 0 write nothing."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        console: RecordSink | None = None,
        tensorboard: bool = True,
        resumed_from: int | None = None,
        process_index: int = 0,
    ) -> None:
        """Opens <workdir>/metrics.jsonl for appending.

        Args:
          workdir: the run's folder, created if it is missing. In an object store, where nothing
            can be appended, the file is rewritten about once a minute, without TensorBoard.
          console: shown every record.
          tensorboard: also write scalars to <workdir>/tensorboard.
          resumed_from: step of the checkpoint that this attempt continues from, 0 for none. Train
            and eval records of later steps, left by an earlier attempt, are superseded.
          process_index: of this process in the job.
        """
        self._console = console
        self._file: Any = None
        self._tensorboard: Any = None
        self._importing: threading.Thread | None = None
        if process_index != 0:
            return
        folder = folder_path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        continued = path.exists()
        if is_remote(workdir):
            self._file, tensorboard = _RewrittenFile(path), False
        else:
            _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        if tensorboard:
            # tensorboardX imports PyTorch when it finds it, which takes seconds: behind the first
            # compilation they cost nothing.
            self._importing = threading.Thread(
                target=importlib.import_module, args=("tensorboardX",), daemon=True
            )
            self._importing.start()
        self._tensorboard_options = {
            "logdir": str(folder / "tensorboard"),
            # What an earlier attempt drew of later steps goes, also when it was begun anew.
            "purge_step": (resumed_from or 0) + 1 if continued else None,
        }
        if resumed_from is not None and continued:
            self.event(resumed_from, "resumed")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one train record; `values` are the fields of `TRAIN_FIELDS` that are known."""
        self._write("train", step, values)

    def eval(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one eval record, such as {"loss": 1.2, "bits_per_byte": 1.7, "tokens": 65536}."""
        self._write("eval", step, values)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Writes one event record: a start, a checkpoint, an incident. `details` must be JSON.

        Names that the report knows: "start" (facts of the run: parameters, mesh, devices, device,
        versions, steps, tokens_per_step), "resumed", "checkpoint", "baseline"
        (gzip_bits_per_byte, xz_bits_per_byte), "stopped", "finished". Any other is an incident.
        """
        self._write("event", step, {"event": event, **details})

    def fingerprints(self, step: int, arrays: Mapping[str, str]) -> None:
        """Writes the fingerprints of all arrays after `step`, by name; for the file alone."""
        self._write("fingerprints", step, {"arrays": arrays})

    def close(self) -> None:
        """Flushes and closes all outputs; safe to call twice."""
        if self._importing is not None:
            self._importing.join()
            self._importing = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        record = {"kind": kind, "step": int(step), "time": round(time.time(), 3)}
        record |= {name: plain_value(value) for name, value in values.items()}
        self._file.write(json.dumps(_without_specials(record), allow_nan=False) + "\n")
        if kind in ("train", "eval"):
            self._write_tensorboard(record)
        if self._console is not None and kind != "fingerprints":
            self._console.show(record)

    def _write_tensorboard(self, record: Mapping[str, Any]) -> None:
        if self._importing is not None:
            self._importing.join()
            self._importing = None
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(**self._tensorboard_options, flush_secs=20)
        if self._tensorboard is None:
            return
        for name, value in record.items():
            if name in ("kind", "step", "time") or isinstance(value, bool | str | list | dict):
                continue
            if value is not None and math.isfinite(value):
                self._tensorboard.add_scalar(
                    f"{record['kind']}/{name}", value, record["step"], walltime=record["time"]
                )


def all_records(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns every valid record as it was written, those of work that was lost too."""
    path = folder_path(run)
    if path.is_dir():
        path = path / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else ()
    return [record for line in lines if (record := _parse(line)) is not None]


def read_metrics(run: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """Returns the valid records of a run folder (or of one metrics file), oldest first.

    Of train and eval records the last of each (kind, step) counts, and a "start" or "resumed" event
    drops those of later steps that came before it: they belong to work that was lost. Events are
    history and all stay. Lines that are not records (torn by a crash) are passed over. A missing
    file is an empty run.
    """
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, record in enumerate(all_records(run)):
        if record["kind"] == "event":
            if record.get("event") in ("start", "resumed"):
                kept = {
                    key: old
                    for key, old in kept.items()
                    if old["kind"] == "event" or old["step"] <= record["step"]
                }
            kept["event", number] = record
        else:
            key = (record["kind"], record["step"])
            kept.pop(key, None)
            kept[key] = record
    return [record for record in kept.values() if kind is None or record["kind"] == kind]


def bits_per_byte(loss: float, bytes_per_token: float = 1.0) -> float:
    """Returns a loss in nats per token as bits per byte of text, comparable with any compressor."""
    return loss / math.log(2) / bytes_per_token


def memory_gib(devices: list[Any]) -> float:
    """Returns the highest memory in use so far on any of `devices`, in GiB.

    Devices without memory statistics (CPU) count as the peak resident memory of this process.
    """
    stats = [device.memory_stats() or {} for device in devices]
    peak = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    if not peak:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak / 2**30


class StepTimer:
    """Rates between two points at which the device was known to be done.

    The contract that makes them honest: call `report(step)` only after the loss of `step` has been
    fetched to the host, so that its work is over and not merely queued. The first call starts the
    clock and has no rates, which leaves compilation and the first step out. Evaluation and saving
    run inside `pause()` and are left out of rates, but not out of the ETA. `data_wait_ms` is time
    the loop spent waiting for its next batch; it is part of `step_ms` unless the device, still
    busy, hides it.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        tokens_per_step: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        device_count: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepares a timer; `flops_per_step` and `peak_flops` cover the whole job's devices."""
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._flops_per_step = flops_per_step
        self._peak_flops = peak_flops
        self._device_count = device_count
        self._clock = clock
        self._began: tuple[int, float] | None = None  # (step, clock) of the first report
        self._last: tuple[int, float] = (0, 0.0)
        self._paused = 0.0
        self._waited = 0.0
        self.last_pause = 0.0  # seconds
        self.waited = 0.0  # seconds in all that the loop waited for data

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Counts the time inside as waiting for data: wrap the `next(batches)` of the loop."""
        start = self._clock()
        yield
        seconds = self._clock() - start
        self._waited += seconds
        self.waited += seconds

    @contextlib.contextmanager
    def pause(self, pending: Any = None) -> Iterator[None]:
        """Leaves the time inside out of the rates: wrap evaluation and saving.

        Pass the newest step's loss as `pending`: it is waited for first, or else the rest of a
        running step would be hidden in the pause and the rates would come out too high.
        """
        if pending is not None:
            pending.block_until_ready()
        start = self._clock()
        yield
        self.last_pause = self._clock() - start
        self._paused += self.last_pause

    def report(self, step: int) -> dict[str, Any]:
        """Returns the timing fields of a train record for the steps since the last report."""
        now = self._clock()
        fields: dict[str, Any] = {"tokens_seen": step * self._tokens_per_step}
        if self._began is None:
            self._began = (step, now)
        elif step > self._last[0]:
            steps = step - self._last[0]
            seconds = max(now - self._last[1] - self._paused, 1e-9) / steps
            rate = self._tokens_per_step / seconds
            fields |= {
                "tokens_per_second": rate,
                "tokens_per_second_per_device": rate / self._device_count,
                "mfu": None,
                "step_ms": 1e3 * seconds,
                "data_wait_ms": 1e3 * self._waited / steps,
            }
            if self._flops_per_step and self._peak_flops:
                fields["mfu"] = self._flops_per_step / seconds / self._peak_flops
            pace = (now - self._began[1]) / (step - self._began[0])
            fields["eta_seconds"] = pace * max(self._total_steps - step, 0)
        self._last, self._paused, self._waited = (step, now), 0.0, 0.0
        return fields


def plain_value(value: Any) -> Any:
    """Returns `value` as plain JSON types: arrays of one element become numbers, paths strings."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain_value(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(entry) for entry in value]
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def _without_specials(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: _without_specials(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_specials(entry) for entry in value]
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also UnicodeDecodeError: a crash tears lines anywhere
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    if not isinstance(record.get("kind"), str) or not isinstance(record.get("time"), int | float):
        return None
    return {
        name: _SPECIAL.get(value, value) if isinstance(value, str) else value
        for name, value in record.items()
    }


def _drop_torn_line(path: Path) -> None:
    """Cuts a last line without its newline, so that what is appended starts on its own line."""
    if not path.exists():
        return
    open_file(path).close()  # refuses what is not a regular file
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - LINE)
            file.seek(start)
            if (last := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + last + 1
                break
            end = start
        file.truncate(end)


class _RewrittenFile:
    """A text file in an object store: kept in memory, and written whole from time to time."""

    _SECONDS = 60.0

    def __init__(self, path: Path) -> None:
        self._path = path
        content = path.read_bytes() if path.exists() else b""
        self._content = bytearray(content[: content.rfind(b"\n") + 1])
        self._written = time.monotonic()

    def write(self, line: str) -> None:
        self._content += line.encode()
        if time.monotonic() - self._written > self._SECONDS:
            self._rewrite()

    def close(self) -> None:
        self._rewrite()

    def _rewrite(self) -> None:
        self._written = time.monotonic()
        try:
            self._path.write_bytes(bytes(self._content))
        except Exception:  # each store has its own errors, and none is worth a training run
            from absl import logging

            logging.exception("could not write %s; the next attempt follows", self._path)
