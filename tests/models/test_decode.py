"""KV-cached decoding against the full forward pass, on one device and on meshes; sampling rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models import spec
from models.config import ModelConfig
from models.decode import (
    Sampling,
    extend,
    filtered,
    init_cache,
    make_generate,
    pad_prompts,
    resident,
    sample,
)
from models.decoder import forward, logits, param_specs
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ

TOLERANCE = 1e-5  # float32, logits of order 1: only the order of sums differs
FAST_COMPILE = {"xla_backend_optimization_level": "0"}
T = 22
CONFIG = ModelConfig(
    vocab=61, layers=5, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, max_length=64,
    pattern=("local", "global"), window=5, dtype="float32", remat="full",
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [58], [9, 7, 9, 3, 2]]
ONE, TENSOR, MANY = MeshConfig(), MeshConfig(tensor=2), MeshConfig(fsdp=2, data=2, tensor=2)


def mesh_of(config: MeshConfig):
    sizes = dataclasses.replace(config, fsdp=abs(config.fsdp))
    return make_mesh(config, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor * sizes.seq])


@functools.cache
def start_values(key: str = "") -> spec.Tree:
    return jax.tree.map(
        lambda w: np.asarray(w) + (0.1 if w.ndim == 1 else 0.0), spec.init(param_specs(CONFIG), jax.random.key(7))
    )


def place(params: spec.Tree, config: ModelConfig, mesh) -> spec.Tree:
    return jax.device_put(params, spec.shardings(param_specs(config), mesh))


def run(fn, *args):
    return jax.jit(fn, compiler_options=FAST_COMPILE)(*args)


def full_logits(params, tokens_BT, config):
    """The uncached forward pass over rows without padding."""
    rows = jax.device_put(
        (tokens_BT, np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape),
         np.ones_like(tokens_BT)),
        NamedSharding(jax.sharding.get_mesh(), P(BATCH, SEQ)),
    )  # fmt: skip
    return run(lambda p, r: logits(p, forward(p, *r, config)[0], config), params, rows)


@pytest.mark.parametrize("axes", [ONE, TENSOR, MANY], ids=["one", "tensor", "many"])
def test_cached_logits_equal_the_full_forward(axes):
    tokens_BT = np.random.default_rng(1).integers(0, 61, (4, T), dtype=np.int32)
    mesh = mesh_of(axes)
    with jax.set_mesh(mesh):
        params = place(start_values(), CONFIG, mesh)
        full_BTV = np.asarray(full_logits(params, tokens_BT, CONFIG))

        def cached(params, tokens_BT):  # a chunk of 9, then one by one, after 3 holes
            params = resident(params, CONFIG)
            cache = init_cache(CONFIG, 4, 3 + T)
            first_BT = jnp.concatenate([jnp.zeros_like(tokens_BT[:, :3]), tokens_BT[:, :9]], 1)
            real_BT = jnp.broadcast_to((jnp.arange(12) >= 3).astype(jnp.int32), (4, 12), out_sharding=P(BATCH, None))
            x_BTD, cache = extend(params, first_BT, real_BT, cache, CONFIG)
            out_BTV = logits(params, x_BTD[:, 3:], CONFIG)

            def one(cache, token_B):
                token_B1 = token_B[:, None]
                x_B1D, cache = extend(params, token_B1, jnp.ones_like(token_B1), cache, CONFIG)
                return cache, logits(params, x_B1D, CONFIG)[:, 0]

            _, rest_TBV = jax.lax.scan(one, cache, tokens_BT[:, 9:].T)
            return out_BTV, rest_TBV

        placed = jax.device_put(tokens_BT, NamedSharding(mesh, P(BATCH, SEQ)))
        out_BTV, rest_TBV = run(cached, params, placed)
    np.testing.assert_allclose(out_BTV, full_BTV[:, :9], atol=TOLERANCE)
    np.testing.assert_allclose(np.swapaxes(rest_TBV, 0, 1), full_BTV[:, 9:], atol=TOLERANCE)
