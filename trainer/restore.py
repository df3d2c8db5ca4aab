"""Brings the parameters of a run back for use, on the devices that are here now."""

from jax.sharding import Mesh

from checkpoint.manager import load_step
from models.spec import Tree
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh, start_runtime
from trainer.config import Experiment
from trainer.run import CHECKPOINTS
from trainer.state import abstract_state, make_layout


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
    abstract = {"params": abstract_state(experiment, layout).params}
    stored, _ = load_step(f"{run}/{CHECKPOINTS}", step, abstract, partial=True)
    return stored["params"], mesh
