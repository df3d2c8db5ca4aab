"""KV-cached decoding against the full forward pass, on one device and on meshes; sampling rules."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

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
from sharding.config import AXES, MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ

TOLERANCE = 1e-5  # float32, logits of order 1: only the order of sums differs
T = 22
CONFIG = ModelConfig(
    vocab=61, layers=5, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, max_length=64,
    pattern=("local", "global"), window=5, dtype="float32", remat="full",
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [58], [9, 7, 9, 3, 2]]
ONE = MeshConfig(fsdp=1)
MANY = MeshConfig(data=2, fsdp=2, tensor=2)


def mesh_of(config: MeshConfig):
    return make_mesh(config, jax.devices()[: math.prod(getattr(config, axis) for axis in AXES)])


@functools.cache
def start_values() -> spec.Tree:
    rng = np.random.default_rng(7)
    return spec.map_specs(
        lambda _, s: np.float32(s.fill + s.std * rng.normal(size=s.shape)), param_specs(CONFIG)
    )


def place(params: spec.Tree, mesh) -> spec.Tree:
    return jax.device_put(params, spec.shardings(param_specs(CONFIG), mesh))


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@jit
def full_logits(params: spec.Tree, tokens_BT: jax.Array) -> jax.Array:
    """The uncached forward pass over rows without padding."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    rows = (reshard(a, P(BATCH, SEQ)) for a in (tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))
    return logits(params, forward(params, *rows, CONFIG)[0], CONFIG)


@pytest.mark.parametrize(
    "axes",
    [ONE, MANY, MeshConfig(fsdp=2, tensor=4)],
    ids=["one", "many", "more devices than KV heads"],
)
def test_cached_logits_equal_the_full_forward(axes):
    tokens_BT = np.random.default_rng(1).integers(0, 61, (4, T), dtype=np.int32)
    mesh = mesh_of(axes)
    with jax.set_mesh(mesh):
        params = place(start_values(), mesh)
        full_BTV = np.asarray(full_logits(params, tokens_BT))

        @jit
        def cached(params, tokens_BT):  # a chunk of 9, then one by one, after 3 holes
            params = resident(params, CONFIG)
            cache = init_cache(CONFIG, 4, 3 + T)
            first_BT = jnp.concatenate([jnp.zeros_like(tokens_BT[:, :3]), tokens_BT[:, :9]], 1)
            real_BT = jnp.zeros_like(first_BT) + (jnp.arange(12) >= 3)
            x_BTD, cache = extend(params, first_BT, real_BT, cache, CONFIG)
            out_BTV = logits(params, x_BTD[:, 3:], CONFIG)

            def one(cache, token_B):
                token_B1 = token_B[:, None]
                x_B1D, cache = extend(params, token_B1, jnp.ones_like(token_B1), cache, CONFIG)
                return cache, logits(params, x_B1D, CONFIG)[:, 0]

            _, rest_TBV = jax.lax.scan(one, cache, tokens_BT[:, 9:].T)
            return out_BTV, rest_TBV

        out_BTV, rest_TBV = cached(params, tokens_BT)
    np.testing.assert_allclose(out_BTV, full_BTV[:, :9], atol=TOLERANCE)
    np.testing.assert_allclose(np.swapaxes(rest_TBV, 0, 1), full_BTV[:, 9:], atol=TOLERANCE)


@functools.cache
def jitted(max_tokens: int, sampling: Sampling):
    return jit(make_generate(CONFIG, max_tokens, sampling))


def generate(prompts, max_tokens, sampling, axes=ONE, seeds=(0,)):
    """Returns the list of continuations of `prompts`."""
    mesh = mesh_of(axes)
    tokens_BT, real_BT = pad_prompts(prompts, axes.data * axes.fsdp)
    seeds_B = np.resize(np.array(seeds, np.uint32), len(tokens_BT))
    with jax.set_mesh(mesh):
        tokens_BM, lengths_B = jitted(max_tokens, sampling)(
            place(start_values(), mesh), tokens_BT, real_BT, seeds_B
        )
    rows = zip(np.asarray(tokens_BM), np.asarray(lengths_B), strict=True)
    return [row[:length].tolist() for row, length in rows][: len(prompts)]


@functools.cache
def greedy_by_full_forward() -> list[list[int]]:
    """The definition of 10 greedy tokens for each prompt: everything again for each token."""
    rows_BT = np.zeros((len(PROMPTS), T), np.int32)  # causal: zeros that follow do not matter
    ends = [len(prompt) for prompt in PROMPTS]
    for row_T, prompt in zip(rows_BT, PROMPTS, strict=True):
        row_T[: len(prompt)] = prompt
    with jax.set_mesh(mesh_of(ONE)):
        params = place(start_values(), mesh_of(ONE))
        for i in range(10):
            logits_BTV = np.asarray(full_logits(params, rows_BT))
            for b, end in enumerate(ends):
                rows_BT[b, end + i] = np.argmax(logits_BTV[b, end + i - 1])
    return [rows_BT[b, end : end + 10].tolist() for b, end in enumerate(ends)]


