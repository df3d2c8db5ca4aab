"""Several runs in one picture and one table: compare.png and compare.html, made from their folders.

Like trainer/report.py it needs neither JAX nor devices, and refers to nothing outside the page.
"""

import base64
import html
import io
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint.steps import folder_path, write_whole
from sharding.errors import UsageError
from trainer.report import STYLE, Run, facts, load_run

MOST = 8  # runs: as many as there are colours that can be told apart
_UNINTERESTING = ("Folder", "Name", "Versions", "Checkpoints")  # facts that differ in any case


def write_comparison(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> tuple[Path, Path]:
    """Writes compare.html and compare.png of two or more runs to `out` and returns their paths.

    Raises:
      UsageError: a folder holds no run, there are more than `MOST`, or `out` cannot be a folder.
    """
    if len(folders) > MOST:
        raise UsageError(f"{len(folders)} runs are too many for one picture: at most {MOST}")
    runs = {str(folder): load_run(folder) for folder in folders}
    if len(runs) < len(folders):
        raise UsageError("torus report: the same run is named twice")
    target = folder_path(out)
    if target.exists() and not target.is_dir():
        raise UsageError(f"--out {target}: is a file; name a folder")
    target.mkdir(parents=True, exist_ok=True)
    picture = draw(runs)
    paths = target / "compare.html", target / "compare.png"
    for path, content in zip(paths, (_page(runs, picture).encode(), picture), strict=True):
        write_whole(path, content)
    return paths


def draw(runs: dict[str, Run]) -> bytes:
    """Returns the training and held-out losses of all runs over steps, as a PNG, 13 by 9 inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = zip(
        ("Training loss, nats per token", "Held-out loss, nats per token"),
        figure.subplots(2, 1, height_ratios=(1.5, 1)), ("train", "evals"), strict=True,
    )  # fmt: skip
    for title, axes, part in panels:
        axes.set_title(title, loc="left", fontweight="bold")
        axes.grid(axis="y", color="#e4e6ea")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel("step")
        for index, (name, run) in enumerate(runs.items()):
            points = losses(getattr(run, part))
            marker = "o" if part == "evals" or len(points) == 1 else None
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=name,
                      color=f"C{index}", linewidth=1.4, marker=marker)  # fmt: skip
        values = [loss for run in runs.values() for _, loss in losses(getattr(run, part))]
        if values and min(values) > 0 and max(values) > 2 * min(values):
            axes.set_yscale("log")
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def losses(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Returns (step, loss) where the loss is finite, at most 2,000 of them."""
    points = [(r["step"], r["loss"]) for r in records if math.isfinite(r.get("loss", math.nan))]
    return points[:: -(-len(points) // 2000) or 1]


def settings(runs: dict[str, Run]) -> list[tuple[str, list[str]]]:
    """Returns (field, its value in each run) for all fields of the configs that are not alike."""
    return _differing([_leaves(run.experiment, "config.") for run in runs.values()])


def outcomes(runs: dict[str, Run], now: float) -> list[tuple[str, list[str]]]:
    """Returns (fact, its text for each run) for what differs in how the runs went."""
    rows = _differing([dict(facts(run, now)) for run in runs.values()])
    return [(name, texts) for name, texts in rows if name not in _UNINTERESTING]


def _differing(columns: list[dict[str, str]]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "—") for column in columns]) for name in names]
    return [(name, texts) for name, texts in rows if len(set(texts)) > 1]


def _leaves(tree: dict[str, Any], prefix: str) -> dict[str, str]:
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)
    return found


def _page(runs: dict[str, Run], picture: bytes) -> str:
    title = html.escape(" against ".join(runs))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in runs)
    tables = ""
    for heading, rows in (
        ("How they went", outcomes(runs, time.time())),
        ("What their configs differ in", settings(runs)),
    ):
        lines = "".join(
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(f"<td>{html.escape(text)}</td>" for text in texts)
            + "</tr>"
            for name, texts in rows
        )
        table = f"<table><tr><th></th>{head}</tr>{lines}</table>" if rows else "<p>nothing</p>"
        tables += f"<h2>{heading}</h2>{table}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        '<img alt="Training and held-out losses of the runs over steps" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">{tables}'
        "</body></html>\n"
    )
