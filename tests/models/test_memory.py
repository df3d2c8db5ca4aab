"""What a differentiated stack of layers keeps: nothing that grows with the square of the length."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models import spec
from models.config import ModelConfig
from models.decoder import forward, param_specs
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Yields the shape of every value of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if hasattr(variable.aval, "shape"):
                yield variable.aval.shape
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


@pytest.mark.parametrize("pattern", [("global",), ("local", "local", "global")])
@pytest.mark.parametrize("remat", ["none", "full", "attention"])
def test_no_value_is_quadratic_in_the_length(pattern, remat):
    length = 2048
    config = ModelConfig(
        vocab=64,
        layers=7,
        width=16,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp=16,
        remat=remat,
        pattern=pattern,
        window=256,
        max_length=length,
    )
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    params = spec.abstract(param_specs(config), spec.shardings(param_specs(config), mesh))
    rows = NamedSharding(mesh, P(BATCH, SEQ))
    tokens_BT = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=rows)

    def total(params, tokens_BT):
        x_BTD, _ = forward(params, tokens_BT, tokens_BT, tokens_BT, config)
        return jnp.sum(x_BTD.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jaxpr = jax.make_jaxpr(jax.grad(total))(params, tokens_BT).jaxpr
    # One (T, S) matrix of one head would already be length²; a layer's largest value is far below.
    largest = max(_shapes(jaxpr), key=math.prod)
    assert math.prod(largest) < length**2 / 4, largest


@pytest.mark.parametrize("length", [64, 63])
def test_the_stream_between_blocks_is_spread_over_tensor_where_it_divides(length):
    config = ModelConfig(vocab=64, layers=3, width=32, mlp=64, remat="full", dtype="float32")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    params = spec.abstract(param_specs(config), spec.shardings(param_specs(config), mesh))
    rows = NamedSharding(mesh, P(BATCH, SEQ))
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=rows)

    def total(params, tokens_BT):
        return jnp.sum(forward(params, tokens_BT, tokens_BT, tokens_BT, config)[0])

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(total)).lower(params, tokens).compile().as_text()
    # What goes into each layer is kept for the backward pass, stacked: of one device, one row.
    kept = {64: "f32[3,1,16,32]", 63: "f32[3,1,63,32]"}
    assert kept[length] in program
    assert all(other not in program for n, other in kept.items() if n != length)
