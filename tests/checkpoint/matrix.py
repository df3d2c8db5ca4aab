"""One job of the matrix of meshes: saves on its meshes, or restores there what all of them saved.

Arguments: `save` or `restore`, a folder, JSON of the meshes that this job has devices for, JSON of
the names of all saved ones. Each mesh trains two steps, saves, and trains five more; each restore
is verified against the fingerprints taken from memory before the save, then trains the same five.
Process 0 prints one line of JSON: name, or name of saved and of restoring mesh → losses.
"""

import json
import math
import sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager
from checkpoint.storage import load_step
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from sharding.runtime import start_runtime
from tests.trainer.test_step import batches, experiment
from trainer.state import abstract_state, from_stored, init_state, make_layout, to_stored
from trainer.step import make_train_step

BEFORE, AFTER = 2, 5


class Place:
    """The experiment on one mesh: its compiled step and the same batches for every mesh."""

    def __init__(self, axes: dict[str, int]) -> None:
        self.experiment = experiment(MeshConfig(**axes))
        count = math.prod(size for axis, size in axes.items() if axis != "zero")
        self.mesh = make_mesh(self.experiment.mesh, jax.devices()[:count])
        self.layout = make_layout(self.experiment, self.mesh)
        self.step = jax.jit(make_train_step(self.experiment, self.layout))
        rows = NamedSharding(self.mesh, PartitionSpec(BATCH, SEQ))
        self.batches = list(batches(rows, BEFORE + AFTER))

    def train(self, state, which) -> tuple[object, list[float]]:
        losses = []
        for batch in self.batches[which]:
            state, metrics = self.step(state, batch)
            losses.append(float(metrics["loss"]))
        return state, losses


def save(place: Place, folder: Path) -> list[float]:
    """Returns the losses after the save, of the run that goes on."""
    with jax.set_mesh(place.mesh), CheckpointManager(folder, CheckpointConfig()) as manager:
        state, _ = place.train(init_state(place.experiment, place.layout), slice(BEFORE))
        manager.save(BEFORE, to_stored(state), {}, force=True)
        return place.train(state, slice(BEFORE, None))[1]


def restore(place: Place, folder: Path) -> list[float]:
    """Returns the losses of the run that goes on from what `folder` holds."""
    with jax.set_mesh(place.mesh):
        abstract = to_stored(abstract_state(place.experiment, place.layout))
        stored, _ = load_step(folder, BEFORE, abstract, verify=True)
        state = from_stored(stored, place.experiment, place.layout)
        return place.train(state, slice(BEFORE, None))[1]


def main(what: str, folder: str, meshes: str, saved: str) -> None:
    start_runtime()
    found = {}
    for name, axes in json.loads(meshes).items():
        place = Place(axes)
        if what == "save":
            found[name] = save(place, Path(folder) / name)
        else:
            for other in json.loads(saved):
                found[f"{other} > {name}"] = restore(place, Path(folder) / other)
    if jax.process_index() == 0:
        print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
