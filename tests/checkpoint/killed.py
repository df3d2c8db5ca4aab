"""Run in a process of its own, to be killed: goes on from the newest step and saves until then."""

import sys

import jax
import jax.numpy as jnp

from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager

state = {"w": jnp.zeros((1024, 1024)), "b": {"v": jnp.zeros(1024)}}  # 4 MiB
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
)
with CheckpointManager(sys.argv[1], CheckpointConfig(every=1, keep_last=2)) as manager:
    step = manager.latest() or 0
    if step:
        state, meta = manager.restore(step, abstract)
        assert meta == {"step": step}
        assert all((x == step).all() for x in jax.tree.leaves(state))
    while True:
        step += 1
        state = jax.tree.map(lambda x: x + 1, state)
        manager.save(step, state, {"step": step})
        print(step, flush=True)
