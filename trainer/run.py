"""The folder of one run: which experiment it holds, and where its parts are.

experiment.json   the resolved experiment, enough to repeat the run
checkpoints/      one folder per step
lock              which process trains here now (trainer/lock.py)
metrics.jsonl     records of steps, evaluations and events; tensorboard/ mirrors them
"""

import os
from dataclasses import replace

from checkpoint.files import read_json
from checkpoint.steps import complete_steps, folder_path, is_remote, pick_step, write_whole
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
        return from_dict(read_json(path))
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
        longer = (
            f"; to train longer, go on from its weights with a schedule of their own: a new "
            f"--workdir and --config.train.init_from={workdir}"
        )
        raise UsageError(
            f"{workdir} holds another experiment: {shown} — use a new --workdir, or the "
            f"old values to resume{longer if old.train.steps < experiment.train.steps else ''}"
        )
    if is_remote(workdir):
        return
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--workdir={workdir} cannot be written: check {existing}")


def check_start(workdir: str, experiment: Experiment) -> None:
    """Refuses a `config.train.init_from` that is no run of the same model. Writes nothing.

    Raises:
      UsageError: naming the fields of the model that differ; or `workdir` itself holds converted
        weights, which training there would pass over.
    """
    own, source = complete_steps(f"{workdir}/{CHECKPOINTS}"), experiment.train.init_from
    if 0 in own:
        raise UsageError(
            f"{workdir} holds weights to start from, not a run: use another --workdir, and "
            f"--config.train.init_from={workdir}"
        )
    if own or not source:
        return
    start = replace(experiment, model=read_experiment(source).model)
    if differing := differences(start, experiment):
        raise UsageError(
            f"config.train.init_from = {source!r} is another model: {'; '.join(differing[:6])} — "
            f"--config=from_run:{source} takes the model from there"
        )
    pick_step(f"{source}/{CHECKPOINTS}")


def write_experiment(workdir: str, experiment: Experiment) -> None:
    """Writes the resolved experiment, whole or not at all."""
    path = folder_path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / EXPERIMENT, to_json(experiment).encode())
