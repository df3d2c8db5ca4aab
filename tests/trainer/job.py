"""Trains the tiny config and tells what was restored and what was lost; also in real processes.

Arguments: runs that follow one another, each as JSON [folder, mesh, overrides]. Process 0 prints
for each one JSON object: the digest of the stored state before training, of the one after it, and
losses.
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from checkpoint.steps import complete_steps
from checkpoint.storage import load_step
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.runtime import start_runtime
from tests.tiny import get_config
from trainer.loop import train
from trainer.metrics import read_metrics
from trainer.run import CHECKPOINTS
from trainer.state import abstract_state, make_layout, to_stored


def digest(experiment, folder: Path) -> str:
    """sha256 over the newest stored state, restored onto this job's mesh."""
    steps = complete_steps(folder)
    if not steps:
        return ""
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        abstract = to_stored(abstract_state(experiment, make_layout(experiment, mesh)))
        state, _ = load_step(folder, steps[-1], abstract, verify=False)
        total = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            whole = multihost_utils.process_allgather(leaf, tiled=True)
            total.update(jax.tree_util.keystr(path).encode())
            total.update(np.ascontiguousarray(whole).tobytes())
    return total.hexdigest()


def run(workdir: str, mesh: dict, **overrides) -> dict:
    """Trains, overrides being {"train.stop_at": 10, ...}; returns digests and losses by step."""
    experiment = get_config()
    experiment.mesh = MeshConfig(**mesh)
    for path, value in overrides.items():
        owner, leaf = path.split(".")
        setattr(getattr(experiment, owner), leaf, value)
    folder = Path(workdir) / CHECKPOINTS
    before = digest(experiment, folder)
    train(experiment, workdir)
    losses = {str(r["step"]): r["loss"] for r in read_metrics(workdir, "train")}
    return {"before": before, "after": digest(experiment, folder), "losses": losses}


def main(*runs: str) -> None:
    start_runtime()
    for each in runs:
        workdir, mesh, overrides = json.loads(each)
        result = run(workdir, mesh, **overrides)
        if jax.process_index() == 0:
            print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
