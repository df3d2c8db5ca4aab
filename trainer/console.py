"""What a person watching a run sees: one line per record, and on a terminal a progress bar below.

Owns the wording of log lines and nothing of the records themselves (trainer/metrics.py). Without a
terminal every line is plain text, so that a log file, `grep` and `tail -f` stay useful.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from trainer.terminal import bare, one_line


class Console:
    """Shows the records of one run on a stream. A context manager that always leaves it sane.

    The bar needs no clean-up to leave a usable terminal: the cursor stays visible, so that a run
    that is killed outright cannot take it along.
    """

    def __init__(
        self, total_steps: int, stream: TextIO | None = None, *, live: bool | None = None
    ) -> None:
        """Prepares a console; `live` forces the bar on or off, by default a terminal gets it."""
        self._total = total_steps
        self._stream = sys.stdout if stream is None else stream
        if live is None:
            live = self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._live = live
        self._progress: Any = None  # rich.progress.Progress once the first step is known

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, record: Mapping[str, Any]) -> None:
        """Prints one record as a line and moves the bar, if there is one, to a train record."""
        self.print(format_record(record, self._total))
        if self._live and record["kind"] == "train":
            self._advance(record)

    def print(self, line: str) -> None:
        """Prints one line, above the bar if there is one."""
        line = one_line(line)  # events hold texts of errors, and these hold names from files
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Takes the bar to its end and gives the terminal back; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _advance(self, record: Mapping[str, Any]) -> None:
        if self._progress is None:
            self._progress = _start_bar(self._stream)
            self._progress.add_task("", total=self._total, completed=record["step"], rates="")
        names = ("loss", "bits_per_byte", "tokens_per_second", "mfu", "eta_seconds")
        self._progress.update(
            self._progress.task_ids[0],
            completed=record["step"],
            rates="  ".join(_fields(_with_mean(record), names)),
        )


def format_record(record: Mapping[str, Any], total_steps: int) -> str:
    """Returns the line that shows a record, without a line end."""
    step = f"{record['step']}/{total_steps}"
    if record["kind"] == "event":
        return "  ".join([f"{record.get('event', 'event')} at step {step}", *_details(record)])
    if record["kind"] == "eval":
        return "  ".join([f"eval {step}", *_fields(record, ("loss", "bits_per_byte"))])
    return _step_line(_with_mean(record), step)


def _step_line(record: Mapping[str, Any], step: str) -> str:
    """The fields that fit in the width of a terminal; metrics.jsonl has them all."""
    names = list(_FORMATS)
    if (record.get("data_wait_ms") or 0) < _NOTICED * (record.get("step_ms") or 0):
        names.remove("data_wait_ms")
    for left_out in (None, *_LEFT_OUT):
        names = [name for name in names if name != left_out]
        line = "  ".join([f"step {step}", *_fields(record, tuple(names))])
        if len(line) <= _WIDTH:
            break
    return line


def _with_mean(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Shows the mean of the loss since the last record: a single step's says little."""
    mean = record.get("mean_loss")
    return record if mean is None else {**record, "loss": mean}


def format_duration(seconds: float) -> str:
    """Returns seconds as a person says them: "42s", "3m12s", "5h07m", "2d03h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _short(value: float) -> str:
    """Returns a count in five characters or fewer: "950", "12.3k", "4.01M"."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g}{unit}" if value < 999.5 * factor else f"{value:.1e}"
    return f"{value:.3g}"


_WIDTH = 80  # of the narrowest terminal that step lines are made for
_LEFT_OUT = ("learning_rate", "eta_seconds", "data_wait_ms", "grad_norm", "bits_per_byte")
_NOTICED = 0.05  # share of a step's time; a shorter wait for data is not shown
_FORMATS = {
    "loss": lambda v: f"loss {v:.3f}",
    "bits_per_byte": lambda v: f"bpb {v:.2f}",
    "grad_norm": lambda v: f"grad {v:.2f}",
    "learning_rate": lambda v: f"lr {v:.1e}",
    "tokens_per_second": lambda v: f"tok/s {_short(v)}",
    "mfu": lambda v: f"mfu {100 * v:.0f}%" if v >= 0.1 else f"mfu {100 * v:.1f}%",
    "data_wait_ms": lambda v: f"data {v:.1f} ms",
    "skipped_steps": lambda v: f"SKIPPED {v:.0f}" if v else "",
    "eta_seconds": lambda v: f"eta {format_duration(v)}",
}


def _fields(record: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    known = (_FORMATS[name](record[name]) for name in names if record.get(name) is not None)
    return [text for text in known if text]


def _details(record: Mapping[str, Any]) -> list[str]:
    """The short facts of an event; those with structure are for the report."""
    lines = []
    for name, value in record.items():
        if name in ("kind", "step", "time", "event") or isinstance(value, list | dict):
            continue
        if isinstance(value, bool | str) or value is None:
            text = str(value)
        elif isinstance(value, int):
            text = f"{value:,}"
        else:
            text = f"{value:.4g}"
        lines.append(f"{name} {text}")
    return lines


def _start_bar(stream: TextIO) -> Any:
    """Returns a running rich progress bar; imported here because the import takes 50-100 ms."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    terminal = RichConsole(file=bare(stream), force_terminal=True)
    progress = Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}", markup=False),
        console=terminal,
        refresh_per_second=4,
    )
    progress.start()
    terminal.show_cursor(True)
    return progress
