"""Rates, clipping and updates against numbers that are computed without any of this code."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.spec import ParamSpec
from trainer.config import OptimizerConfig
from trainer.optimizers import clip_scale, make_optimizer
from trainer.schedules import learning_rate

# Peak 0.1, four updates of warm-up, twelve updates in all: update 7 is the middle of the decay.
RATES = {
    "constant": {0: 0.025, 1: 0.05, 2: 0.075, 3: 0.1, 4: 0.1, 7: 0.1, 11: 0.1, 20: 0.1},
    # 0.1 * (0.2 + 0.8 * (1 + cos(pi * k / 8)) / 2) after k of the eight updates of the decay.
    "cosine": {
        0: 0.025, 1: 0.05, 2: 0.075, 3: 0.1, 4: 0.09695518130045147, 5: 0.08828427124746191,
        7: 0.06, 9: 0.03171572875253811, 10: 0.02304481869954854, 11: 0.02, 20: 0.02,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "step", "rate"),
    [(schedule, step, rate) for schedule, row in RATES.items() for step, rate in row.items()],
)
def test_learning_rate(schedule, step, rate):
    config = OptimizerConfig(peak_lr=0.1, warmup_steps=4, schedule=schedule, final_lr_fraction=0.2)
    found = learning_rate(config, 12, jnp.asarray(step, jnp.int32))
    assert float(found) == pytest.approx(rate, rel=1e-6)  # a few roundings of float32


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5)])
def test_learning_rate_without_a_decay(steps, warmup):
    """No division by zero where nothing is left after the warm-up; the last update ends it."""
    config = OptimizerConfig(peak_lr=0.1, warmup_steps=warmup, final_lr_fraction=0.1)
    last = float(learning_rate(config, steps, jnp.asarray(steps - 1, jnp.int32)))
    # Without any update left for a decay, the last one still has the rate of the warm-up's end.
    assert last == pytest.approx(0.1 if warmup == steps else 0.01, rel=1e-6)


@pytest.mark.parametrize(
    ("norm", "clip", "scale"),
    [
        (0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (4.0, 1.0, 0.25), (8.0, 2.0, 0.25),
        (1.0, 2.0, 1.0), (1e30, 1.0, 1e-30), (4.0, 0.0, 1.0), (0.25, 0.0, 1.0),
    ],
)  # fmt: skip
def test_clip_scale(norm, clip, scale):
    assert float(clip_scale(jnp.float32(norm), clip)) == pytest.approx(scale, rel=1e-6)


def test_a_clipped_gradient_has_the_norm_that_was_asked_for():
    gradient = np.random.default_rng(0).normal(size=100).astype(np.float32)
    norm = float(np.sqrt(np.sum(gradient.astype(np.float64) ** 2)))
    scaled = gradient * float(clip_scale(jnp.float32(norm), 0.3))
    assert math.sqrt(float(np.sum(scaled.astype(np.float64) ** 2))) == pytest.approx(0.3, rel=1e-6)


def adamw(parameter, gradients, rate, b1, b2, eps, decay):
    """AdamW (arXiv:1711.05101, algorithm 2) for one parameter in float64."""
    first = second = np.zeros_like(parameter)
    for count, gradient in enumerate(gradients, start=1):
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        mean, variance = first / (1 - b1**count), second / (1 - b2**count)
        step = mean / (np.sqrt(variance) + eps) + decay * parameter
        parameter = parameter - rate * step
    return parameter


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("decays", [True, False])
def test_updates_are_those_of_adamw(weight_decay, decays):
    config = OptimizerConfig(b1=0.8, b2=0.9, eps=1e-3, weight_decay=weight_decay)
    specs = {"w": ParamSpec((3, 5), (None, None), decay=decays)}
    rng = np.random.default_rng(1)
    start, *gradients = rng.normal(size=(6, 3, 5))
    tx = make_optimizer(config, specs)
    params = {"w": jnp.asarray(start, jnp.float32)}
    state = tx.init(params)
    for gradient in gradients:
        direction, state = tx.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = jax.tree.map(lambda p, d: p - 0.02 * d, params, direction)
    decay = weight_decay if decays else 0.0
    expected = adamw(start, gradients, 0.02, 0.8, 0.9, 1e-3, decay)
    # Five updates in float32, each good to about 1e-7 of a parameter near 1.
    np.testing.assert_allclose(params["w"], expected, rtol=2e-6, atol=2e-6)


def test_moments_have_the_dtype_that_was_asked_for():
    config = dataclasses.replace(OptimizerConfig(), moment_dtype="bfloat16")
    state = make_optimizer(config, {"w": ParamSpec((2,), (None,))}).init({"w": jnp.zeros(2)})
    assert state[0].mu["w"].dtype == jnp.bfloat16 and state[0].nu["w"].dtype == jnp.float32
