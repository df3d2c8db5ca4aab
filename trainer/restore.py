"""Brings the parameters of a run back for use, on the devices that are here now."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from checkpoint.manager import load_step
from checkpoint.manifest import read_manifest
from checkpoint.steps import pick_step
from models.spec import Tree, path_name
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh, start_runtime
from trainer.config import Experiment
from trainer.run import CHECKPOINTS
from trainer.state import Layout, abstract_state, make_layout


def restore_params(run: str, experiment: Experiment, step: int) -> tuple[Tree, Mesh]:
    """Returns the parameters of `step` and the mesh they are on.

    The mesh is the experiment's own where it fits the devices here, else all of them as `fsdp`.
    Only parameters are read; the optimizer state stays on disk.
    """
    start_runtime()
    try:
        mesh = make_mesh(experiment.mesh)
    except UsageError:  # trained on another number of devices
        mesh = make_mesh(MeshConfig())
    layout = make_layout(experiment, mesh)
    return _load_params(f"{run}/{CHECKPOINTS}", step, experiment, layout), mesh


def first_params(experiment: Experiment, layout: Layout) -> Tree:
    """Returns the newest parameters of the run `config.train.init_from`, for a run to start with.

    Raises:
      UsageError: names or shapes differ. CheckpointError: the step is damaged.
    """
    folder = f"{experiment.train.init_from}/{CHECKPOINTS}"
    return _load_params(folder, pick_step(folder), experiment, layout)


def _load_params(folder: str, step: int, experiment: Experiment, layout: Layout) -> Tree:
    """Returns parameters as float32; converted ones are stored as they came, and widen exactly."""
    facts = read_manifest(folder, step)["arrays"]

    def as_stored(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = facts.get(f"params/{path_name(path)}", {}).get("dtype")
        narrow = dtype in ("bfloat16", "float16")
        return leaf.update(dtype=jnp.dtype(dtype)) if narrow else leaf

    wanted = abstract_state(experiment, layout).params
    abstract = {"params": jax.tree_util.tree_map_with_path(as_stored, wanted)}
    stored, _ = load_step(folder, step, abstract, partial=True)
    return jax.tree.map(lambda w, leaf: w.astype(leaf.dtype), stored["params"], wanted)
