"""One process of two, of which the second sees its folder as it was a while ago.

Argument: a folder to save to. Each process prints a line for each case.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint import steps
from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager
from checkpoint.steps import CheckpointError
from checkpoint.storage import load_step
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.runtime import start_runtime


def hide(root: Path, hidden: set[str], seconds: float = float("inf")) -> None:
    """Has this process, the second, not see some steps in `root` for a while."""
    seen, listed, until = steps._committed, steps.complete_steps, time.monotonic() + seconds

    def is_hidden(path):
        return path.parent == root and path.name in hidden and time.monotonic() < until

    if jax.process_index() == 1:
        steps._committed = lambda path: not is_hidden(path) and seen(path)
        steps.complete_steps = lambda folder: [
            step for step in listed(folder) if not is_hidden(Path(folder) / str(step))
        ]


def show_deleted(root: Path, deleted: int) -> None:
    """Has the second process still list a step that is gone."""
    listed = steps.complete_steps
    if jax.process_index() == 1:
        steps.complete_steps = lambda folder: sorted({*listed(folder), deleted})


def attempt(name: str, action) -> None:
    saved = steps._committed, steps.complete_steps
    try:
        result = action()
    except (UsageError, CheckpointError) as error:
        result = f"{type(error).__name__}: {error}"
    steps._committed, steps.complete_steps = saved
    print(f"{name} | {result}", flush=True)
    multihost_utils.sync_global_devices(name)


def main(folder: str) -> None:
    start_runtime()
    steps.STALE_SECONDS = 2.0
    root = Path(folder) / "run"
    mesh = make_mesh(MeshConfig(fsdp=2))
    sharding = NamedSharding(mesh, P("fsdp"))
    abstract = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    full = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))

    def newest():
        restored = manager.restore_newest(abstract)
        return f"step {restored.step} sum {float(full(restored.state['w'])):g}"

    def one():
        state, _ = load_step(root, 20, abstract)
        return f"sum {float(full(state['w'])):g}"

    def late(action, hidden, seconds=float("inf")):
        hide(root, hidden, seconds)
        return action()

    def deleted():
        show_deleted(root, 30)
        return manager.save(25, state, {}, force=True)

    with jax.set_mesh(mesh), CheckpointManager(root, CheckpointConfig(keep_last=5)) as manager:
        for step in (10, 20):
            state = {"w": jnp.full((8,), float(step), device=sharding)}
            manager.save(step, state, {"step": step}, force=True)
        manager.wait()
        multihost_utils.sync_global_devices("saved")
        attempt("late", lambda: late(newest, {"20"}, 0.6))
        attempt("never", lambda: late(newest, {"20"}))
        attempt("load", lambda: late(one, {"20"}, 0.6))
        attempt("none", lambda: late(lambda: manager.restore(None, abstract)[1], {"10", "20"}, 0.6))
        attempt("absent", lambda: late(lambda: load_step(root, 15, abstract), {"10"}))
        attempt("deleted", deleted)
        manager.wait()
        multihost_utils.sync_global_devices("end")
        # Both see a step of that number, but not the same one: it was deleted and saved anew.
        if jax.process_index() == 1:
            steps.folder_path = lambda path, real=steps.folder_path: Path(
                str(real(path)).replace("/run", "/other")
            )
        attempt("other", one)
        multihost_utils.sync_global_devices("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
