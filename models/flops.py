"""Model FLOPs per token: what the mathematics needs, not what a program happens to execute.

The convention of MFU here (PaLM, arXiv:2204.02311, appendix B, with causal attention counted as
causal): 6 per weight of a matmul, head included and embedding lookup not, plus 12 per head
dimension and visible key for attention. Recomputation does not count.
"""

import math

import jax

from models.config import ModelConfig
from models.decoder import param_specs
from models.spec import is_spec


def matmul_weights(config: ModelConfig) -> int:
    """Weights that each token is multiplied with, the head once even when it is tied."""
    leaves = jax.tree.leaves(param_specs(config)["layers"], is_leaf=is_spec)
    inside = sum(math.prod(s.shape) for s in leaves if s.decay)
    return inside + config.vocab * config.width


def visible_keys(config: ModelConfig, kind: str, length: int) -> float:
    """Mean number of keys that a query of a full row of `length` sees under the causal mask."""
    window = min(config.window, length) if kind == "local" else length
    return window - window * (window - 1) / (2 * length)


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs per token of forward and backward at rows of `length` tokens."""
    keys = sum(visible_keys(config, kind, length) for kind in config.kinds)
    return 6.0 * matmul_weights(config) + 12.0 * config.heads * config.head_dim * keys
