"""One process of two: restores a step that one process saved, trains on, saves steps of its own.

Arguments: the folder to restore from, the folder to save to.
"""

import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager
from checkpoint.storage import load_step
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.runtime import start_runtime

SHAPES = {"w": ((64, 32), P("fsdp", "tensor")), "v": ((32,), P("tensor")), "count": ((), P())}


def main(source, destination):
    start_runtime()
    assert jax.process_count() == 2 and jax.device_count() == 8
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    abstract = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in SHAPES.items()
    }
    with jax.set_mesh(mesh):
        state, meta = load_step(source, 1, abstract)
        assert meta == {"from": "one process"}
        for name, (shape, _) in SHAPES.items():
            whole = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
            for shard in state[name].addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])
        run(mesh, state, destination)


def run(mesh, state, destination):
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    total = jax.jit(lambda x: jnp.sum(x * x), out_shardings=NamedSharding(mesh, P()))
    with CheckpointManager(destination, CheckpointConfig(every=2, keep_ladder=0)) as manager:
        for step in range(1, 9):
            state = update(state)
            if manager.due(step):
                manager.save(step, state, {"step": step})
            for _ in range(5):  # collectives run while the save does
                jax.block_until_ready(total(state["w"]))
            manager.poll()
        manager.wait()
        multihost_utils.sync_global_devices("saved")  # by the first process,
        assert manager.latest() == 8
        multihost_utils.sync_global_devices("seen")  # which is about to delete it
        manager.discard_where(lambda step, meta: step > 6)
        assert manager.steps() == [6]
        lonely = {"x": jnp.ones(3, device=jax.local_devices()[0])}
        try:
            manager.save(10, lonely, {})
        except UsageError as error:
            print(error)
        manager.save(12, state, {"step": 12}, force=True)
        manager.wait()
        if jax.process_index() == 0:
            damage(destination)
        multihost_utils.sync_global_devices("damaged")
        began = time.monotonic()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        found = manager.restore_newest(abstract)
        assert found.step == 6 and found.meta == {"step": 6} and len(found.damaged) == 1
        assert time.monotonic() - began < 60  # the process that could read its part does not wait
        manager.save(12, found.state, {"step": 12}, force=True)  # and all still save together


def damage(folder):
    """Cuts in half what the first process wrote of step 12, which the second need not read."""
    files = Path(folder, "12/state/ocdbt.process_0").rglob("d/*")
    file = max(files, key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
