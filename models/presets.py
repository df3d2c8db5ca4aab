"""The published model families, each a value of `ModelConfig`: exact shapes, no code of their own.

Sizes are those of the released weights, so parameter counts equal the published ones and
checkpoints convert one to one. `ladder(size)` is a family of our own for research: one shape
grown from 10 million to 1 billion parameters. Imports nothing heavy.
"""

import dataclasses
from collections.abc import Callable

from models.config import ModelConfig, RopeConfig
from sharding.errors import UsageError, nearest


def gpt2_124m() -> ModelConfig:
    """GPT-2 small (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""
    return ModelConfig(
        vocab=50257,
        layers=12,
        width=768,
        heads=12,
        kv_heads=12,
        head_dim=64,
        mlp=3072,
        max_length=1024,
        norm="layernorm",
        position="learned",
        qkv_bias=True,
        out_bias=True,
        activation="gelu",
        tie_embeddings=True,
    )


def llama2_7b() -> ModelConfig:
    """Llama 2 7B (arXiv:2307.09288)."""
    return ModelConfig(
        vocab=32000,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp=11008,
        max_length=4096,
    )


def llama2_70b() -> ModelConfig:
    """Llama 2 70B (arXiv:2307.09288): grouped queries, 8 KV heads."""
    return dataclasses.replace(llama2_7b(), layers=80, width=8192, heads=64, kv_heads=8, mlp=28672)


def llama3_8b() -> ModelConfig:
    """Llama 3 8B as of 3.0 (arXiv:2407.21783): 8,192 tokens of context, no rope scaling."""
    return ModelConfig(
        vocab=128256,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14336,
        max_length=8192,
        rope=RopeConfig(theta=500_000.0),
    )


def llama3_70b() -> ModelConfig:
    """Llama 3 70B as of 3.0 (arXiv:2407.21783): 8,192 tokens of context, no rope scaling."""
    return dataclasses.replace(llama3_8b(), layers=80, width=8192, heads=64, mlp=28672)


def llama32_1b() -> ModelConfig:
    """Llama 3.2 1B (its model card): tied embeddings, context extended from 8,192 to 131,072."""
    return ModelConfig(
        vocab=128256,
        layers=16,
        width=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        mlp=8192,
        max_length=131072,
        tie_embeddings=True,
        rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=32.0, original_length=8192),
    )


def mistral_7b() -> ModelConfig:
    """Mistral 7B v0.1 (arXiv:2310.06825): every layer sees a window of 4,096 tokens."""
    return ModelConfig(
        vocab=32000,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14336,
        max_length=32768,
        pattern=("local",),
        window=4096,
    )


def qwen3_06b() -> ModelConfig:
    """Qwen3 0.6B (arXiv:2505.09388): norms on queries and keys, tied embeddings."""
    return ModelConfig(
        vocab=151936,
        layers=28,
        width=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        mlp=3072,
        max_length=40960,
        norm_eps=1e-6,
        qk_norm="head",
        tie_embeddings=True,
        rope=RopeConfig(theta=1_000_000.0),
    )


def qwen3_8b() -> ModelConfig:
    """Qwen3 8B (arXiv:2505.09388)."""
    return dataclasses.replace(
        qwen3_06b(), layers=36, width=4096, heads=32, mlp=12288, tie_embeddings=False
    )


def gemma2_2b() -> ModelConfig:
    """Gemma 2 2B (arXiv:2408.00118): local and global layers in turn, soft-capped logits."""
    return ModelConfig(
        vocab=256000,
        layers=26,
        width=2304,
        heads=8,
        kv_heads=4,
        head_dim=256,
        mlp=9216,
        max_length=8192,
        norm="rmsnorm_plus_one",
        norm_eps=1e-6,
        norm_placement="sandwich",
        pattern=("local", "global"),
        window=4096,
        attention_softcap=50.0,
        final_softcap=30.0,
        activation="geglu",
        tie_embeddings=True,
        scale_embeddings=True,
    )


def gemma3_1b() -> ModelConfig:
    """Gemma 3 1B (arXiv:2503.19786): five local layers to one global, each with its own theta."""
    return ModelConfig(
        vocab=262144,
        layers=26,
        width=1152,
        heads=4,
        kv_heads=1,
        head_dim=256,
        mlp=6912,
        max_length=32768,
        norm="rmsnorm_plus_one",
        norm_eps=1e-6,
        norm_placement="sandwich",
        pattern=("local",) * 5 + ("global",),
        window=512,
        qk_norm="head",
        activation="geglu",
        tie_embeddings=True,
        scale_embeddings=True,
        rope=RopeConfig(theta=1_000_000.0, local_theta=10_000.0),
    )


def olmo2_7b() -> ModelConfig:
    """OLMo 2 7B (arXiv:2501.00656): norms after each branch, and over all heads of q and of k."""
    return ModelConfig(
        vocab=100352,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp=11008,
        max_length=4096,
        norm_eps=1e-6,
        norm_placement="post",
        qk_norm="full",
        rope=RopeConfig(theta=500_000.0),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "gpt2-124m": gpt2_124m,
    "llama2-7b": llama2_7b,
    "llama2-70b": llama2_70b,
    "llama3-8b": llama3_8b,
    "llama3-70b": llama3_70b,
    "llama3.2-1b": llama32_1b,
    "mistral-7b": mistral_7b,
    "qwen3-0.6b": qwen3_06b,
    "qwen3-8b": qwen3_8b,
    "gemma2-2b": gemma2_2b,
    "gemma3-1b": gemma3_1b,
    "olmo2-7b": olmo2_7b,
}

# Size → (layers, width); a layer holds about 12 width² weights.
LADDER: dict[str, tuple[int, int]] = {
    "10m": (6, 384),
    "20m": (6, 512),
    "60m": (8, 768),
    "100m": (14, 768),
    "200m": (16, 1024),
    "400m": (20, 1280),
    "1b": (20, 2048),
}


def ladder(size: str) -> ModelConfig:
    """Returns the research model of about `size` parameters: Llama's layer, MLP of 8/3 width.

    Raises:
      UsageError: a size that is not in LADDER.
    """
    if size not in LADDER:
        raise UsageError(
            f"no model of size {size!r}; choose {', '.join(LADDER)}{nearest(size, LADDER)}"
        )
    layers, width = LADDER[size]
    head_dim = 128 if width >= 2048 else 64
    heads = width // head_dim
    return ModelConfig(
        vocab=384,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp=-(-width * 8 // (3 * 128)) * 128,
        max_length=8192,
    )
