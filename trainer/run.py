"""The folder of one run: which experiment it holds, and where its parts are.

experiment.json   the resolved experiment, enough to repeat the run
checkpoints/      one folder per step
metrics.jsonl     records of steps, evaluations and events; tensorboard/ mirrors them
"""

import json
import os
from pathlib import Path

from checkpoint.steps import folder_path, is_remote
from sharding.errors import UsageError
from trainer.config import Experiment, differences, from_dict, to_json

EXPERIMENT = "experiment.json"
CHECKPOINTS = "checkpoints"


def read_experiment(workdir: str | os.PathLike) -> Experiment:
    """Returns the experiment of a run folder.

    Raises:
      UsageError: the folder does not hold a run, or its experiment cannot be read.
    """
    path = folder_path(workdir) / EXPERIMENT
    if not path.exists():
        raise UsageError(f"{workdir} is not a run: it has no {EXPERIMENT}")
    try:
        return from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def check_workdir(workdir: str, experiment: Experiment) -> None:
    """Refuses a folder that cannot be written or holds another experiment. Writes nothing.

    Raises:
      UsageError: naming the fields that differ, old and new value.
    """
    if not workdir:
        raise UsageError("--workdir=FOLDER is missing: where should the run be written?")
    path = folder_path(workdir)
    old = read_experiment(workdir) if (path / EXPERIMENT).exists() else experiment
    if differing := differences(old, experiment):
        shown = "; ".join(differing[:6]) + ("; …" if len(differing) > 6 else "")
        raise UsageError(
            f"{workdir} holds another experiment: {shown} — use a new --workdir, or the "
            "old values to resume"
        )
    if is_remote(workdir):
        return
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--workdir={workdir} cannot be written: check {existing}")


def write_experiment(workdir: str, experiment: Experiment) -> None:
    """Writes the resolved experiment, whole or not at all."""
    path = folder_path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    if is_remote(workdir):
        (path / EXPERIMENT).write_text(to_json(experiment))
        return
    temporary = Path(path / f"{EXPERIMENT}.tmp")
    temporary.write_text(to_json(experiment))
    temporary.replace(path / EXPERIMENT)
