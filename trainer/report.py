"""A run as one picture and one page: report.png and report.html, made from the run's folder alone.

Reads metrics.jsonl, incidents.jsonl, experiment.json and the names of the checkpoints, and needs
neither JAX nor the devices, so it works on a run that is going on, has crashed, or was copied to a
laptop. The page refers to nothing outside itself.
"""

import base64
import html
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from checkpoint.steps import complete_steps, folder_path, write_whole
from sharding.errors import UsageError
from trainer.console import format_duration
from trainer.goodput import Goodput, accounts, measure, read_incidents, timeline
from trainer.metrics import read_metrics
from trainer.recovery.stragglers import worst

_TURNS = ("start", "resumed", "stopped", "finished")
_ROUTINE = (*_TURNS, "checkpoint", "baseline", "cadence")  # any other event is an incident
_TRAIN, _EVAL, _ALERT, _GREY = "#2563a8", "#d9622b", "#c0262d", "#8a8f98"
_MOST_POINTS = 2000  # per curve: more cannot be seen and would make the page heavy


@dataclass(frozen=True)
class Run:
    """Everything the report says about a run, read once."""

    folder: Path
    experiment: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    events: list[dict[str, Any]]
    checkpoints: list[int]
    goodput: Goodput | None = None

    def fact(self, name: str) -> Any:
        """Returns the newest value that an event recorded for `name`, or None."""
        return next((e[name] for e in reversed(self.events) if e.get(name) is not None), None)

    @property
    def total_steps(self) -> int | None:
        """Steps the run was asked for, where it says so."""
        return self.fact("steps") or self.experiment.get("train", {}).get("steps")

    @property
    def last_step(self) -> int:
        """The newest step of which anything was recorded."""
        return max((r["step"] for r in (*self.train, *self.evals, *self.events)), default=0)

    def status(self, now: float) -> str:
        """Returns whether the run has ended, goes on or fell silent, judged by its records."""
        of_total = f"step {self.last_step}"
        if self.total_steps:
            of_total += f" of {self.total_steps}"
        records = sorted((*self.train, *self.evals, *self.events), key=lambda r: r["time"])
        if not records:
            return "nothing recorded yet"
        turns = [e for e in self.events if _marks(e, *_TURNS)]
        if turns and _marks(turns[-1], "stopped", "finished"):
            by = f" by {turns[-1]['by']}" if turns[-1].get("by") else ""
            return f"{turns[-1]['event']} at {of_total}{by}"
        gaps = [b["time"] - a["time"] for a, b in itertools.pairwise(records)]
        silence = now - records[-1]["time"]
        if silence < max(120.0, 5 * max(gaps[-20:], default=0.0)):
            return f"running, {of_total}"
        return f"silent since {of_total}, {format_duration(silence)} before this report"


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Reads a run's folder.

    Raises:
      UsageError: the folder does not exist, or holds no run.
    """
    path = folder_path(folder)
    if not path.is_dir():
        raise UsageError(f"no run at {folder}: there is no such folder")
    if not (path / "metrics.jsonl").exists() and not (path / "experiment.json").exists():
        raise UsageError(
            f"no run at {folder}: a run's folder holds metrics.jsonl and experiment.json"
        )
    experiment = {}
    if (path / "experiment.json").exists():
        try:
            experiment = read_json(path / "experiment.json")
        except ValueError as error:
            raise UsageError(str(error)) from error
    records = read_metrics(path)
    return Run(
        folder=path,
        experiment=experiment,
        train=sorted((r for r in records if r["kind"] == "train"), key=lambda r: r["step"]),
        evals=sorted((r for r in records if r["kind"] == "eval"), key=lambda r: r["step"]),
        events=[r for r in records if r["kind"] == "event"] + _incidents(path),
        checkpoints=complete_steps(path / "checkpoints"),
        goodput=measure(path),
    )


def _incidents(folder: Path) -> list[dict[str, Any]]:
    """What `torus launch` wrote down, as events of the run."""
    found = []
    for told in read_incidents(folder):
        step = told.pop("step", max(told.get("checkpoint", 0), 0))
        found.append(told | {"kind": "event", "event": told["kind"], "step": step})
    return found


def write_report(
    folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> tuple[Path, Path]:
    """Writes report.html and report.png of a run and returns their paths.

    Args:
      folder: the run's folder.
      out: folder to write to, created if missing; the run's own by default.

    Raises:
      UsageError: `folder` holds no run, or `out` cannot be a folder.
    """
    run = load_run(folder)
    target = run.folder if out is None else folder_path(out)
    if target.exists() and not target.is_dir():
        raise UsageError(f"--out {target}: is a file; name a folder")
    target.mkdir(parents=True, exist_ok=True)
    picture = draw(run)
    page = render_html(run, picture, now=time.time())
    paths = target / "report.html", target / "report.png"
    for path, content in zip(paths, (page.encode(), picture), strict=True):
        write_whole(path, content)  # who has the page open must never load half of it
    return paths


def facts(run: Run, now: float) -> list[tuple[str, str]]:
    """Returns the run's facts as (label, text), those that are not known left out."""
    bits = [r for r in run.evals if _finite(r.get("bits_per_byte"))]
    losses = [r for r in run.evals if _finite(r.get("loss"))]
    rates = [r["tokens_per_second"] for r in run.train if _finite(r.get("tokens_per_second"))]
    mfus = [r["mfu"] for r in run.train if _finite(r.get("mfu"))]
    seen = max((r["tokens_seen"] for r in run.train if r.get("tokens_seen")), default=None)
    skipped = sum(r.get("skipped_steps") or 0 for r in run.train)
    rows: list[tuple[str, str | None]] = [
        ("Name", run.experiment.get("name")),
        ("Status", run.status(now)),
        ("Parameters", _number(run.fact("parameters"))),
        ("Mesh", _pairs(run.fact("mesh"))),
        ("Device", _device(run)),
        ("Tokens seen", _number(seen)),
        ("Train loss", _last(_losses(run.train))),
        ("Eval loss", _best_and_last(losses, "loss")),
        ("Eval bits per byte", _best_and_last(bits, "bits_per_byte")),
        ("gzip, xz bits per byte", _compressors(run)),
        ("Tokens per second", _number(_median(rates), "median ")),
        ("MFU", None if not mfus else f"median {100 * _median(mfus):.1f}%"),
        ("Peak memory", _largest(run.train, "memory_gib", "{:.2f} GiB")),
        ("Updates skipped", _number(skipped) if skipped else None),
        ("Wall time", _wall_time(run)),
        *accounts(run.goodput),
        ("Slowest process", worst(run.train)),
        ("Checkpoints", ", ".join(map(str, run.checkpoints[-12:])) or None),
        ("Versions", _pairs(run.fact("versions"))),
        ("Folder", str(run.folder)),
    ]
    return [(label, text) for label, text in rows if text]


