"""Run in a process of its own: storage that fails or is damaged. Prints what was raised, as JSON.

Orbax leaves unfinished coroutines behind when a read fails; pytest would blame the next test.
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager
from checkpoint.steps import CheckpointError
from checkpoint.storage import load_step

STATE = {"w": jnp.arange(2**18, dtype=jnp.float32), "b": jnp.ones(4)}  # 1 MiB
ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE
)


def raised(action, *arguments):
    try:
        action(*arguments)
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


def poll_for(manager, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        manager.poll()
        time.sleep(0.01)


def full_disk(folder):
    """Files may not grow beyond half of the state: what a full disk looks like to the writer."""
    found = {}
    with CheckpointManager(folder, CheckpointConfig(every=1)) as manager:
        manager.save(1, STATE, {})
        manager.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, resource.RLIM_INFINITY))
        manager.save(2, STATE, {})
        found["poll"] = raised(poll_for, manager, 20)
        found["steps"] = manager.steps()
        found["left"] = sorted(path.name for path in folder.iterdir())
        manager.save(2, STATE, {})
        found["next save"] = raised(manager.save, 3, STATE, {})
        manager.save(4, STATE, {})
        found["close"] = raised(manager.close)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with CheckpointManager(folder, CheckpointConfig(every=1)) as manager:
        manager.save(5, STATE, {})
    found["afterwards"] = manager.steps()
    return found


def damage(folder):
    """Every kind of damage to one of two steps, and whether the other is still read."""
    pristine = folder / "pristine"
    with CheckpointManager(pristine, CheckpointConfig(every=1)) as manager:
        for step in (1, 2):
            manager.save(step, STATE, {})
    found = {}
    removed = [
        "state",
        "state/manifest.ocdbt",
        "state/_METADATA",
        "meta/data.json",
        "manifest/data.json",
        "_CHECKPOINT_METADATA",
    ]
    for kind in ("truncated", "emptied", "deleted", *removed):
        run = folder / "run"
        shutil.copytree(pristine, run)
        if kind in removed:
            path = run / "2" / kind
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            hurt(run / "2" / "state", kind)
        found[kind] = raised(load_step, run, 2, ABSTRACT)
        assert (load_step(run, 1, ABSTRACT)[0]["w"] == STATE["w"]).all()
        shutil.rmtree(run)
    return found


def hurt(state, kind):
    for file in [path for path in state.glob("**/d/*") if path.is_file()]:
        if kind == "deleted":
            file.unlink()
        else:
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2] if kind == "truncated" else b"")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    root.joinpath("disk").mkdir()
    print(json.dumps({"disk": full_disk(root / "disk"), "damage": damage(root / "damage")}))
