"""Model FLOPs per token: what the mathematics needs, not what a program happens to execute.

The convention of MFU here (PaLM, arXiv:2204.02311, appendix B, with causal attention counted as
causal): 6 per weight of a matmul, head included and embedding lookup not, plus 12 per head
dimension and visible key for attention. Recomputation does not count.
"""

import math

import jax
import numpy as np

from models.config import ModelConfig
from models.decoder import param_specs
from models.spec import is_spec


def matmul_weights(config: ModelConfig) -> int:
    """Weights that each token is multiplied with, the head once even when it is tied."""
    leaves = jax.tree.leaves(param_specs(config)["layers"], is_leaf=is_spec)
    inside = sum(math.prod(s.shape) for s in leaves if s.decay)
    return inside + config.vocab * config.width


def visible_keys(config: ModelConfig, kind: str, length: np.ndarray | int) -> np.ndarray | float:
    """Mean number of keys that a query of a segment of `length` sees under the causal mask."""
    window = np.minimum(config.window, length) if kind == "local" else length
    return window - window * (window - 1) / (2 * length)


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs per token of forward and backward where a document fills a row of `length` tokens."""
    return train_flops(config, np.asarray([length])) / length


def train_flops(config: ModelConfig, segments: np.ndarray) -> float:
    """FLOPs of forward and backward over packed documents that do not see one another.

    Args:
      segments: (documents,), the tokens of each. Padding belongs to none.
    """
    segments = segments[segments > 0]
    kinds = {kind: config.kinds.count(kind) for kind in dict.fromkeys(config.kinds)}
    pairs = sum(
        count * float((segments * visible_keys(config, kind, segments)).sum())
        for kind, count in kinds.items()
    )
    weights = matmul_weights(config) * float(segments.sum())
    return 6.0 * weights + 12.0 * config.heads * config.head_dim * pairs
