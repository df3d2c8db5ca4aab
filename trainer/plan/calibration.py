"""How far estimates lie from runs: published ones, and the user's own.

`published.json` holds runs that others published with their full settings, each with source, date
and how its FLOPs were counted, beside what the planner says of the same settings. `torus plan
--calibrate` adds a run of the user's, to a file in the cache folder; plans for that chip then show
what the estimate becomes. Imports no JAX.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from checkpoint.steps import write_whole
from sharding.config import cache_folder
from sharding.errors import UsageError
from trainer.metrics import read_metrics

PUBLISHED = Path(__file__).with_name("published.json")


def published() -> list[dict[str, Any]]:
    """Returns the rows of `published.json`."""
    return json.loads(PUBLISHED.read_text())


def measured_step(workdir: str) -> float:
    """Returns the median seconds of a step of a run, its first tenth left out.

    Raises:
      UsageError: the run has recorded no step.
    """
    records = [r["step_ms"] for r in read_metrics(workdir) if r.get("step_ms")]
    records = records[len(records) // 10 :]
    if not records:
        raise UsageError(f"{workdir} has recorded no step: nothing to calibrate with")
    return statistics.median(records) / 1e3


def own_runs() -> list[dict[str, Any]]:
    """Returns the user's own runs, oldest first."""
    path = cache_folder() / "calibration.json"
    return json.loads(path.read_text()) if path.exists() else []


def add_run(workdir: str, chip: str, plan: dict[str, Any], measured: float) -> None:
    """Keeps a run beside its estimate; one folder counts once."""
    run = {
        "workdir": str(Path(workdir).resolve()),
        "config": plan["config"],
        "chip": chip,
        "slice": plan["slice"],
        "measured_seconds": measured,
        "estimated_seconds": plan["forecast"]["seconds"]["estimate"],
        "versions": plan["versions"],
    }
    runs = [r for r in own_runs() if r["workdir"] != run["workdir"]]
    path = cache_folder() / "calibration.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps([*runs, run], indent=1).encode())


def factor(chip: str) -> tuple[float, int] | None:
    """Returns (median of measured over estimated, how many runs) of the user's runs on a chip."""
    ratios = [
        r["measured_seconds"] / r["estimated_seconds"] for r in own_runs() if r["chip"] == chip
    ]
    return (statistics.median(ratios), len(ratios)) if ratios else None
