"""Where the time of a run went: steps that were kept, and everything else by its cause.

Computed from metrics.jsonl and incidents.jsonl alone, for a run that goes on, ended or crashed, on
any machine. Goodput is the time that the steps kept would have taken at the median step time, as a
share of the wall time since the first start; the word and the accounting by cause are those of ML
Productivity Goodput (Google, 2024). A fault begins, as far as the records know, with the last of
them before it.
"""

import contextlib
import json
import math
import os
import statistics
from dataclasses import dataclass
from typing import Any

from checkpoint.files import read_lines
from checkpoint.steps import folder_path
from trainer.console import format_duration
from trainer.metrics import all_records

INCIDENTS = "incidents.jsonl"
CAUSES = ("detect", "restart", "compile", "rework", "data wait", "save", "eval")
_FAULTS = ("crash", "hang", "host lost")
_COLOURS = {"train": "#2563a8", "compile": "#d9622b", "stopped": "#e4e6ea"}
_BEGINS, _ENDS = ("start", "resumed"), ("stopped", "finished")


@dataclass(frozen=True)
class Span:
    """A piece of the timeline, in Unix seconds: one of CAUSES, "train" or "stopped"."""

    kind: str
    begin: float
    end: float


@dataclass(frozen=True)
class Goodput:
    """What became of a run's wall time, in seconds.

    Attributes:
      wall: from the first start to the last record, without the time that the run was stopped.
      good: steps kept, at the median step time.
      bad: seconds by cause; what remains of `wall` is slower steps and what is not recorded.
      faults, lost_steps: crashes, hangs and rewinds; steps that were done twice.
      detect, recover: mean seconds from a fault to its detection, and to the next step.
    """

    wall: float
    good: float
    bad: dict[str, float]
    faults: int
    lost_steps: int
    detect: float | None
    recover: float | None
    spans: tuple[Span, ...]

    @property
    def share(self) -> float:
        return min(1.0, self.good / self.wall) if self.wall else 0.0