def draw(run: Run) -> bytes:
    """Returns the run's curves as a PNG, 13 by 9 inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.04)
    grid = figure.add_gridspec(3, 3, height_ratios=(1.7, 1, 1))
    _draw_loss(figure.add_subplot(grid[0, :]), run)
    mfu = ("MFU, %", "mfu", lambda v: 100 * v, "{x:g}")
    memory = ("Highest memory in use, GiB", "memory_gib", lambda v: v, "{x:g}")  # CPU has no MFU
    panels: Sequence[tuple[str, str, Callable[[float], float], str]] = (
        ("Learning rate", "learning_rate", lambda v: v, "{x:.1e}"),
        ("Gradient norm", "grad_norm", lambda v: v, "{x:g}"),
        ("Step time, ms", "step_ms", lambda v: v, "{x:,g}"),
        ("Tokens per second", "tokens_per_second", lambda v: v, "{x:,g}"),
        mfu if _series(run.train, "mfu") else memory,
        ("Waiting for data, ms per step", "data_wait_ms", lambda v: v, "{x:,g}"),
    )
    for place, (title, field, scale, form) in enumerate(panels):
        axes = figure.add_subplot(grid[1 + place // 3, place % 3])
        points = _series(run.train, field)
        _style(axes, title)
        if points:
            steps, values = zip(*_thin(points), strict=True)
            values = [scale(value) for value in values]
            _widen(axes, steps)
            axes.plot(steps, values, color=_TRAIN, linewidth=1.4, marker=_marker(points))
            axes.yaxis.set_major_formatter(form)
            if field != "grad_norm" and min(values) >= 0:
                axes.set_ylim(0, 1.12 * max(values) or 1.0)
        else:
            _say(axes, "not recorded")
    canvas = FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    canvas.print_figure(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _draw_loss(axes: Any, run: Run) -> None:
    name = str(run.experiment.get("name") or run.folder.name)[:100]
    title = name.replace("$", r"\$")  # a pair of them would be taken for a formula
    _style(axes, f"{title}: loss, nats per token", pad=26)
    axes.set_xlabel("step", color="#444444")
    train, evals = _losses(run.train), _series(run.evals, "loss")
    if train:
        steps, losses = zip(*_thin(train), strict=True)
        smooth = len(train) >= 60
        axes.plot(
            steps, losses, color=_TRAIN, linewidth=1.0 if smooth else 1.6,
            alpha=0.3 if smooth else 1.0, marker=_marker(train),
            label=None if smooth else "train",
        )  # fmt: skip
        if smooth:
            steps, losses = zip(*_thin(_smoothed(train)), strict=True)
            axes.plot(steps, losses, color=_TRAIN, linewidth=1.8, label="train, smoothed")
    if evals:
        steps, losses = zip(*_thin(evals), strict=True)
        axes.plot(steps, losses, color=_EVAL, linewidth=1.6, marker="o", markersize=4, label="eval")
    if not train and not evals:
        _say(axes, "no loss recorded yet")
        return
    _widen(axes, [step for step, _ in (*train, *evals)])
    _scale_loss(axes, [loss for _, loss in (*train, *evals)])
    _draw_bits(axes, run)
    lost = [r["step"] for r in run.train if r.get("loss") is not None and not _finite(r["loss"])]
    if lost:
        axes.plot(
            lost, [0.02] * len(lost), "x", color=_ALERT, label="not finite",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    marks = (
        ("resumed", {"color": _GREY, "linestyle": ":"}, lambda e: _marks(e, "resumed")),
        ("incident", {"color": _ALERT, "linestyle": "-", "alpha": 0.6}, _marks),
    )
    for label, look, chosen in marks:
        for index, event in enumerate(filter(chosen, run.events)):
            axes.axvline(event["step"], linewidth=1.1, label=label if index == 0 else None, **look)
    # Between title and curves: inside, it would lie on one of them.
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, borderpad=0.3,
        ncols=8, fontsize=9, columnspacing=1.6, handlelength=1.8,
    )  # fmt: skip


def _scale_loss(axes: Any, losses: list[float]) -> None:
    """A logarithmic scale once losses span enough for the first steps to flatten the rest."""
    if min(losses) > 0 and max(losses) > 2 * min(losses):
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis)


def _plain_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), numticks=30))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _draw_bits(axes: Any, run: Run) -> None:
    """A second scale in bits per byte, with gzip and xz as marks where they were measured."""
    pairs = [
        (r.get("mean_loss", r["loss"]), r["bits_per_byte"])
        for r in (*run.train, *run.evals)
        if _finite(r.get("loss")) and _finite(r.get("bits_per_byte")) and r["bits_per_byte"] > 0
    ]
    if not pairs:
        return
    nats_per_bit = pairs[-1][0] / pairs[-1][1]
    for name, dashes in (("gzip", "--"), ("xz", "-.")):
        bits = run.fact(f"{name}_bits_per_byte")
        if _finite(bits):
            axes.axhline(
                bits * nats_per_bit, color=_GREY, linewidth=1.1, linestyle=dashes,
                label=f"{name} -9, {bits:.2f} bits per byte",
            )  # fmt: skip
    right = axes.secondary_yaxis(
        "right", functions=(lambda nats: nats / nats_per_bit, lambda bits: bits * nats_per_bit)
    )
    if axes.get_yscale() == "log":
        _plain_log_ticks(right.yaxis)
    right.set_ylabel("bits per byte", color="#444444")
    right.tick_params(colors="#444444", length=3)
    right.spines["right"].set_visible(False)


def _style(axes: Any, title: str, pad: float = 6) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#222222", pad=pad)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#444444", length=3)
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#b9bdc4")


def _widen(axes: Any, steps: Sequence[int]) -> None:
    """Gives a single step whole numbers beside it; other ranges are found by matplotlib."""
    if len(set(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _say(axes: Any, text: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY)


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .2rem 0 1.2rem; color: #5b6068; } img { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; } tr + tr { border-top: 1px solid #e4e6ea; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; }
th { font-weight: 600; white-space: nowrap; width: 1%; } td { overflow-wrap: anywhere; }
.alert td, .alert th { color: #c0262d; } pre { font-size: 13px; overflow-x: auto; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>{style}</style></head><body>
<h1>{title}</h1><p>{status}</p>
<img alt="Curves of the run: loss, learning rate, gradient norm, step time, tokens per second, MFU
or memory, and data wait over steps" src="data:image/png;base64,{picture}">
{timeline}<h2>Facts</h2><table>{facts}</table>
{events}{experiment}
</body></html>
"""


