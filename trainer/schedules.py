"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

import jax
import jax.numpy as jnp

from trainer.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int, step: jax.Array) -> jax.Array:
    """Returns the rate of update `step` (0-based) of `steps`: linear warm-up, then the schedule.

    The first update already moves (rate peak / warm-up); a cosine (arXiv:1608.03983) ends at
    `final_lr_fraction` of the peak on the last step.
    """
    step = step.astype(jnp.float32)
    warm = jnp.minimum(1.0, (step + 1.0) / max(config.warmup_steps, 1))
    if config.schedule == "constant":
        return config.peak_lr * warm
    done = (step + 1.0 - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
    final = config.final_lr_fraction
    return config.peak_lr * warm * (final + (1.0 - final) * cosine)
