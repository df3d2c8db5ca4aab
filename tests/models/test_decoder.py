"""The decoder against itself: other meshes, other remat, unrolled layers, packed rows, tied heads."""

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
SMALL = dataclasses.replace(CONFIG, layers=2)


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
def expected(layers: int):
    config = dataclasses.replace(CONFIG, layers=layers, remat="none")
    return loss_and_gradient(config)


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
    [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, seq=2, tensor=2),
     MeshConfig(fsdp=1, seq=8)],
    ids=["data fsdp tensor", "fsdp seq tensor", "seq"],
)  # fmt: skip
def test_gradients_are_the_same_on_every_mesh(axes):
    check(loss_and_gradient(CONFIG, axes), expected(5))


def test_unrolled_layers_give_the_same_gradients():
    config = dataclasses.replace(CONFIG, scan_layers=False, remat="none")
    check(loss_and_gradient(config), expected(5))


@pytest.mark.parametrize(
    "remat", ["full", ",".join(SAVEABLE), "attention,gate@host,residual@host"],
    ids=["full", "names", "host"],
)
def test_remat_does_not_change_gradients(remat):
    check(loss_and_gradient(dataclasses.replace(SMALL, remat=remat)), expected(2))


def test_remat_keeps_what_it_names():
    """Residuals of one layer's backward pass, counted by the abstract evaluation of its forward."""
    sizes = {}
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])):
        for remat in ("none", "full", "gate", "gate,up", "attention"):
            config = dataclasses.replace(SMALL, remat=remat)
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
    def run(params, tokens_BT):
        columns = (tokens_BT, batch["positions"], batch["segments"])
        x_BTD, _ = forward(params, *(reshard(a, P(BATCH, SEQ)) for a in columns), CONFIG)
        return logits(params, x_BTD, CONFIG)

    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.float32, start_values(CONFIG))
        params = jax.device_put(params, spec.shardings(param_specs(CONFIG), mesh))
        before_BTV = np.asarray(run(params, batch["tokens"]))
        changed_BT = np.where(batch["segments"] == 1, (batch["tokens"] + 7) % 61, batch["tokens"])
        after_BTV = np.asarray(run(params, changed_BT.astype(np.int32)))
    others_BT = batch["segments"] > 1
    np.testing.assert_array_equal(after_BTV[others_BT], before_BTV[others_BT])
    first_BT = batch["segments"] == 1
    assert (np.abs(after_BTV - before_BTV)[first_BT].max(-1) > 1e-3).all()


def test_packed_document_equals_the_document_alone():
    batch = rows()
    mesh = make_mesh(ONE, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.float32, start_values(CONFIG))
        params = jax.device_put(params, spec.shardings(param_specs(CONFIG), mesh))

        @jit
        def run(params, tokens_BT, positions_BT, segments_BT):
            columns = (reshard(a, P(BATCH, SEQ)) for a in (tokens_BT, positions_BT, segments_BT))
            return forward(params, *columns, CONFIG)[0]

        packed_BTD = np.asarray(run(params, *(batch[k] for k in ("tokens", "positions", "segments"))))
        alone = batch["tokens"][2:3, 8:16], np.arange(8, dtype=np.int32)[None], np.ones((1, 8), int)
        alone_BTD = np.asarray(run(params, *(a.astype(np.int32) for a in alone)))
    np.testing.assert_allclose(packed_BTD[2, 8:16], alone_BTD[0], atol=1e-5)


def test_tied_embedding_gets_the_gradient_of_both_uses():
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    assert set(param_specs(SMALL)) - set(param_specs(tied)) == {"head"}
    params = jax.tree.map(jnp.float32, start_values(tied))
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])) as _:
        mesh = jax.sharding.get_mesh()

        def gradient(params, config):
            params = jax.device_put(params, spec.shardings(param_specs(config), mesh))
            return jit(jax.grad(functools.partial(loss, config=config)))(params, rows())

        both = gradient(params, tied)["embedding"]
        apart = gradient({**params, "head": params["embedding"]}, SMALL)
    total = np.asarray(apart["embedding"]) + np.asarray(apart["head"])
    np.testing.assert_allclose(both, total, atol=TOLERANCE * np.abs(total).max())


def test_parameters_that_do_not_divide_are_refused_by_name():
    config = dataclasses.replace(CONFIG, width=33)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2), jax.devices()[:8])
    with pytest.raises(UsageError, match=r"parameter .*: dimension \d \(embed, size 33\)"):
        spec.shardings(param_specs(config), mesh)