def render_html(run: Run, picture: bytes, now: float) -> str:
    """Returns the page that shows a run; `picture` is a PNG, `now` the time of the report."""
    rows = "".join(_row(label, text) for label, text in facts(run, now))
    events = "".join(
        _row(
            f"step {e['step']}",
            f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(e['time']))}  "
            f"{e.get('event', 'event')}  {_details(e)}",
            alert=_marks(e),
        )
        for e in run.events
        if e.get("event") not in ("start", "baseline")
    )
    settings = html.escape(json.dumps(run.experiment, indent=1))
    return _PAGE.format(
        style=STYLE,
        title=html.escape(str(run.experiment.get("name") or run.folder.name)),
        status=html.escape(run.status(now)),
        picture=base64.b64encode(picture).decode(),
        facts=rows,
        timeline=timeline(run.goodput),
        events=f"<h2>Events</h2><table>{events}</table>" if events else "",
        experiment=(
            f"<h2>Experiment</h2><details><summary>all settings</summary><pre>{settings}</pre>"
            "</details>" if run.experiment else ""
        ),
    )  # fmt: skip


def _row(label: str, text: str, alert: bool = False) -> str:
    style = ' class="alert"' if alert else ""
    return f"<tr{style}><th>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>"


def _marks(event: dict[str, Any], *names: str) -> bool:
    """Whether an event has one of these names; without names: whether it is an incident."""
    return event.get("event") in names if names else event.get("event") not in _ROUTINE


