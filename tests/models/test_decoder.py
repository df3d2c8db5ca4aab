"""The decoder against itself: on meshes, rematerialised, unrolled, packed, with a tied head."""

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
from models.decoder import X_BTD, _embedded, forward, head_VD, logits, param_specs
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
    """Random values around each parameter's start, so that no norm is 1 and no bias 0."""
    rng = np.random.default_rng(0)
    return spec.map_specs(
        lambda _, s: s.fill + (s.std or 0.1) * rng.normal(size=s.shape).astype(np.float32),
        param_specs(config),
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
        params = start_values(config)
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
    [
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(fsdp=2, seq=2, tensor=2),
        MeshConfig(fsdp=1, seq=2, tensor=4),  # of two KV heads
    ],
    ids=["data fsdp tensor", "fsdp seq tensor", "seq tensor 4"],
)
def test_gradients_are_the_same_on_every_mesh(axes):
    check(loss_and_gradient(SMALL, axes), small_gradient())


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(ONE, marks=pytest.mark.soak),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.soak),
        MeshConfig(fsdp=2, seq=2, tensor=2),
    ],
    ids=["one", "data fsdp tensor", "fsdp seq tensor"],
)
def test_bfloat16_gradients_follow_float32(axes):
    """Both of sums over tokens, so of the scale that training has."""
    check_rounded(
        loss_and_gradient(dataclasses.replace(SMALL, dtype="bfloat16"), axes), small_gradient()
    )


def check_rounded(found, wanted):
    """Compares bfloat16 with float32, parameter by parameter, by the norm of the difference.

    A layer rounds about twenty values in a row, forward and backward, by 0.17% each in the mean
    (2**-8 at most): 0.7% together, and several times that where norms and soft-caps take
    differences (3.3% is the most seen, in the norms of queries and keys). The sum of a few hundred
    rounded values, and so the common factor, is closer.
    """
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-2)
    for path, gradient in jax.tree.leaves_with_path(wanted[1]):
        ours = found[1]
        for key in path:
            ours = ours[key.key]
        error = np.linalg.norm(ours - gradient) / np.linalg.norm(gradient)
        factor = np.vdot(ours, gradient) / np.vdot(gradient, gradient)
        assert error < 0.05 and abs(factor - 1) < 0.02, f"{path}: {error:.3f}, {factor:.4f}"


def test_four_kv_heads_serve_eight_devices():
    config = dataclasses.replace(SMALL, layers=1, heads=8, kv_heads=4, head_dim=4)
    check(loss_and_gradient(config, MeshConfig(fsdp=1, tensor=8)), loss_and_gradient(config))


def test_prefix_keys_are_refused_where_rows_are_spread():
    batch = rows()
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, seq=2))):
        params = start_values(SMALL)
        with pytest.raises(UsageError, match=r"prefix keys needs .* one device, .* seq = 2"):
            jax.eval_shape(
                lambda params: forward(
                    params, batch["tokens"], batch["positions"], batch["segments"], SMALL,
                    prefix_BT=batch["segments"],
                ),
                params,
            )  # fmt: skip


@pytest.mark.parametrize(
    "activation", ["swiglu", pytest.param("gelu_exact", marks=pytest.mark.soak)]
)
def test_barriers_do_not_change_gradients(activation):
    plain = dataclasses.replace(SMALL, activation=activation)
    apart = dataclasses.replace(plain, barriers=True, remat="gate,up")
    check(loss_and_gradient(apart, MeshConfig(fsdp=2, seq=2, tensor=2)), loss_and_gradient(plain))


