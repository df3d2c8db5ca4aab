"""Norms, rotary embeddings and the two halves of a layer: attention and MLP.

Letters: B batch, T query time, S key time, D width, N query heads, K KV heads, H head dim,
F MLP width, R rotated half of the head. Weights arrive as `linear.gathered` makes them; reductions
that would round badly are float32.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig, RopeConfig
from models.linear import add_bias, matmul
from models.spec import ParamSpec, Tree

# ---------------------------------------------------------------- norms


def norm_spec(config: ModelConfig, size: int | None = None, axes: tuple = ("norm",)) -> Tree:
    """Specs of one norm over the last `size` elements (the width by default)."""
    shape = (size,) if size else (config.width,)
    start = 0.0 if config.norm == "rmsnorm_plus_one" else 1.0
    specs = {"scale": ParamSpec(shape, axes, fill=start, decay=False)}
    if config.norm == "layernorm":
        specs["bias"] = ParamSpec(shape, axes, decay=False)
    return specs


def norm(x: jax.Array, params: Tree, config: ModelConfig) -> jax.Array:
    """RMSNorm (arXiv:1910.07467), with scale w or 1 + w, or LayerNorm, over the last axis."""
    x32 = x.astype(jnp.float32)
    if config.norm == "layernorm":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_eps)
    scale = params["scale"].astype(jnp.float32)
    x32 = x32 * (1.0 + scale if config.norm == "rmsnorm_plus_one" else scale)
    if config.norm == "layernorm":
        x32 = x32 + params["bias"].astype(jnp.float32)
    return x32.astype(x.dtype)


def apart(x, config: ModelConfig):
    """Returns x unchanged; under `config.barriers` XLA fuses nothing across it, either way.

    On a TPU a wide matmul with a norm or an activation fused in runs at 40 to 70% of its speed.
    """
    return jax.lax.optimization_barrier(x) if config.barriers else x


# ---------------------------------------------------------------- rotary embeddings


def rope_frequencies(rope: RopeConfig, head_dim: int, kind: str) -> tuple[jax.Array, float]:
    """Returns (inverse wavelengths_R in radians per position, factor on cos and sin).

    Scalings: linear (arXiv:2306.15595), llama3 (as published with Llama 3.1: frequencies below a
    band are divided, inside it blended), yarn (arXiv:2309.00071, sections 3.2 and 3.4).
    """
    rotated = int(rope.fraction * head_dim)
    local = kind == "local" and rope.local_theta > 0
    theta = rope.local_theta if local else rope.theta
    exponent_R = jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated
    frequency_R = 1.0 / theta**exponent_R
    if local or rope.scaling == "none":
        return frequency_R, 1.0
    if rope.scaling == "linear":
        return frequency_R / rope.factor, 1.0
    if rope.scaling == "llama3":
        turns_R = rope.original_length * frequency_R / (2 * math.pi)  # in the original context
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        blend_R = jnp.clip((turns_R - low) / (high - low), 0.0, 1.0)
        return frequency_R * (blend_R + (1 - blend_R) / rope.factor), 1.0

    def dimension(turns: float) -> float:  # the dimension that makes `turns` turns
        return (
            rotated * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), rotated - 1)
    ramp_R = jnp.clip((jnp.arange(rotated // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    frequency_R = frequency_R * (1 - ramp_R) + frequency_R / rope.factor * ramp_R
    return frequency_R, 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def rope_tables(positions_BT: jax.Array, config: ModelConfig, kind: str) -> Tree:
    """Returns {"cos", "sin"} of shape (B, T, 1, R), float32, for layers of `kind`."""
    frequency_R, factor = rope_frequencies(config.rope, config.head_dim, kind)
    angle_BT1R = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency_R
    return {"cos": jnp.cos(angle_BT1R) * factor, "sin": jnp.sin(angle_BT1R) * factor}


def rotate(x_BTNH: jax.Array, tables: Tree) -> jax.Array:
    """Rotates pairs (i, i + R) of the first 2R head dimensions; the rest passes through."""
    half = tables["cos"].shape[-1]
    first, second, rest = (
        x_BTNH[..., :half],
        x_BTNH[..., half : 2 * half],
        x_BTNH[..., 2 * half :],
    )
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    cos, sin = tables["cos"], tables["sin"]
    turned = (first * cos - second * sin, second * cos + first * sin)
    parts = [t.astype(x_BTNH.dtype) for t in turned]
    return jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)


# ---------------------------------------------------------------- attention projections


def attention_specs(config: ModelConfig) -> Tree:
    """Specs of one attention block. Output projections start smaller by sqrt(2 L)."""
    D, N, K, H = config.width, config.heads, config.kv_heads, config.head_dim
    std = D**-0.5
    specs = {
        "wq": ParamSpec((D, N, H), ("embed", "heads", "head_dim"), std),
        "wk": ParamSpec((D, K, H), ("embed", "kv_heads", "head_dim"), std),
        "wv": ParamSpec((D, K, H), ("embed", "kv_heads", "head_dim"), std),
        "wo": ParamSpec(
            (N, H, D), ("heads", "head_dim", "embed"), (N * H * 2 * config.layers) ** -0.5
        ),
    }
    if config.qkv_bias:
        specs["bq"] = ParamSpec((N, H), ("heads", "head_dim"), decay=False)
        specs["bk"] = ParamSpec((K, H), ("kv_heads", "head_dim"), decay=False)
        specs["bv"] = ParamSpec((K, H), ("kv_heads", "head_dim"), decay=False)
    if config.out_bias:
        specs["bo"] = ParamSpec((D,), ("norm",), decay=False)
    if config.qk_norm == "head":
        specs["q_norm"] = norm_spec(config, H)
        specs["k_norm"] = norm_spec(config, H)
    elif config.qk_norm == "full":
        for name, heads, axis in (("q_norm", N, "heads"), ("k_norm", K, "kv_heads")):
            specs[name] = {
                "scale": ParamSpec((heads, H), (axis, "head_dim"), fill=1.0, decay=False)
            }
    return specs


def qk_norm(x_BTNH: jax.Array, params: Tree, config: ModelConfig) -> jax.Array:
    """Norm of queries or keys, over each head or over all of them."""
    if config.qk_norm == "head":
        return norm(x_BTNH, params, config)
    x32 = x_BTNH.astype(jnp.float32)
    mean_BT11 = jnp.mean(jnp.square(x32), axis=(-2, -1), keepdims=True)
    x32 = x32 * jax.lax.rsqrt(mean_BT11 + config.norm_eps)
    return (x32 * params["scale"].astype(jnp.float32)).astype(x_BTNH.dtype)


def project_qkv(
    x_BTD: jax.Array, params: Tree, tables: Tree | None, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns rotated q_BTNH, rotated k_BTKH and v_BTKH, under their remat names."""
    q_BTNH = matmul(x_BTD, params["wq"])
    k_BTKH = matmul(x_BTD, params["wk"])
    v_BTKH = matmul(x_BTD, params["wv"])
    if config.qkv_bias:
        q_BTNH = add_bias(q_BTNH, params["bq"])
        k_BTKH = add_bias(k_BTKH, params["bk"])
        v_BTKH = add_bias(v_BTKH, params["bv"])
    if config.qk_norm != "none":
        q_BTNH = qk_norm(q_BTNH, params["q_norm"], config)
        k_BTKH = qk_norm(k_BTKH, params["k_norm"], config)
    if tables is not None:
        q_BTNH, k_BTKH = rotate(q_BTNH, tables), rotate(k_BTKH, tables)
    return (
        checkpoint_name(q_BTNH, "rotated_qk"),
        checkpoint_name(k_BTKH, "rotated_qk"),
        checkpoint_name(v_BTKH, "v"),
    )