def _details(event: dict[str, Any]) -> str:
    known = ("kind", "step", "time", "event")
    return _pairs({name: value for name, value in event.items() if name not in known}) or ""


def _series(records: list[dict[str, Any]], field: str) -> list[tuple[int, float]]:
    return [(r["step"], float(r[field])) for r in records if _finite(r.get(field))]


def _losses(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Means over the steps between records; single steps where a run did not record means."""
    means = [r | {"loss": r["mean_loss"]} if "mean_loss" in r else r for r in records]
    return _series(means, "loss")


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A centred mean over about 2% of the points: no lag, unlike an exponential average."""
    half = max(2, len(points) // 100)
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    smooth = []
    for index, (step, _) in enumerate(points):
        # Symmetric where the curve begins, because it is steep there; one-sided where it ends.
        low, high = max(0, index - half), min(len(points), index + min(half, index) + 1)
        smooth.append((step, (sums[high] - sums[low]) / (high - low)))
    return smooth


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    stride = math.ceil(len(points) / _MOST_POINTS)
    return points if stride == 1 else [*points[:-1:stride], points[-1]]


def _marker(points: list[Any]) -> str | None:
    return "o" if len(points) == 1 else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _number(value: float | None, before: str = "") -> str | None:
    return None if value is None else f"{before}{value:,.0f}"


def _pairs(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_pairs(entry)}" for name, entry in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return None if value is None else str(value)


def _device(run: Run) -> str | None:
    device, count = run.fact("device"), run.fact("devices")
    return None if device is None else f"{count} x {device}" if count else str(device)


def _last(points: list[tuple[int, float]]) -> str | None:
    return f"{points[-1][1]:.4f} at step {points[-1][0]}" if points else None


def _best_and_last(records: list[dict[str, Any]], field: str) -> str | None:
    if not records:
        return None
    best, last = min(records, key=lambda r: r[field]), records[-1]
    return f"best {best[field]:.4f} at step {best['step']}, last {last[field]:.4f}"


def _largest(records: list[dict[str, Any]], field: str, form: str) -> str | None:
    points = _series(records, field)
    return form.format(max(value for _, value in points)) if points else None


def _compressors(run: Run) -> str | None:
    found = [run.fact("gzip_bits_per_byte"), run.fact("xz_bits_per_byte")]
    texts = [f"{bits:.3f}" if _finite(bits) else "not measured" for bits in found]
    return ", ".join(texts) if any(_finite(bits) for bits in found) else None


def _wall_time(run: Run) -> str | None:
    times = [r["time"] for r in (*run.train, *run.evals, *run.events)]
    return format_duration(max(times) - min(times)) if len(times) > 1 else None