@pytest.mark.parametrize(
    "remat",
    ["full", ",".join(SAVEABLE), "attention,gate@host,residual@host"],
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
    # Values per token and layer; the kernel's few constants vanish in the rounding.
    kept = {k: round((size - sizes["full"]) / (2 * B * T)) for k, size in sizes.items()}
    assert kept["gate"] == 48
    assert kept["gate,up"] == 2 * 48
    assert kept["attention"] == 4 * 8 + 4  # output and log-sum-exp
    assert kept["none"] > 4 * 48


@pytest.fixture(scope="module")
def run():
    """A function from columns of a batch to logits, for layers scanned or unrolled."""
    mesh = make_mesh(ONE, jax.devices()[:1])
    params = start_values(CONFIG)
    params = jax.device_put(params, spec.shardings(param_specs(CONFIG), mesh))

    @functools.cache
    def program(scan_layers: bool):
        config = dataclasses.replace(CONFIG, scan_layers=scan_layers)

        @jit
        def logits_of(params, *columns):
            columns = (reshard(a_BT, P(BATCH, SEQ)) for a_BT in columns)
            return logits(params, forward(params, *columns, config)[0], config)

        return logits_of

    def call(tokens_BT, positions_BT, segments_BT, scan_layers=True):
        with jax.set_mesh(mesh):
            return np.asarray(program(scan_layers)(params, tokens_BT, positions_BT, segments_BT))

    return call


def test_unrolled_layers_give_the_same_logits(run):
    """Two scanned periods of the pattern and a layer left over, against five layers in a row."""
    batch = rows()
    columns = [batch[name] for name in ("tokens", "positions", "segments")]
    np.testing.assert_allclose(run(*columns), run(*columns, scan_layers=False), atol=1e-5)


def test_packed_documents_do_not_see_one_another(run):
    batch = rows()
    columns = batch["positions"], batch["segments"]
    packed_BTV = run(batch["tokens"], *columns)

    first_BT = batch["segments"] == 1
    changed_BTV = run(np.where(first_BT, (batch["tokens"] + 7) % 61, batch["tokens"]), *columns)
    others_BT = batch["segments"] > 1
    np.testing.assert_array_equal(changed_BTV[others_BT], packed_BTV[others_BT])
    assert (np.abs(changed_BTV - packed_BTV)[first_BT].max(-1) > 1e-3).all()


def test_packed_document_equals_the_document_alone(run):
    batch = rows()
    packed_BTV = run(batch["tokens"], batch["positions"], batch["segments"])
    alone_BT = np.zeros((3, B, T), np.int32)  # the third document of row 2, moved to the front
    alone_BT[:, 2, :8] = batch["tokens"][2, 8:], np.arange(8), np.ones(8)
    np.testing.assert_allclose(run(*alone_BT)[2, :8], packed_BTV[2, 8:], atol=1e-5)


def test_tied_embedding_gets_the_gradient_of_both_uses():
    untied = dataclasses.replace(SMALL, layers=1)
    tied = dataclasses.replace(untied, tie_embeddings=True)
    assert set(param_specs(untied)) - set(param_specs(tied)) == {"head"}
    params = start_values(tied)
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])):
        mesh = jax.sharding.get_mesh()

        def gradient(params, config):
            params = jax.device_put(params, spec.shardings(param_specs(config), mesh))
            return jit(jax.grad(functools.partial(loss, config=config)))(params, rows())

        both = gradient(params, tied)["embedding"]
        apart = gradient({**params, "head": params["embedding"]}, untied)
    total = np.asarray(apart["embedding"]) + np.asarray(apart["head"])
    np.testing.assert_allclose(both, total, atol=TOLERANCE * np.abs(total).max())


@pytest.mark.parametrize(("vocab", "travels"), [(64, "all-to-all"), (4, "all-gather")])
def test_either_tokens_travel_or_the_table(vocab, travels):
    table_VD = np.random.default_rng(0).normal(size=(vocab, 32)).astype(np.float32)
    config = dataclasses.replace(CONFIG, vocab=vocab, pad_vocab_to=vocab)
    tokens_BT, weights_BTD = rows()["tokens"] % vocab, np.ones((B, T, 32)) * np.arange(32)
    mesh = make_mesh(MeshConfig(fsdp=4, seq=2))
    with jax.set_mesh(mesh):
        tokens = jax.device_put(tokens_BT, jax.NamedSharding(mesh, P(BATCH, SEQ)))
        table = jax.device_put(table_VD, jax.NamedSharding(mesh, P(None, "fsdp")))

        def weighted(table):
            x_BTD = _embedded({"embedding": table}, tokens, X_BTD, config)
            return jnp.sum(x_BTD * weights_BTD), x_BTD

        step = jit(jax.grad(weighted, has_aux=True)).lower(table).compile()
        gradient_VD, x_BTD = step(table)
    assert x_BTD.sharding.spec == X_BTD and gradient_VD.sharding.spec == P(None, "fsdp")
    np.testing.assert_array_equal(x_BTD, table_VD[tokens_BT])
    wanted_VD = np.zeros_like(table_VD)
    np.add.at(wanted_VD, tokens_BT, weights_BTD)
    np.testing.assert_array_equal(gradient_VD, wanted_VD)
    assert f" {travels}(" in step.as_text()


def test_parameters_that_do_not_divide_are_refused_by_name():
    config = dataclasses.replace(CONFIG, width=33)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2), jax.devices()[:8])
    with pytest.raises(UsageError, match=r"parameter .*: dimension \d \(embed, size 33\)"):
        spec.shardings(param_specs(config), mesh)
