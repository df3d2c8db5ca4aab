"""Tiny models of `transformers` with every feature of their family on, and what ours should be.

Odd vocabulary, heads wider than width / heads where the family allows, windows shorter than the
sequence, rotary scaling in force, norms and biases away from neutral. Imports torch when called.
"""

import dataclasses
from pathlib import Path
from typing import Any

from models.config import ModelConfig, RopeConfig

V, D, L, N, K, H, F, T = 91, 48, 3, 4, 2, 16, 80, 40
SIZES = dict(vocab=V, width=D, layers=L, heads=N, kv_heads=K, head_dim=H, mlp=F,
             max_length=64, dtype="float32", remat="none", norm_eps=1e-6)  # fmt: skip
THEIR_SIZES = dict(vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=N,
                   num_key_value_heads=K, intermediate_size=F, max_position_embeddings=64,
                   rms_norm_eps=1e-6, tie_word_embeddings=False)  # fmt: skip


@dataclasses.dataclass
class Family:
    """One row of the table: their config class and fields, ours, and what must break the match."""

    theirs: str
    their_fields: dict
    ours: dict
    breaks: dict
    layers: int = L


def rope(kind: str = "default", theta: float = 10_000.0, **fields) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **fields}


FAMILIES = {
    "gpt2": Family(
        "GPT2",
        dict(n_positions=64, n_embd=D, n_layer=L, n_head=N, n_inner=F, layer_norm_epsilon=1e-6),
        dict(norm="layernorm", position="learned", qkv_bias=True, out_bias=True, kv_heads=N,
             head_dim=D // N, activation="gelu", tie_embeddings=True),
        dict(norm_eps=1e-1),
    ),
    "llama2": Family("Llama", dict(head_dim=H), {}, dict(norm_eps=1e-1)),
    "llama3": Family(
        "Llama",
        dict(head_dim=H, tie_word_embeddings=True, rope_parameters=rope(
            "llama3", 500_000.0, factor=8.0, original_max_position_embeddings=16,
            low_freq_factor=1.0, high_freq_factor=4.0)),
        dict(tie_embeddings=True, rope=RopeConfig(
            theta=500_000.0, scaling="llama3", factor=8.0, original_length=16)),
        dict(rope=RopeConfig(theta=500_000.0)),
    ),
    "linear": Family(
        "Llama",
        dict(head_dim=H, rope_parameters=rope("linear", factor=3.0)),
        dict(rope=RopeConfig(scaling="linear", factor=3.0)),
        dict(rope=RopeConfig()),
    ),
    "yarn": Family(
        "Qwen3",
        dict(head_dim=H, rope_parameters=rope(
            "yarn", 1e4, factor=4.0, original_max_position_embeddings=32)),
        dict(qk_norm="head", rope=RopeConfig(scaling="yarn", factor=4.0, original_length=32)),
        dict(rope=RopeConfig(scaling="yarn", factor=4.0, original_length=64)),
    ),
    "yarn, narrow band": Family(
        "Llama",
        dict(head_dim=H, rope_parameters=rope(
            "yarn", 1e4, factor=8.0, original_max_position_embeddings=2048,
            beta_fast=16.0, beta_slow=4.0)),
        dict(rope=RopeConfig(
            scaling="yarn", factor=8.0, original_length=2048, beta_fast=16.0, beta_slow=4.0)),
        dict(rope=RopeConfig(scaling="yarn", factor=8.0, original_length=64)),
    ),
    "mistral": Family(
        "Mistral",
        dict(head_dim=H, sliding_window=7),
        dict(pattern=("local",), window=7),
        dict(window=8),
    ),
    "qwen2": Family(
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=9, max_window_layers=2,
             layer_types=["full_attention", "full_attention", "sliding_attention"]),
        dict(qkv_bias=True, head_dim=D // N, pattern=("global", "global", "local"), window=9),
        dict(window=10),
    ),
    "qwen3": Family(
        "Qwen3",
        dict(head_dim=H, tie_word_embeddings=True, rope_parameters=rope(theta=1e6)),
        dict(qk_norm="head", tie_embeddings=True, rope=RopeConfig(theta=1e6)),
        dict(rope=RopeConfig()),
    ),
    "gemma2": Family(
        "Gemma2",
        dict(head_dim=H, sliding_window=6, query_pre_attn_scalar=9, attn_logit_softcapping=1.5,
             final_logit_softcapping=2.0, tie_word_embeddings=True),
        dict(norm="rmsnorm_plus_one", norm_placement="sandwich", pattern=("local", "global"),
             window=6, attention_scale=9**-0.5, attention_softcap=1.5, final_softcap=2.0,
             activation="geglu", tie_embeddings=True, scale_embeddings=True),
        dict(attention_softcap=1.6),
        layers=5,
    ),
    "gemma3": Family(
        "Gemma3Text",
        dict(head_dim=H, sliding_window=6, query_pre_attn_scalar=9, tie_word_embeddings=True,
             layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2
             + ["sliding_attention"],
             rope_parameters={"sliding_attention": rope(theta=1e3),
                              "full_attention": rope("linear", 1e6, factor=8.0)}),
        dict(norm="rmsnorm_plus_one", norm_placement="sandwich", qk_norm="head",
             pattern=("local", "local", "global"), window=6, attention_scale=9**-0.5,
             activation="geglu", tie_embeddings=True, scale_embeddings=True,
             rope=RopeConfig(theta=1e6, local_theta=1e3, scaling="linear", factor=8.0)),
        dict(rope=RopeConfig(theta=1e6, scaling="linear", factor=8.0)),
        layers=7,
    ),
    "olmo2": Family(
        "Olmo2",
        dict(rope_parameters=rope(theta=5e5)),
        dict(norm_placement="post", qk_norm="full", head_dim=D // N, rope=RopeConfig(theta=5e5)),
        dict(qk_norm="head"),
    ),
    "phi3": Family(
        "Phi3",
        dict(sliding_window=9, pad_token_id=0, rope_parameters=rope(partial_rotary_factor=0.5)),
        dict(head_dim=D // N, pattern=("local",), window=9, rope=RopeConfig(fraction=0.5)),
        dict(rope=RopeConfig()),
    ),
    "gemma": Family(
        "Gemma",
        dict(head_dim=H, tie_word_embeddings=True),
        dict(norm="rmsnorm_plus_one", activation="geglu", tie_embeddings=True,
             scale_embeddings=True),
        dict(norm="rmsnorm"),
    ),
    "smollm": Family(
        "Llama",
        dict(hidden_size=36, num_attention_heads=3, num_key_value_heads=1, head_dim=12,
             tie_word_embeddings=True, rope_parameters=rope(theta=1e5)),
        dict(width=36, heads=3, kv_heads=1, head_dim=12, tie_embeddings=True,
             rope=RopeConfig(theta=1e5)),
        dict(rope=RopeConfig()),
    ),
    "gpt neox": Family(
        "GPTNeoX",
        dict(layer_norm_eps=1e-6, rope_parameters=rope(partial_rotary_factor=0.5)),
        dict(norm="layernorm", qkv_bias=True, out_bias=True, kv_heads=N, head_dim=D // N,
             activation="gelu_exact", parallel_residual=True, rope=RopeConfig(fraction=0.5)),
        dict(parallel_residual=False),
    ),
    "gpt neox, one after the other": Family(
        "GPTNeoX",
        dict(layer_norm_eps=1e-6, use_parallel_residual=False, hidden_act="gelu_new",
             rope_parameters=rope("linear", factor=2.0, partial_rotary_factor=0.5)),
        dict(norm="layernorm", qkv_bias=True, out_bias=True, kv_heads=N, head_dim=D // N,
             activation="gelu",
             rope=RopeConfig(fraction=0.5, scaling="linear", factor=2.0)),
        dict(parallel_residual=True),
    ),
}  # fmt: skip


def build(family: Family) -> Any:
    """Returns their model with every weight random, norms and biases included."""
    import torch
    import transformers

    sizes = {} if family.theirs == "GPT2" else THEIR_SIZES
    fields = {**sizes, "num_hidden_layers": family.layers, "vocab_size": V, **family.their_fields}
    if family.theirs == "GPT2":
        fields.pop("num_hidden_layers")
    if family.theirs == "GPTNeoX":
        fields.pop("num_key_value_heads")
        fields.pop("rms_norm_eps")
    config = getattr(transformers, f"{family.theirs}Config")(**fields)
    config._attn_implementation = "eager"
    name = "Gemma3" if family.theirs == "Gemma3Text" else family.theirs
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, kind)(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
    return model


def expected(family: Family) -> ModelConfig:
    """Returns the ModelConfig that their config.json has to become."""
    config = ModelConfig(**{**SIZES, "layers": family.layers, **family.ours})
    return dataclasses.replace(config, dtype=ModelConfig.dtype, remat=ModelConfig.remat)


def opened(folder: Path, **options: Any) -> Any:
    """Returns the model that `transformers` makes of a folder, every tensor of it in its place."""
    import transformers

    model, facts = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(facts.values()), facts  # missing, unexpected, mismatched
    return model
