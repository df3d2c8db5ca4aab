"""Logits against Hugging Face transformers: tiny random models with every feature of the family on.

Both run on CPU in float32; the tolerance of 1e-4 on logits of order 1 is rounding. Each family
also names one feature which, taken away from our side, must break the match: a feature that the
tiny model does not exercise would prove nothing. The name tables here are the tests' own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models import spec
from models.config import ModelConfig, RopeConfig
from models.decoder import forward, logits, param_specs
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ

REASON = "no parity with Hugging Face was checked: pip install 'torus-train[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

TOLERANCE = 1e-4
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
    "stablelm, partial rotary": Family(
        "StableLm",
        dict(use_qkv_bias=True, layer_norm_eps=1e-6,
             rope_parameters=rope(partial_rotary_factor=0.5)),
        dict(norm="layernorm", qkv_bias=True, head_dim=D // N, rope=RopeConfig(fraction=0.5)),
        dict(rope=RopeConfig()),
    ),
}  # fmt: skip

# Our leaf → their name; "{i}" is the layer. Linear layers of theirs hold (out, in).
LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm/scale": "model.norm.weight",
    "final_norm/bias": "model.norm.bias",
    "layers/attention_norm/scale": "model.layers.{i}.input_layernorm.weight",
    "layers/attention_norm/bias": "model.layers.{i}.input_layernorm.bias",
    "layers/mlp_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/mlp_norm/bias": "model.layers.{i}.post_attention_layernorm.bias",
    **{f"layers/attention/w{x}": f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"layers/attention/b{x}": f"model.layers.{{i}}.self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"layers/attention/{x}_norm/scale": f"model.layers.{{i}}.self_attn.{x}_norm.weight"
       for x in "qk"},
    **{f"layers/mlp/{x}": f"model.layers.{{i}}.mlp.{x}_proj.weight"
       for x in ("gate", "up", "down")},
}  # fmt: skip
NAMES = {
    "pre": LLAMA,
    "post": LLAMA | {
        "layers/attention_post_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
        "layers/mlp_post_norm/scale": "model.layers.{i}.post_feedforward_layernorm.weight",
    },
    "sandwich": LLAMA | {
        "layers/attention_post_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
        "layers/mlp_norm/scale": "model.layers.{i}.pre_feedforward_layernorm.weight",
        "layers/mlp_post_norm/scale": "model.layers.{i}.post_feedforward_layernorm.weight",
    },
}  # fmt: skip
GPT2 = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "final_norm/scale": "transformer.ln_f.weight",
    "final_norm/bias": "transformer.ln_f.bias",
    "layers/attention_norm/scale": "transformer.h.{i}.ln_1.weight",
    "layers/attention_norm/bias": "transformer.h.{i}.ln_1.bias",
    "layers/mlp_norm/scale": "transformer.h.{i}.ln_2.weight",
    "layers/mlp_norm/bias": "transformer.h.{i}.ln_2.bias",
    **{f"layers/attention/w{x}": "transformer.h.{i}.attn.c_attn.weight" for x in "qkv"},
    **{f"layers/attention/b{x}": "transformer.h.{i}.attn.c_attn.bias" for x in "qkv"},
    "layers/attention/wo": "transformer.h.{i}.attn.c_proj.weight",
    "layers/attention/bo": "transformer.h.{i}.attn.c_proj.bias",
    "layers/mlp/up": "transformer.h.{i}.mlp.c_fc.weight",
    "layers/mlp/up_bias": "transformer.h.{i}.mlp.c_fc.bias",
    "layers/mlp/down": "transformer.h.{i}.mlp.c_proj.weight",
    "layers/mlp/down_bias": "transformer.h.{i}.mlp.c_proj.bias",
}  # fmt: skip


def build(family: Family):
    """Returns their model with every weight random, norms and biases included."""
    sizes = {} if family.theirs == "GPT2" else THEIR_SIZES
    fields = {**sizes, "num_hidden_layers": family.layers, "vocab_size": V, **family.their_fields}
    if family.theirs == "GPT2":
        fields.pop("num_hidden_layers")
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


def converted(model, config: ModelConfig) -> spec.Tree:
    """Returns their weights as our tree; vocabulary padding is filled with what must not matter."""
    state = {name: w.detach().numpy() for name, w in model.state_dict().items()}
    gpt2 = config.position == "learned"
    names = GPT2 if gpt2 else NAMES[config.norm_placement]

    def one(name: str, shape: tuple[int, ...], their_name: str) -> np.ndarray:
        w = state[their_name]
        if "c_attn" in their_name:
            w = np.split(w, 3, axis=-1)["qkv".index(name[-1])]
        return (w if gpt2 else w.T).reshape(shape)

    def leaf(name: str, s: spec.ParamSpec) -> np.ndarray:
        if not name.startswith("layers/"):
            w = state[names[name]]
            return np.concatenate([w, np.full((s.shape[0] - len(w), *w.shape[1:]), 77.0)])
        layers = [one(name, s.shape[1:], names[name].format(i=i)) for i in range(config.layers)]
        return np.stack(layers)

    return jax.tree.map(jnp.float32, spec.map_specs(leaf, param_specs(config)))


def our_logits(params: spec.Tree, tokens_BT: np.ndarray, config: ModelConfig) -> np.ndarray:
    config.validate()
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), tokens_BT.shape)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    # Compiling takes longer than running, so it is not to try hard.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
    def run(params, tokens_BT, positions_BT, segments_BT):
        x_BTD, _ = forward(params, tokens_BT, positions_BT, segments_BT, config)
        return logits(params, x_BTD, config)

    with jax.set_mesh(mesh):
        params = jax.device_put(params, spec.shardings(param_specs(config), mesh))
        rows = jax.device_put(
            (tokens_BT, positions_BT, np.ones_like(tokens_BT)), NamedSharding(mesh, P(BATCH, SEQ))
        )
        return np.asarray(run(params, *rows))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_hugging_face(name):
    family = FAMILIES[name]
    model = build(family)
    config = ModelConfig(**{**SIZES, "layers": family.layers, **family.ours})
    params = converted(model, config)
    tokens_BT = np.random.default_rng(0).integers(0, V, (2, T), dtype=np.int32)
    with torch.no_grad():
        theirs_BTV = model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    ours_BTV = our_logits(params, tokens_BT, config)
    assert np.std(theirs_BTV) > 0.3
    error = np.max(np.abs(ours_BTV - theirs_BTV))
    print(f"{name}: largest difference {error:.1e}, logits up to {np.abs(theirs_BTV).max():.1f}")
    assert error < TOLERANCE

    broken = dataclasses.replace(config, **family.breaks)
    ours_BTV = our_logits(params, tokens_BT, broken)
    assert np.max(np.abs(ours_BTV - theirs_BTV)) > 50 * TOLERANCE