# ---------------------------------------------------------------- MLP


def mlp_specs(config: ModelConfig) -> Tree:
    """Specs of one MLP: gate, up and down, or up and down for plain GELU."""
    D, F = config.width, config.mlp
    specs = {
        "up": ParamSpec((D, F), ("embed", "mlp"), D**-0.5),
        "down": ParamSpec((F, D), ("mlp", "embed"), (F * 2 * config.layers) ** -0.5),
    }
    if config.activation in ("swiglu", "geglu"):
        specs["gate"] = ParamSpec((D, F), ("embed", "mlp"), D**-0.5)
    if config.out_bias:
        specs["up_bias"] = ParamSpec((F,), ("mlp",), decay=False)
        specs["down_bias"] = ParamSpec((D,), ("norm",), decay=False)
    return specs


def mlp(x_BTD: jax.Array, params: Tree, config: ModelConfig, spec: P) -> jax.Array:
    """SwiGLU or GeGLU (arXiv:2002.05202), or GELU; its tanh form unless "gelu_exact"."""
    up_BTF = matmul(x_BTD, params["up"])
    if config.out_bias:
        up_BTF = add_bias(up_BTF, params["up_bias"])
    up_BTF = checkpoint_name(up_BTF, "up")
    if config.activation in ("gelu", "gelu_exact"):
        hidden_BTF = jax.nn.gelu(up_BTF, approximate=config.activation == "gelu")
    else:
        gate_BTF = checkpoint_name(matmul(x_BTD, params["gate"]), "gate")
        gate_BTF, up_BTF = apart((gate_BTF, up_BTF), config)
        kept = {name for part in config.remat_names() or () for name in part}
        gated = _gated_apart if config.barriers and {"gate", "up"} <= kept else _gated
        hidden_BTF = gated(gate_BTF, up_BTF, config.activation)
    y_BTD = matmul(apart(hidden_BTF, config), params["down"], 1, spec)
    return add_bias(y_BTD, params["down_bias"]) if config.out_bias else y_BTD


def _gated(gate_BTF: jax.Array, up_BTF: jax.Array, activation: str) -> jax.Array:
    act = jax.nn.silu if activation == "swiglu" else jax.nn.gelu
    return act(gate_BTF) * up_BTF


# Where gate and up are kept, their product is made again for the gradient of the down projection.
# XLA would make it together with its own gradient, and the matmuls around that take 5% longer on
# v5e; where gate and up are made again too, it should (docs/benchmarks.md).
_gated_apart = jax.custom_vjp(_gated, nondiff_argnums=(2,))


def _gated_forward(gate_BTF, up_BTF, activation):
    return _gated(gate_BTF, up_BTF, activation), (gate_BTF, up_BTF)


def _gated_backward(activation, inputs, dhidden_BTF):
    *inputs, dhidden_BTF = jax.lax.optimization_barrier((*inputs, dhidden_BTF))
    return jax.vjp(lambda g, u: _gated(g, u, activation), *inputs)[1](dhidden_BTF)


_gated_apart.defvjp(_gated_forward, _gated_backward)
