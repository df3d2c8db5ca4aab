"""The optimizer as an optax chain that returns a direction; the step multiplies by the rate.

Clipping uses the global norm that the step computes anyway, and the rate is a function of the
step, so neither is part of the chain and neither has state.
"""

import jax
import jax.numpy as jnp
import optax

from models.spec import Tree, decay_mask
from trainer.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    """Returns AdamW without its rate: Adam's direction plus decayed weights where specs say so."""
    parts = [
        optax.scale_by_adam(
            config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.moment_dtype)
        )
    ]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask(specs)))
    return optax.chain(*parts)


def clip_scale(grad_norm: jax.Array, clip_norm: float) -> jax.Array:
    """Returns the factor that brings a gradient of norm `grad_norm` to at most `clip_norm`."""
    if not clip_norm:
        return jnp.ones(())
    return jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-12))