def read_incidents(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns what `torus launch` wrote down; a line torn by a crash is left out."""
    path, found = folder_path(run) / INCIDENTS, []
    for line in read_lines(path) if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [incident for incident in found if isinstance(incident, dict) and _sound(incident)]


def unrecovered(incidents: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the first fault since the run last recovered, was stopped or gave up, or None."""
    fault = None
    for incident in incidents:
        if incident["kind"] in ("recovered", "stopped") or "exit" in incident:
            fault = None
        elif incident["kind"] in _FAULTS and fault is None:
            fault = incident
    return fault


def _sound(incident: dict[str, Any]) -> bool:
    """Whether a record has the fields that are read of it, and of their types."""
    numbers = (incident.get(name, 0) for name in ("time", "step", "checkpoint", "seconds"))
    return isinstance(incident.get("kind"), str) and all(
        isinstance(number, int | float) and math.isfinite(number) for number in numbers
    )


def failures(run: str | os.PathLike[str]) -> tuple[int, float]:
    """Returns how many faults a run had, in how many hours that it was up."""
    attempts = _attempts(all_records(run))
    seconds = sum(attempt[-1]["time"] - attempt[0]["time"] for attempt in attempts)
    faults = sum(incident.get("kind") in _FAULTS for incident in read_incidents(run))
    return faults, seconds / 3600


def _attempts(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Returns the records of each start of the run, in order."""
    attempts: list[list[dict[str, Any]]] = []
    for record in records:
        if (record["kind"] == "event" and record.get("event") in _BEGINS) or not attempts:
            attempts.append([])
        attempts[-1].append(record)
    return attempts


def measure(run: str | os.PathLike[str]) -> Goodput | None:
    """Returns the accounts of a run, or None before its second step was recorded."""
    records = all_records(run)
    attempts = _attempts(records)
    steps = [r["step_ms"] / 1e3 for r in records if r.get("step_ms")]
    if not steps:
        return None
    usual = statistics.median(steps)
    faults = [i for i in read_incidents(run) if i.get("kind") in _FAULTS]
    recoveries = [i.get("seconds", 0.0) for i in read_incidents(run) if i["kind"] == "recovered"]
    bad, spans = dict.fromkeys(CAUSES, 0.0), []
    detected, recovered, lost, stopped = [], [], 0, 0.0
    before: list[dict[str, Any]] = []
    for attempt in attempts:
        begin, trained = attempt[0], [r for r in attempt if r["kind"] == "train"]
        first = max(begin["time"], trained[0]["time"] - usual) if trained else attempt[-1]["time"]
        if before:
            ended = before[-1]["time"]
            seen = [  # "ending" is how long the supervisor took from noticing to the line
                max(ended, i["time"] - i.get("ending", 0.0))
                for i in faults
                if ended <= i["time"] <= begin["time"]
            ]
            if before[-1].get("event") in _ENDS:
                spans.append(Span("stopped", ended, begin["time"]))
                stopped += begin["time"] - ended
            else:
                found = seen[0] if seen else ended
                spans += [Span("detect", ended, found), Span("restart", found, begin["time"])]
                detected += [found - ended] if seen else []
                recovered.append(first + usual - ended)
                lost += max(0, max(r["step"] for r in before) - begin["step"])
        spans += [Span("compile", begin["time"], first), Span("train", first, attempt[-1]["time"])]
        for record, previous in zip(trained[1:], trained, strict=False):
            waited = (record.get("data_wait_ms") or 0.0) / 1e3
            bad["data wait"] += waited * (record["step"] - previous["step"])
        for record in attempt:
            cause = "eval" if record["kind"] == "eval" else "save"
            if cause == "eval" or record.get("event") == "checkpoint":
                bad[cause] += record.get("seconds", 0.0)
        before = attempt
    for span in spans:
        if span.kind in bad:
            bad[span.kind] += span.end - span.begin
    bad["rework"] = lost * usual
    wall = records[-1]["time"] - records[0]["time"] - stopped
    good = usual * max(r["step"] for r in attempts[-1])
    rewinds = sum(r.get("event") == "rewind" for r in records)
    return Goodput(
        wall, good, bad, len(faults) + rewinds, lost, _mean(detected),
        _mean(recoveries or recovered), tuple(s for s in spans if s.end > s.begin),
    )  # fmt: skip


def accounts(found: Goodput | None) -> list[tuple[str, str | None]]:
    """Returns what became of the wall time as (label, text) for the report."""
    if found is None:
        return []
    lost = {cause: seconds for cause, seconds in found.bad.items() if seconds >= 0.05}
    most = sorted(lost, key=lambda cause: -lost[cause])
    faults = [
        f"{found.faults}, {found.lost_steps} steps lost",
        *([] if found.detect is None else [f"found after {found.detect:.1f} s"]),
        *([] if found.recover is None else [f"over after {found.recover:.1f} s"]),
    ]
    share = f"{100 * found.share:.1f}% of {format_duration(found.wall)} were steps that count"
    return [
        ("Goodput", share),
        ("Lost to", ", ".join(f"{cause} {lost[cause]:.1f} s" for cause in most) or None),
        ("Faults", ", ".join(faults) if found.faults else None),
    ]


def timeline(found: Goodput | None) -> str:
    """Returns HTML: the run over wall time as one bar, training and what was not."""
    if found is None or len(found.spans) < 3:
        return ""
    begin, end = found.spans[0].begin, found.spans[-1].end
    pieces = "".join(
        f'<i title="{span.kind} {span.end - span.begin:.1f} s" style="position:absolute;top:0;'
        f"height:100%;left:{100 * (span.begin - begin) / (end - begin):.3f}%;background:"
        f"{_COLOURS.get(span.kind, '#c0262d')};"
        f'width:{100 * (span.end - span.begin) / (end - begin):.3f}%"></i>'
        for span in found.spans
    )
    return (
        "<h2>Timeline</h2><p>Wall time: training blue, compilation orange, detection and restart "
        "red, stopped grey.</p>"
        f'<div style="position:relative;height:22px">{pieces}</div>\n'
    )


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
