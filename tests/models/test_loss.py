"""The chunked cross-entropy against the plain one: values, gradients, and the memory it saves."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.loss import X_BTD, LossOptions, cross_entropy
from sharding.config import AXES, MeshConfig
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ

TOLERANCE = 1e-5  # float32, gradients of order 1
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
B, T, D, V, PADDED = 4, 6, 16, 37, 48
HEAD, ROWS = P("tensor", "fsdp"), P(BATCH, SEQ)
ONE, MANY = MeshConfig(fsdp=1), MeshConfig(data=2, fsdp=2, tensor=2)
PARTS = MeshConfig(fsdp=2, seq=2, tensor=2)


def plain(x_BTD, head_VD, targets_BT, weights_BT, options):
    """Full logits, autodiff."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD.astype(x_BTD.dtype),
                            preferred_element_type=jnp.float32)  # fmt: skip
    logits_BTV = logits_BTV[..., : options.vocab]
    if options.softcap:
        logits_BTV = options.softcap * jnp.tanh(logits_BTV / options.softcap)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll = jnp.sum(weights_BT * (lse_BT - target_BT))
    return nll + options.z_loss * jnp.sum(weights_BT * lse_BT**2), nll


def example(seed: int = 0):
    """Hidden states, head (padding rows large), targets up to the last true id, zero weights."""
    rng = np.random.default_rng(seed)
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    head_VD = (rng.normal(size=(PADDED, D)) * D**-0.5).astype(np.float32)
    head_VD[V:] = 50.0
    targets_BT = rng.integers(0, V, (B, T), dtype=np.int32)
    targets_BT[0, :2] = 0, V - 1
    weights_BT = rng.choice([0.0, 0.0, 0.5, 1.0, 2.0], (B, T)).astype(np.float32)
    weights_BT[1] = 0.0
    weights_BT[0, :2] = 1.0
    return x_BTD, head_VD, targets_BT, weights_BT


def both(loss, arrays, options, scale=0.5):
    """Returns objective, nll, dx_BTD and dhead_VD, the gradients of `scale` times the objective."""

    def scaled(x_BTD, head_VD, *rest):
        objective, nll = loss(x_BTD, head_VD, *rest, options)
        return scale * objective, (objective, nll)

    (_, values), gradients = jit(jax.value_and_grad(scaled, (0, 1), has_aux=True))(*arrays)
    return [np.asarray(a) for a in (*values, *gradients)]


def placed_both(arrays, options, axes, scale=0.5):
    """As `both` for the chunked loss on a mesh."""
    mesh = make_mesh(axes, jax.devices()[: math.prod(getattr(axes, a) for a in AXES)])
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in zip(arrays, (X_BTD, HEAD, ROWS, ROWS), strict=True)
        ]
        return both(cross_entropy, placed, options, scale)