@pytest.mark.parametrize("axes", [ONE, MANY], ids=["one", "many"])
def test_greedy_text_equals_the_full_forward(axes):
    expected = greedy_by_full_forward()
    assert generate(PROMPTS, 10, Sampling(temperature=0.0), axes) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def test_row_stops_at_its_stop_token():
    full = greedy_by_full_forward()
    stop = full[0][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in full]
    assert generate(PROMPTS, 10, Sampling(temperature=0.0, stop=(stop, 60))) == [
        row[: row.index(60)] if 60 in row else row for row in cut
    ]


def test_text_depends_on_the_own_seed_and_prompt_only():
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.9)

    def text(prompts, seeds):
        return generate(prompts, 8, sampling, MANY, seeds)

    longest, third = PROMPTS[0], PROMPTS[2]
    together = text(PROMPTS, [5, 6, 7, 8])
    assert together == text(PROMPTS, [5, 6, 7, 8])
    assert text([third, longest], [7, 1])[0] == together[2]  # other neighbours, another row
    assert text([third, longest], [9, 1])[0] != together[2]


def allowed(logits_V, **rules) -> set[int]:
    row = filtered(jnp.asarray([logits_V], jnp.float32), Sampling(**rules))[0]
    return set(np.flatnonzero(np.isfinite(row)).tolist())


def test_top_k_and_top_p_keep_the_right_tokens():
    p = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
    assert allowed(np.log(p)) == {0, 1, 2, 3, 4}
    assert allowed(np.log(p), top_k=2) == {1, 3}
    assert allowed(np.log(p), top_k=9) == {0, 1, 2, 3, 4}
    assert allowed(np.log(p), top_p=0.39) == {1}
    assert allowed(np.log(p), top_p=0.49) == {1, 3}
    assert allowed(np.log(p), top_p=0.84) == {1, 2, 3}
    assert allowed(np.log(p), top_p=0.86) == {1, 2, 3, 4}
    assert allowed(np.log(p), top_p=1e-6) == {1}
    # After top-k the rest counts as everything: 0.4 and 0.3 become 4/7 and 3/7.
    assert allowed(np.log(p), top_k=2, top_p=0.56) == {1}
    assert allowed(np.log(p), top_k=2, top_p=0.58) == {1, 3}
    # A hot temperature flattens before top-p cuts.
    assert allowed(np.log(p), top_p=0.49, temperature=4.0) == {1, 2, 3}
    np.testing.assert_allclose(
        filtered(jnp.log(jnp.asarray([p])), Sampling(temperature=0.5)), 2 * np.log([p]), rtol=1e-6
    )


def test_tokens_are_drawn_with_their_probabilities():
    p = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
    count = 20_000
    with jax.set_mesh(mesh_of(MeshConfig(data=2, fsdp=4))):
        logits_BV = np.log(np.tile(p, (count, 1))).astype(np.float32)
        draw = jit(lambda a, s: sample(a, s, 3, Sampling(top_k=4)))
        drawn = np.asarray(draw(logits_BV, np.arange(count, dtype=np.uint32)))
    expected = np.where(p > 0.05, p, 0) / 0.95
    # Five standard deviations of a binomial proportion.
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / count, expected, atol=0.018)


def test_pad_prompts_fills_rows_on_the_left():
    tokens_BT, real_BT = pad_prompts([[7, 8, 9], [5]], 4)
    assert tokens_BT.tolist() == [[7, 8, 9], [0, 0, 5], [0, 0, 5], [0, 0, 5]]
    assert real_BT.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-1.0), r"temperature = -1.0: at least 0"),
        (Sampling(temperature=float("nan")), r"temperature = nan"),
        (Sampling(top_k=-2), r"top-k = -2: at least 0"),
        (Sampling(top_p=0.0), r"top-p = 0.0: above 0 and at most 1"),
        (Sampling(top_p=1.1), r"top-p = 1.1"),
    ],
)
def test_bad_sampling_is_refused(sampling, message):
    with pytest.raises(UsageError, match=message):
        make_generate(CONFIG, 1, sampling)


def test_bad_calls_are_refused():
    with pytest.raises(UsageError, match="max-tokens = 0: at least 1"):
        make_generate(CONFIG, 0, Sampling())
    with pytest.raises(UsageError, match=r"a prompt of 8 tokens and 57 new ones exceed .* 64"):
        generate(PROMPTS, 57, Sampling())
    with pytest.raises(UsageError, match="a prompt has no tokens"):
        pad_prompts([[1], []])
    with (
        jax.set_mesh(mesh_of(MeshConfig(fsdp=1, seq=2))),
        pytest.raises(UsageError, match="decoding needs a mesh with seq = 1, this one has 2"),
    ):
        init_cache(CONFIG, 4, 8)
    with (
        jax.set_mesh(mesh_of(MeshConfig(fsdp=1, tensor=3))),
        pytest.raises(UsageError, match=r"KV cache: dimension 3 \(kv_heads, size 2\) .* size 3"),
    ):
        init_cache(CONFIG, 4, 8)
