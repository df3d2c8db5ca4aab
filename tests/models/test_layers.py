"""Norms, rotary embeddings and the MLP by their own definitions; families are test_parity.py's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import layers
from models.config import ModelConfig, RopeConfig

CONFIG = ModelConfig(width=32, heads=4, kv_heads=2, head_dim=16, mlp=48, dtype="float32")


@pytest.mark.parametrize("kind", ["rmsnorm", "rmsnorm_plus_one", "layernorm"])
def test_norms_follow_their_formula(kind):
    config = dataclasses.replace(CONFIG, norm=kind, norm_eps=1e-3)
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(1.0, 3.0, (5, 32)), rng.normal(size=32), rng.normal(size=32)
    found = layers.norm(jnp.float32(x), {"scale": jnp.float32(w), "bias": jnp.float32(b)}, config)
    if kind == "layernorm":
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
        expected = expected * w + b
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
        expected *= 1 + w if kind == "rmsnorm_plus_one" else w
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.bfloat16(np.random.default_rng(0).normal(size=(4, 4096)))
    scale = {"scale": jnp.ones(4096)}
    found = layers.norm(x, scale, CONFIG)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, layers.norm(x.astype(jnp.float32), scale, CONFIG)
                                  .astype(jnp.bfloat16))  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [RopeConfig(), RopeConfig(fraction=0.5), RopeConfig(scaling="llama3", factor=8.0),
     RopeConfig(scaling="linear", factor=4.0)],
    ids=["plain", "partial", "llama3", "linear"],
)  # fmt: skip
def test_rotated_products_depend_on_distance_only(rope):
    config = dataclasses.replace(CONFIG, rope=rope)
    rng = np.random.default_rng(0)
    q_H, k_H = rng.normal(size=(2, 16)).astype(np.float32)

    def product(q_position, k_position):
        tables = layers.rope_tables(jnp.array([[q_position, k_position]]), config, "global")
        both_B2NH = jnp.stack([q_H, k_H])[None, :, None]
        q, k = layers.rotate(both_B2NH, tables)[0, :, 0]
        return float(q @ k)

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(3, 3) == pytest.approx(float(q_H @ k_H), abs=1e-4)
    assert abs(product(7, 3) - product(9, 3)) > 1e-3


def test_rotation_leaves_the_rest_of_the_head_alone():
    config = dataclasses.replace(CONFIG, rope=RopeConfig(fraction=0.25))
    x_BTNH = jax.random.normal(jax.random.key(0), (1, 3, 2, 16))
    tables = layers.rope_tables(jnp.array([[0, 5, 9]]), config, "global")
    turned_BTNH = layers.rotate(x_BTNH, tables)
    np.testing.assert_array_equal(turned_BTNH[..., 4:], x_BTNH[..., 4:])
    np.testing.assert_array_equal(turned_BTNH[:, 0], x_BTNH[:, 0])
    assert np.abs(turned_BTNH - x_BTNH)[:, 1:, :, :4].min() > 0


def test_llama3_scaling_divides_long_waves_and_keeps_short_ones():
    rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192)
    plain_R, _ = layers.rope_frequencies(dataclasses.replace(rope, scaling="none"), 128, "global")
    scaled_R, factor = layers.rope_frequencies(rope, 128, "global")
    wavelength_R = 2 * np.pi / plain_R
    ratio_R = scaled_R / plain_R
    np.testing.assert_allclose(ratio_R[wavelength_R < 8192 / 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio_R[wavelength_R > 8192], 1 / 8, rtol=1e-6)
    between_R = ratio_R[(wavelength_R > 8192 / 4) & (wavelength_R < 8192)]
    assert between_R.size and ((between_R > 1 / 8) & (between_R < 1)).all() and factor == 1.0


def test_yarn_scales_attention_and_interpolates_long_waves_only():
    rope = RopeConfig(scaling="yarn", factor=4.0, original_length=4096)
    plain_R, _ = layers.rope_frequencies(RopeConfig(), 128, "global")
    scaled_R, factor = layers.rope_frequencies(rope, 128, "global")
    assert factor == pytest.approx(0.1 * np.log(4) + 1)
    turns_R = 4096 * plain_R / (2 * np.pi)
    np.testing.assert_allclose(scaled_R[turns_R > 40] / plain_R[turns_R > 40], 1.0, rtol=1e-6)
    np.testing.assert_allclose(scaled_R[turns_R < 0.8] / plain_R[turns_R < 0.8], 0.25, rtol=1e-6)


def test_local_theta_is_for_local_layers_and_is_not_scaled():
    rope = RopeConfig(theta=1e6, local_theta=1e4, scaling="linear", factor=8.0)
    local_R, _ = layers.rope_frequencies(rope, 16, "local")
    global_R, _ = layers.rope_frequencies(rope, 16, "global")
    np.testing.assert_allclose(local_R, 1e4 ** -(np.arange(0, 16, 2) / 16), rtol=1e-5)
    np.testing.assert_allclose(global_R, 1e6 ** -(np.arange(0, 16, 2) / 16) / 8, rtol=1e-5)