@pytest.mark.parametrize(
    ("axes", "fields"),
    [
        (ONE, {}),
        (ONE, dict(chunks=1)),
        (ONE, dict(chunks=5, softcap=2.0, z_loss=0.1)),  # 24 tokens: the last chunk is not full
        (ONE, dict(chunks=24, z_loss=0.1)),
        (MANY, dict(chunks=1)),
        (MANY, dict(chunks=4, softcap=3.0, z_loss=0.1)),
        (PARTS, dict(chunks=2, softcap=3.0, z_loss=0.1)),
    ],
    ids=["one", "1 chunk", "uneven", "1 token a chunk", "many", "many, chunks", "seq"],
)
def test_values_and_gradients_equal_the_plain_loss(axes, fields):
    options = LossOptions(V, "float32", **fields)
    arrays = example()
    expected = both(plain, arrays, options)
    found = placed_both(arrays, options, axes)
    for name, a, b in zip(("objective", "nll", "dx", "dhead"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    assert not found[2][1].any()  # the row of weight 0
    assert not found[3][V:].any()  # rows of vocabulary padding


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize(
    ("axes", "tokens"), [(ONE, 8113), (ONE, 12301), (MANY, 12301), (PARTS, 12301)],
    ids=["8113", "12301", "many", "seq"],
)  # fmt: skip
def test_bfloat16_gradients_are_the_float32_ones(axes, tokens, chunks):
    """The mean over so many tokens scales by a factor that bfloat16 rounds by 0.2% to 0.3%."""
    arrays = example()
    x_BTD = jnp.asarray(arrays[0], jnp.bfloat16)
    arrays = (np.asarray(x_BTD, np.float32), *arrays[1:])
    expected = both(plain, arrays, LossOptions(V, "float32"), scale=1 / tokens)
    options = LossOptions(V, "bfloat16", chunks=chunks)
    found = placed_both((x_BTD, *arrays[1:]), options, axes, scale=1 / tokens)
    for name, a, b in zip(("dx", "dhead"), found[2:], expected[2:], strict=True):
        a = np.asarray(a, np.float32)
        # Each operand is rounded once, by 2**-8 at most, which averages out over hundreds of values
        # (0.03% here); a common factor that is wrong does not.
        factor = np.vdot(a, b) / np.vdot(b, b)
        assert abs(factor - 1) < 1e-3, f"{name} is {factor:.5f} times what it should be"
        np.testing.assert_allclose(a, b, atol=2**-7 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("chunks", [1, 5])
def test_the_gradient_of_a_bfloat16_head_is_a_float32_sum(chunks):
    """On eight devices as on one: what a device adds is not rounded before it is added.

    Log-sum-exps differ by float32 rounding, which moves a few products by a step of bfloat16: the
    mean error is a tenth of that of rounding every sum.
    """
    x_BTD, *rest = example()
    arrays = (jnp.asarray(x_BTD, jnp.bfloat16), *rest)
    one = placed_both(arrays, LossOptions(V, "bfloat16", chunks=1), ONE, scale=1.0)[3]
    errors = {}
    for reduce_dtype in ("float32", "bfloat16"):
        options = LossOptions(V, "bfloat16", chunks=chunks, reduce_dtype=reduce_dtype)
        dhead_VD = placed_both(arrays, options, MANY, scale=1.0)[3]
        errors[reduce_dtype] = np.linalg.norm(dhead_VD - one) / np.linalg.norm(one)
        rounded = np.asarray(jnp.bfloat16(dhead_VD), np.float32)
        assert (rounded == dhead_VD).all() == (reduce_dtype == "bfloat16")
    assert errors["float32"] < 2e-4 and errors["bfloat16"] > 1e-3, errors


def test_no_weight_at_all_gives_zero():
    x_BTD, head_VD, targets_BT, weights_BT = example()
    arrays = (x_BTD, head_VD, targets_BT, 0 * weights_BT)
    for found in placed_both(arrays, LossOptions(V, "float32", z_loss=0.1), ONE):
        assert not found.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporary_memory_is_a_fraction_of_the_plain_loss(dtype):
    """Compiled only: 16,384 tokens of width 1,024 against a vocabulary of 131,072."""
    vocab, batch, length, width = 131_072, 4, 4096, 1024
    options = LossOptions(vocab, dtype)
    mesh = make_mesh(ONE, jax.devices()[:1])

    def megabytes(loss, placed):
        def shape(dims, kind, spec):
            sharding = NamedSharding(mesh, spec) if placed else None
            return jax.ShapeDtypeStruct(dims, kind, sharding=sharding)

        arguments = (
            shape((batch, length, width), jnp.dtype(dtype), X_BTD),
            shape((vocab, width), jnp.float32, HEAD),
            shape((batch, length), jnp.int32, ROWS),
            shape((batch, length), jnp.float32, ROWS),
        )
        step = jit(jax.value_and_grad(lambda *a: loss(*a, options), (0, 1), has_aux=True))
        memory = step.lower(*arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes / 2**20

    with jax.set_mesh(mesh):
        chunked = megabytes(cross_entropy, placed=True)
    whole = megabytes(plain, placed=False)
    print(f"{dtype}: {chunked:.0f} MB instead of {whole:.0f}, {chunked / whole:.1%}")
    assert whole > batch * length * vocab * 4 / 2**20  # the plain loss does hold full logits
    assert chunked < 0.15 * whole
