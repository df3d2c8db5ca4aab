"""Products with weights in bfloat16: their gradients are float32 sums over tokens and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig
from models.linear import add_bias, gathered, lookup, matmul, resident
from models.spec import ParamSpec, shardings
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ, STREAM

B, T, D, F, V = 8, 128, 16, 32, 6
MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "data fsdp tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp seq tensor": MeshConfig(fsdp=2, seq=2, tensor=2),
}
# Sums of float32, of exact products of bfloat16 numbers, in another order: relative to the largest.
# A sum that is rounded to bfloat16 on the way is up to 2**-8 = 4e-3 off.
TOLERANCE = 1e-5
SPECS = {
    "up": ParamSpec((D, F), ("embed", "mlp"), 1.0),
    "bias": ParamSpec((F,), ("mlp",), decay=False),
    "table": ParamSpec((V, D), ("vocab", "embed"), 1.0),
}


def bfloat16(seed: int, *shape: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape)
    return np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)


def run(function, params: dict, name: str, *arrays, **fields):
    """Returns the gradients of sum(dy * function(weights, *arrays)) by params and arrays."""
    config = ModelConfig(dtype="bfloat16", **fields)
    mesh, specs = make_mesh(MESHES[name]), {key: SPECS[key] for key in params}
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(specs, mesh))
        rows = NamedSharding(mesh, P(BATCH, SEQ))
        arrays = [jax.device_put(a, rows) for a in arrays]

        def objective(params, *arrays):
            y, dy = function(gathered(params, specs, config), *arrays)
            return jnp.sum(y.astype(jnp.float32) * dy)

        found = jax.jit(jax.grad(objective))(params, *arrays)
        for key, gradient in found.items():
            assert gradient.sharding.spec == params[key].sharding.spec and gradient.dtype == "f4"
    return {key: np.asarray(gradient) for key, gradient in found.items()}


@pytest.mark.parametrize("name", MESHES)
def test_the_gradient_of_a_weight_is_a_float32_sum(name):
    x_BTD, dy_BTF, up_DF = bfloat16(0, B, T, D), bfloat16(1, B, T, F), bfloat16(2, D, F)

    def product(weights, x_BTD, dy_BTF):
        y_BTF = matmul(x_BTD.astype(jnp.bfloat16), weights["up"])
        return y_BTF, dy_BTF.astype(jnp.bfloat16)

    dup_DF = np.einsum("BTD,BTF->DF", x_BTD, dy_BTF, dtype=np.float64)
    found = run(product, {"up": up_DF}, name, x_BTD, dy_BTF)["up"]
    np.testing.assert_allclose(found, dup_DF, atol=TOLERANCE * np.abs(dup_DF).max())
    narrow = run(product, {"up": up_DF}, name, x_BTD, dy_BTF, reduce_dtype="bfloat16")["up"]
    np.testing.assert_array_equal(narrow, np.asarray(jnp.bfloat16(narrow), np.float32))
    np.testing.assert_allclose(narrow, dup_DF, atol=2**-7 * np.abs(dup_DF).max())
    assert np.abs(narrow - dup_DF).max() > 100 * TOLERANCE * np.abs(dup_DF).max()


def test_tokens_spread_over_the_stream_too():
    """As between blocks with tensor parallelism, where the operand is gathered first."""
    x_BTD, dy_BTF, up_DF = bfloat16(0, B, T, D), bfloat16(1, B, T, F), bfloat16(2, D, F)

    def product(weights, x_BTD, dy_BTF):
        x_BTD = jax.sharding.reshard(x_BTD.astype(jnp.bfloat16), P(BATCH, STREAM, None))
        return matmul(x_BTD, weights["up"]), dy_BTF.astype(jnp.bfloat16)

    dup_DF = np.einsum("BTD,BTF->DF", x_BTD, dy_BTF, dtype=np.float64)
    found = run(product, {"up": up_DF}, "fsdp seq tensor", x_BTD, dy_BTF)["up"]
    np.testing.assert_allclose(found, dup_DF, atol=TOLERANCE * np.abs(dup_DF).max())


@pytest.mark.parametrize("name", MESHES)
def test_a_frequent_token_counts_every_time(name):
    """Half of all tokens are the same one, each with a gradient of 1."""
    rows_BT = np.where(np.arange(B * T).reshape(B, T) % 2, 3, np.arange(T) % V).astype(np.int32)
    table_VD, ones_BTD = np.ones((V, D), np.float32), np.ones((B, T, D), np.float32)

    def rows(weights, rows_BT, ones_BTD):
        return lookup(weights["table"], rows_BT, P(BATCH, SEQ, None)), ones_BTD

    found = run(rows, {"table": table_VD}, name, rows_BT, ones_BTD)["table"]
    counts_V = np.bincount(rows_BT.ravel(), minlength=V)
    assert counts_V[3] > 256  # which 256 + 1 in bfloat16 does not reach
    np.testing.assert_array_equal(found, np.repeat(counts_V[:, None], D, axis=1))


@pytest.mark.parametrize("name", MESHES)
def test_the_gradient_of_a_bias_is_a_float32_sum(name):
    dy_BTF = bfloat16(1, B, T, F)

    def biased(weights, dy_BTF):
        return add_bias(dy_BTF.astype(jnp.bfloat16), weights["bias"]), dy_BTF

    found = run(biased, {"bias": np.zeros(F, np.float32)}, name, dy_BTF)["bias"]
    dbias_F = dy_BTF.astype(np.float64).sum((0, 1))
    np.testing.assert_allclose(found, dbias_F, atol=TOLERANCE * np.abs(dbias_F).max())


def test_resident_weights_are_cast_and_whole():
    params = {"up": bfloat16(2, D, F) * 1.001, "bias": np.full(F, 1.001, np.float32)}
    specs = {key: SPECS[key] for key in params}
    mesh = make_mesh(MESHES["data fsdp tensor"])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(specs, mesh))
        found = jax.jit(functools.partial(resident, specs=specs, config=ModelConfig()))(placed)
    assert found["up"].dtype == jnp.bfloat16 and found["up"].sharding.spec == P(None, "tensor")
    assert found["bias"].dtype == jnp.float32


def test_sums_narrower_than_the_products_are_refused():
    with pytest.raises(UsageError, match=r"'bfloat16' is narrower than .* 'float32'"):
        ModelConfig(dtype="float32", reduce_dtype="bfloat16").validate()
    with pytest.raises(UsageError, match="reduce_dtype = 'float64': choose float32, bfloat16"):
        ModelConfig(reduce_dtype="float64").validate()
