"""The decoder against itself: on meshes, rematerialised, unrolled, on packed rows, with tied heads."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from models import spec
from models.config import SAVEABLE, ModelConfig
from models.decoder import forward, head_VD, logits, param_specs
from models.loss import LossOptions, cross_entropy
from sharding.config import AXES, MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ

# Gradients of float32 sums taken in another order, as a part of the largest gradient.
TOLERANCE = 1e-5
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
ONE = MeshConfig(fsdp=1)
B, T = 4, 16
CONFIG = ModelConfig(
    vocab=61, layers=5, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, max_length=T,
    norm_placement="sandwich", pattern=("local", "global"), window=5, qkv_bias=True,
    qk_norm="full", attention_softcap=4.0, dtype="float32", remat="full", pad_vocab_to=64,
)  # fmt: skip
SMALL = dataclasses.replace(CONFIG, layers=2, pattern=("local",))


def start_values(config: ModelConfig) -> spec.Tree:
    """Initial values with norms and biases moved off 1 and 0."""
    params = spec.init(param_specs(config), jax.random.key(3))
    return jax.tree.map(
        lambda w: np.asarray(w) + 0.1 * np.random.default_rng(w.size).normal(size=w.shape), params
    )


def rows() -> dict[str, np.ndarray]:
    """Packed rows: two documents and padding, one document, or several."""
    lengths = [(7, 6), (16,), (3, 5, 8), (10, 4)]
    segments_BT, positions_BT = np.zeros((2, B, T), np.int32)
    for b, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, 1):
            segments_BT[b, start : start + length] = number
            positions_BT[b, start : start + length] = range(length)
            start += length
    tokens_BT, targets_BT = np.random.default_rng(0).integers(0, 61, (2, B, T), dtype=np.int32)
    return dict(tokens=tokens_BT, targets=targets_BT, positions=positions_BT, segments=segments_BT)


def loss(params: spec.Tree, batch: dict, config: ModelConfig) -> jax.Array:
    batch = {name: reshard(a_BT, P(BATCH, SEQ)) for name, a_BT in batch.items()}
    x_BTD, _ = forward(params, batch["tokens"], batch["positions"], batch["segments"], config)
    weights_BT = (batch["segments"] > 0).astype(jnp.float32)
    options = LossOptions.of(config)
    return cross_entropy(x_BTD, head_VD(params), batch["targets"], weights_BT, options)[0]


def loss_and_gradient(config: ModelConfig, axes: MeshConfig = ONE):
    mesh = make_mesh(axes, jax.devices()[: math.prod(getattr(axes, a) for a in AXES)])
    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.float32, start_values(config))
        params = jax.device_put(params, spec.shardings(param_specs(config), mesh))
        step = jit(jax.value_and_grad(functools.partial(loss, config=config)))
        return jax.tree.map(np.asarray, step(params, rows()))


@functools.cache
def small_gradient():
    return loss_and_gradient(dataclasses.replace(SMALL, remat="none"))


def check(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=TOLERANCE)
    for path, gradient in jax.tree.leaves_with_path(wanted[1]):
        ours = found[1]
        for key in path:
            ours = ours[key.key]
        assert np.abs(gradient).max() > 0, f"{path}: no gradient at all"
        np.testing.assert_allclose(
            ours, gradient, atol=TOLERANCE * np.abs(gradient).max(), err_msg=str(path)
        )


@pytest.mark.parametrize(
    "axes",
    [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, seq=2, tensor=2)],
    ids=["data fsdp tensor", "fsdp seq tensor"],
)
def test_gradients_are_the_same_on_every_mesh(axes):
    check(loss_and_gradient(SMALL, axes), small_gradient())


def test_unrolled_layers_give_the_same_gradients():
    """Two scanned periods of the pattern and a layer left over, against five layers in a row."""
    unrolled = dataclasses.replace(CONFIG, scan_layers=False, remat="none")
    check(loss_and_gradient(CONFIG), loss_and_gradient(unrolled))


@pytest.mark.parametrize(
    "remat", ["full", ",".join(SAVEABLE), "attention,gate@host,residual@host"],
    ids=["full", "names", "host"],
)
def test_remat_does_not_change_gradients(remat):
    check(loss_and_gradient(dataclasses.replace(SMALL, remat=remat)), small_gradient())


def test_remat_keeps_what_it_names():
    """Counts the values between forward and backward pass, from shapes alone."""
    sizes = {}
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])):
        for remat in ("none", "full", "gate", "gate,up", "attention"):
            config = dataclasses.replace(SMALL, remat=remat, attention="blockwise")
            params = spec.abstract(
                param_specs(config), spec.shardings(param_specs(config), jax.sharding.get_mesh())
            )
            _, back = jax.eval_shape(
                lambda p, c=config: jax.vjp(functools.partial(loss, batch=rows(), config=c), p),
                params,
            )
            sizes[remat] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(back))
    hidden = 2 * B * T * 48  # one MLP activation in each of two layers
    assert sizes["gate"] - sizes["full"] == hidden
    assert sizes["gate,up"] - sizes["full"] == 2 * hidden
    assert sizes["attention"] - sizes["full"] == 2 * B * T * (4 * 8 + 4)  # out and log-sum-exp
    assert sizes["none"] > sizes["gate,up"]


def test_packed_documents_do_not_see_one_another():
    batch = rows()
    mesh = make_mesh(ONE, jax.devices()[:1])

    @jit
    def run(params, *columns):
        x_BTD, _ = forward(params, *(reshard(a_BT, P(BATCH, SEQ)) for a_BT in columns), CONFIG)
        return logits(params, x_BTD, CONFIG)

    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.float32, start_values(CONFIG))
        params = jax.device_put(params, spec.shardings(param_specs(CONFIG), mesh))
        columns = batch["positions"], batch["segments"]
        packed_BTV = np.asarray(run(params, batch["tokens"], *columns))

        first_BT = batch["segments"] == 1
        changed_BT = np.where(first_BT, (batch["tokens"] + 7) % 61, batch["tokens"])
        changed_BTV = np.asarray(run(params, changed_BT, *columns))

        alone_BT = np.zeros((3, B, T), np.int32)  # the third document of row 2, moved to the front
        alone_BT[:, 2, :8] = batch["tokens"][2, 8:], np.arange(8), np.ones(8)
        alone_BTV = np.asarray(run(params, *alone_BT))
    others_BT = batch["segments"] > 1
    np.testing.assert_array_equal(changed_BTV[others_BT], packed_BTV[others_BT])
    assert (np.abs(changed_BTV - packed_BTV)[first_BT].max(-1) > 1e-3).all()
    np.testing.assert_allclose(alone_BTV[2, :8], packed_BTV[2, 8:], atol=1e-5)


def test_tied_embedding_gets_the_gradient_of_both_uses():
    untied = dataclasses.replace(SMALL, layers=1)
    tied = dataclasses.replace(untied, tie_embeddings=True)
    assert set(param_specs(untied)) - set(param_specs(tied)) == {"head"}
    params = jax.tree.map(jnp.float32, start_values(tied))
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])):
        mesh = jax.sharding.get_mesh()

        def gradient(params, config):
            params = jax.device_put(params, spec.shardings(param_specs(config), mesh))
            return jit(jax.grad(functools.partial(loss, config=config)))(params, rows())

        both = gradient(params, tied)["embedding"]
        apart = gradient({**params, "head": params["embedding"]}, untied)
    total = np.asarray(apart["embedding"]) + np.asarray(apart["head"])
    np.testing.assert_allclose(both, total, atol=TOLERANCE * np.abs(total).max())


def test_parameters_that_do_not_divide_are_refused_by_name():
    config = dataclasses.replace(CONFIG, width=33)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2), jax.devices()[:8])
    with pytest.raises(UsageError, match=r"parameter .*: dimension \d \(embed, size 33\)"):
        spec.shardings(param_specs(config), mesh)
