"""One process of two: restores a step that one process saved, trains on, saves steps of its own.

Arguments: the folder to restore from, the folder to save to.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager, load_step
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh, start_runtime

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
        assert manager.latest() == 8
        manager.discard_where(lambda step, meta: step > 6)
        assert manager.steps() == [6]
        lonely = {"x": jnp.ones(3, device=jax.local_devices()[0])}
        try:
            manager.save(10, lonely, {})
        except UsageError as error:
            print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
