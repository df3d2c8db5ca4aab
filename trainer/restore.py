"""Brings parameters, or what a run starts with, back for use on the devices that are here now."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from checkpoint.agreement import first, together
from checkpoint.manager import CheckpointManager
from checkpoint.manifest import read_manifest, read_meta, source_of
from checkpoint.memory.snapshots import Snapshots
from checkpoint.steps import pick_step
from checkpoint.storage import load_step
from checkpoint.tree import name_optimizer, unname_optimizer
from models.spec import Tree, path_name
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.runtime import start_runtime
from trainer.config import Experiment
from trainer.data.rows import Steps, resume_row
from trainer.recovery.health import Rewinds
from trainer.recovery.progress import ProgressPage
from trainer.run import CHECKPOINTS
from trainer.state import (
    Layout,
    TrainState,
    abstract_state,
    from_stored,
    init_state,
    make_layout,
    to_stored,
)


@dataclass(frozen=True)
class Start:
    """What a run goes on from.

    Attributes:
      step: updates done.
      row: the first row of the data that has not been trained on.
      state: the state after `step` updates.
      damaged: why newer checkpoints were passed over.
      meta: what the checkpoint keeps beside the state.
      past: the rewinds of the run so far.
    """

    step: int
    row: int
    state: TrainState
    damaged: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    past: Rewinds = field(default_factory=Rewinds)


def begin(
    experiment: Experiment,
    layout: Layout,
    dataset: Steps,
    checkpoints: CheckpointManager,
    snapshots: Snapshots,
    progress: ProgressPage,
) -> Start:
    """Returns the newest intact state of the run, or what the experiment starts with.

    A snapshot in memory is taken before a checkpoint of the same step or an older one. Nothing is
    written: what the run has given up is passed over here and deleted once nothing can be refused.

    Raises (in all processes):
      UsageError: the data is not what the run was trained on, or `init_from` cannot be used.
      CheckpointError: no checkpoint there is intact.
    """
    progress.enter("restore")
    past = Rewinds(**first(lambda: dataclasses.asdict(Rewinds.read(checkpoints.folder.parent))))
    given_up = past.gave_up if past.count else None
    abstract = to_stored(abstract_state(experiment, layout))
    newest = max(checkpoints.candidates(given_up), default=None)
    snapshot = snapshots.restore_newest(abstract, newest, past.gave_up)
    restored, damaged = snapshot, ()
    if not snapshot and (restored := checkpoints.restore_newest(abstract, given_up)):
        damaged = restored.damaged
        if damaged:  # then memory may hold a newer step than the disk after all
            snapshot = snapshots.restore_newest(abstract, restored.step, past.gave_up)
            restored = snapshot or restored
    if restored:
        data, allowed = restored.meta["data"], experiment.data.allow_change
        row = together(lambda: resume_row(data, dataset, allow_change=allowed))
        row = past.row_after(restored.meta, row)
        state = from_stored(restored.state, experiment, layout)
        start = Start(restored.step, row, state, damaged, restored.meta, past)
    else:
        state = init_state(experiment, layout)
        if experiment.train.init_from:
            state = first_state(state, experiment, layout)
        start = Start(0, past.row_after({}, 0), state, past=past)
    held = snapshot is not None and snapshot.same_layout
    snapshots.start(start.step, to_stored(start.state), held=held)
    progress.resumed(start.step, snapshot.source if snapshot else "disk" if restored else "new")
    return start


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
    wanted = {"params": abstract_state(experiment, layout).params}
    return _load(f"{run}/{CHECKPOINTS}", step, wanted)["params"], mesh


def first_state(state: TrainState, experiment: Experiment, layout: Layout) -> TrainState:
    """Returns `state` with what a run starts with from `config.train.init_from`.

    That is the newest parameters there, and if moments of Adam were converted with them, these and
    their count of updates; the step, and with it schedule and data, begin at 0.

    Raises:
      UsageError: names or shapes differ. CheckpointError: the step is damaged.
    """
    folder = f"{experiment.train.init_from}/{CHECKPOINTS}"
    step, meta = first(lambda: _first_step(folder))
    abstract = abstract_state(experiment, layout)
    wanted = {"params": abstract.params}
    if "optimizer" in source_of(meta):
        wanted["optimizer"] = name_optimizer(abstract.opt_state)
    stored = _load(folder, step, wanted)
    if "optimizer" in stored:
        moments = unname_optimizer(stored["optimizer"], abstract.opt_state)
        state = state.replace(opt_state=moments)
    return state.replace(params=stored["params"])


def _first_step(folder: str) -> tuple[int, dict[str, Any]]:
    step = pick_step(folder)
    return step, read_meta(folder, step)


def _load(folder: str, step: int, wanted: Tree) -> Tree:
    """Returns arrays in the wanted dtype; converted ones are stored as they came, and widen."""
    facts = first(lambda: read_manifest(folder, step)["arrays"])

    def as_stored(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = facts.get(path_name(path), {}).get("dtype")
        narrow = dtype in ("bfloat16", "float16") and leaf.dtype == jnp.float32
        return leaf.update(dtype=jnp.dtype(dtype)) if narrow else leaf

    abstract = jax.tree_util.tree_map_with_path(as_stored, wanted)
    stored, _ = load_step(folder, step, abstract, partial=True)
    return jax.tree.map(lambda w, leaf: w.astype(leaf.dtype), stored, wanted)
