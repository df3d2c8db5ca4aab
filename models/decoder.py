"""The decoder: embedding, a scanned stack of layers, a final norm. One function for all families.

`param_specs(config)` is the table of its parameters; `forward` is pure and needs a mesh context
(`jax.set_mesh`, or `use_abstract_mesh` for devices that are not there). The head is not applied
here: `models/loss.py` consumes hidden states chunk by chunk, `logits` serves decoding and tests.

Letters as in models/layers.py, and L layers, V vocabulary.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from models import layers
from models.attention.dispatch import attention
from models.attention.mask import Mask
from models.attention.sequence import Rows, plan_for, sequence_attention
from models.config import ModelConfig
from models.linear import Weight, add_bias, gathered, lookup, matmul
from models.spec import ParamSpec, Tree
from sharding.errors import UsageError
from sharding.rules import BATCH, SEQ, STREAM

X_BTD = P(BATCH, SEQ, None)  # the residual stream as blocks and loss see it

# What each remat name of the config means among the names given to values in the code.
REMAT_VALUES = {"attention": ("attention_out", "attention_lse")}


# ---------------------------------------------------------------- parameters


def param_specs(config: ModelConfig) -> Tree:
    """Returns the tree of ParamSpecs; everything under "layers" is stacked on a leading L axis."""
    V, D = config.padded_vocab, config.width
    table = ParamSpec((V, D), ("vocab", "embed"), 0.02, unpadded=(config.vocab, D))
    specs = {
        "embedding": table,
        "layers": jax.tree.map(
            lambda s: dataclasses.replace(
                s, shape=(config.layers, *s.shape), axes=("layers", *s.axes)
            ),
            _layer_specs(config),
            is_leaf=lambda s: isinstance(s, ParamSpec),
        ),
        "final_norm": layers.norm_spec(config),
    }
    if config.position == "learned":
        specs["positions"] = ParamSpec((config.max_length, D), ("positions", "embed"), 0.02)
    if not config.tie_embeddings:
        specs["head"] = dataclasses.replace(table, std=D**-0.5)
    return specs


def _layer_specs(config: ModelConfig) -> Tree:
    specs = {"attention": layers.attention_specs(config), "mlp": layers.mlp_specs(config)}
    if config.norm_placement in ("pre", "sandwich"):
        specs |= {"attention_norm": layers.norm_spec(config), "mlp_norm": layers.norm_spec(config)}
    if config.norm_placement in ("post", "sandwich"):
        specs |= {
            "attention_post_norm": layers.norm_spec(config),
            "mlp_post_norm": layers.norm_spec(config),
        }
    return specs


def head_VD(params: Tree) -> jax.Array:
    """Returns the output projection: its own, or the tied embedding table."""
    return params.get("head", params["embedding"])


# ---------------------------------------------------------------- one layer


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer needs of the batch: rotary tables by kind, positions and segments."""

    tables: Tree  # kind → {"cos", "sin"}, or None
    positions_BT: jax.Array
    segments_BT: jax.Array
    cache: Tree | None = None  # positions_BS, segments_BS, offset: see models/decode.py
    prefix_BT: jax.Array | None = None  # not 0 on tokens that all of their document may see


jax.tree_util.register_dataclass(
    Context,
    data_fields=["tables", "positions_BT", "segments_BT", "cache", "prefix_BT"],
    meta_fields=[],
)


def _attend(q_BTNH, k_BSKH, v_BSKH, context: Context, kind: str, config: ModelConfig):
    """Attention on each device's own batch rows, query positions and heads."""
    mask = Mask(causal=True, window=config.window if kind == "local" else None)
    plan = plan_for(config, q_BTNH.shape[1])
    if plan.devices > 1 and context.prefix_BT is not None:
        raise UsageError(
            f"attention with prefix keys needs rows on one device, mesh axis {SEQ} = {plan.devices}"
        )
    cache = context.cache
    tensor, kv_heads = jax.sharding.get_abstract_mesh().shape["tensor"], k_BSKH.shape[2]
    kv_axis = jax.typeof(k_BSKH).sharding.spec[2]  # None where KV heads are fewer than devices
    q_rows = Rows(context.positions_BT, context.segments_BT)
    k_rows = q_rows if cache is None else Rows(cache["positions_BS"], cache["segments_BS"])
    options = dict(
        scale=config.attention_scale or config.head_dim**-0.5,
        softcap=config.attention_softcap or None,
        backend=config.attention,
    )

    def local(q_BTNH, k_BSKH, v_BSKH, q_rows: Rows, k_rows: Rows, prefix_BS=None):
        if kv_axis is None and min(tensor, kv_heads) > 1:  # the one head that its queries read
            head = jax.lax.axis_index("tensor") * kv_heads // tensor
            k_BSKH, v_BSKH = (
                jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k_BSKH, v_BSKH)
            )
        if plan.devices > 1:
            return sequence_attention(q_BTNH, k_BSKH, v_BSKH, q_rows, mask, plan, **options)
        out_BTNH, _ = attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask,
            q_positions_BT=q_rows.positions_BT,
            k_positions_BS=k_rows.positions_BT,
            q_segments_BT=q_rows.segments_BT,
            k_segments_BS=k_rows.segments_BT,
            prefix_BS=None if prefix_BS is None else prefix_BS > 0,
            rows_aligned=cache is None,
            needs_lse=False,
            **options,
        )
        return out_BTNH

    q_spec = P(BATCH, SEQ, "tensor", None)
    kv_spec = P(BATCH, SEQ, kv_axis, None)
    rows = P(BATCH, SEQ)
    k_BSKH, v_BSKH = reshard(k_BSKH, kv_spec), reshard(v_BSKH, kv_spec)
    k_rows = jax.tree.map(lambda x: reshard(x, rows), k_rows)
    prefix = () if context.prefix_BT is None else (context.prefix_BT,)
    return jax.shard_map(
        local,
        in_specs=(q_spec, kv_spec, kv_spec, rows, rows, *(rows for _ in prefix)),
        out_specs=q_spec,
        check_vma=False,  # custom gradients inside carry no varying-axes types
    )(q_BTNH, k_BSKH, v_BSKH, q_rows, k_rows, *prefix)


def _layer(
    x_BTD: jax.Array,
    params: Tree,
    context: Context,
    cache: Tree | None,
    layer: jax.Array | None,
    kind: str,
    config: ModelConfig,
) -> tuple[jax.Array, Tree | None]:
    """One layer; returns the residual stream and the cache with this layer's keys and values."""
    params = gathered(params, _layer_specs(config), config)
    before = config.norm_placement in ("pre", "sandwich")
    after = config.norm_placement in ("post", "sandwich")
    stream = jax.typeof(x_BTD).sharding.spec

    h_BTD = layers.norm(x_BTD, params["attention_norm"], config) if before else x_BTD
    tables = context.tables[kind] if context.tables is not None else None
    h_BTD = layers.apart(h_BTD, config)
    q_BTNH, k_BSKH, v_BSKH = layers.project_qkv(h_BTD, params["attention"], tables, config)
    if cache is not None:
        cache = {
            n: _write(cache[n], new_BTKH, layer, context.cache["offset"])
            for n, new_BTKH in (("k", k_BSKH), ("v", v_BSKH))
        }
        k_BSKH, v_BSKH = (jax.lax.dynamic_index_in_dim(cache[n], layer, 0, False) for n in "kv")
    out_BTNH = _attend(q_BTNH, k_BSKH, v_BSKH, context, kind, config)
    y_BTD = matmul(out_BTNH, params["attention"]["wo"], 2, stream)
    if config.out_bias:
        y_BTD = add_bias(y_BTD, params["attention"]["bo"])
    if after:
        y_BTD = layers.norm(y_BTD, params["attention_post_norm"], config)
    input_BTD, x_BTD = x_BTD, checkpoint_name(x_BTD + y_BTD, "residual")

    h_BTD = input_BTD if config.parallel_residual else x_BTD
    if before:
        h_BTD = layers.norm(h_BTD, params["mlp_norm"], config)
    y_BTD = layers.mlp(layers.apart(h_BTD, config), params["mlp"], config, stream)
    if after:
        y_BTD = layers.norm(y_BTD, params["mlp_post_norm"], config)
    return x_BTD + y_BTD, cache


def _write(cache_LBSKH: jax.Array, new_BTKH: jax.Array, layer: jax.Array, offset: jax.Array):
    """Returns the cache with the T slots from `offset` on of one layer replaced."""
    placed_BTKH = reshard(new_BTKH, P(*jax.typeof(cache_LBSKH).sharding.spec[1:]))
    return jax.lax.dynamic_update_slice(cache_LBSKH, placed_BTKH[None], (layer, 0, offset, 0, 0))


def _with_remat(layer, config: ModelConfig):
    """Wraps a layer so that its backward pass keeps only the named values of the config."""
    names = config.remat_names()
    if names is None:
        return layer
    kept, offloaded = ([v for n in ns for v in REMAT_VALUES.get(n, (n,))] for ns in names)
    if offloaded:
        policy = checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = checkpoint_policies.save_only_these_names(*kept)
    # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
    return jax.checkpoint(layer, policy=policy, prevent_cse=not config.scan_layers)


# ---------------------------------------------------------------- the stack


def _stack(x_BTD, params: Tree, context: Context, cache: Tree | None, config: ModelConfig):
    """Runs all layers: whole periods of the pattern in one scan, then what is left over.

    The cache is carried whole and written in place; scanned layer by layer it would be copied.
    """
    kinds, period = config.kinds, len(config.pattern)
    periods = config.layers // period if config.scan_layers else 0
    cut = periods * period if periods > 1 else 0

    def of_kind(kind: str):
        layer = _with_remat(functools.partial(_layer, kind=kind, config=config), config)
        return lambda carry, one, index: layer(carry[0], one, context, carry[1], index)

    def run(carry, params: Tree, first, kinds):
        """Runs layers from `first` on; neighbours of one kind are one loop: a shorter program."""
        start = 0
        for kind, alike in itertools.groupby(kinds):
            stop = start + len(list(alike))
            part = jax.tree.map(lambda w, a=start, b=stop: _slice(w, a, b), params)
            numbers = first + jnp.arange(start, stop)
            carry = _loop(of_kind(kind), carry, part, numbers, config.scan_layers)
            start = stop
        return carry

    carry = (x_BTD, cache)
    if cut:
        whole = jax.tree.map(lambda w: _periods(_slice(w, 0, cut), period), params)
        one_period = functools.partial(run, kinds=kinds[:period])
        carry = _loop(one_period, carry, whole, jnp.arange(0, cut, period), scan=True)
    if cut < config.layers:
        rest = jax.tree.map(lambda w: _slice(w, cut, config.layers), params)
        carry = run(carry, rest, cut, kinds[cut:])
    return carry


def _loop(body, carry, params: Tree, numbers_L: jax.Array, scan: bool):
    """Returns the carry after `body(carry, params[l], numbers[l])` for each l, scanned or not."""
    count = len(numbers_L)
    if scan and count > 1:
        return jax.lax.scan(lambda c, one: (body(c, *one), None), carry, (params, numbers_L))[0]
    for number, one in zip(numbers_L, _unstacked(params, count), strict=True):
        carry = body(carry, one, number)
    return carry


def _periods(w: jax.Array, period: int) -> jax.Array:
    """Splits the leading axis; the sharding is given because reshape forgets it on sizes of 1."""
    spec = P(None, *jax.typeof(w).sharding.spec)
    return w.reshape(-1, period, *w.shape[1:], out_sharding=spec)


def _unstacked(params: Tree, count: int) -> list[Tree]:
    """Returns the layers one by one; split, because its gradient is one concatenation.

    Indexing instead would pad and add the whole stack once per layer.
    """
    parts = jax.tree.map(
        lambda w: [jax.lax.squeeze(p, (0,)) for p in jax.lax.split(w, [1] * count)], params
    )
    return [
        jax.tree.map(lambda p, i=i: p[i], parts, is_leaf=lambda x: isinstance(x, list))
        for i in range(count)
    ]


def _slice(w: jax.Array, start: int, stop: int) -> jax.Array:
    return w if (start, stop) == (0, w.shape[0]) else w[start:stop]


def _embedded(params: Tree, tokens_BT: jax.Array, stream: P, config: ModelConfig) -> jax.Array:
    """Returns the table's rows of the tokens, sharded as `stream`.

    Where tokens are few they travel and not the table with its gradient: each device looks up its
    columns for all of fsdp, and one all-to-all puts the rows together. It goes twice, an eighth of
    the devices far on a torus; the table is gathered, and its gradient reduced at twice the cost.
    """
    table_VD, sizes = params["embedding"], jax.sharding.get_abstract_mesh().shape
    moved = 2 * tokens_BT.size / math.prod(sizes.values()) * max(1, sizes["fsdp"] / 8)
    if "fsdp" not in jax.typeof(table_VD).sharding.spec or moved >= 3 * table_VD.shape[0]:
        return lookup(_weight("embedding", params, config), tokens_BT, stream)
    tokens_BT = reshard(tokens_BT, P("data", jax.typeof(tokens_BT).sharding.spec[1]))
    x_BTD = table_VD.at[tokens_BT].get(out_sharding=P("data", stream[1], "fsdp"))
    return reshard(x_BTD.astype(config.dtype), stream)


def _weight(name: str, params: Tree, config: ModelConfig) -> Weight:
    """Returns one parameter outside of the layers as products use it."""
    return gathered(params[name], param_specs(config)[name], config)


def forward(
    params: Tree,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    config: ModelConfig,
    cache: Tree | None = None,
    prefix_BT: jax.Array | None = None,
) -> tuple[jax.Array, Tree | None]:
    """Returns hidden states x_BTD after the final norm, and the updated KV cache if one is given.

    Args:
      params: tree of `param_specs(config)`, float32, sharded as the mesh context says.
      tokens_BT, positions_BT, segments_BT: int32; segment 0 is padding. Documents of a row never
        attend to one another; positions restart at 0 in each.
      cache: see models/decode.py.
      prefix_BT: int32, not 0 on tokens that all of their document may see (a prefix language
        model's prompt).

    Raises:
      UsageError: `prefix_BT` with rows spread over `seq`.
    """
    dtype = jnp.dtype(config.dtype)
    sizes = jax.sharding.get_abstract_mesh().shape
    spread = tokens_BT.shape[1] % math.prod(sizes[axis] for axis in STREAM) == 0
    stream = P(BATCH, STREAM, None) if spread and sizes["tensor"] > 1 else X_BTD
    x_BTD = _embedded(params, tokens_BT, stream, config)
    if config.scale_embeddings:
        x_BTD = x_BTD * jnp.asarray(config.width**0.5, dtype)
    if config.position == "learned":
        x_BTD = x_BTD + lookup(_weight("positions", params, config), positions_BT, stream)
    tables = None
    if config.position == "rope":
        tables = {k: layers.rope_tables(positions_BT, config, k) for k in set(config.pattern)}
    shared = None
    if cache is not None:
        shared = {k: cache[k] for k in ("positions_BS", "segments_BS", "offset")}
    context = Context(tables, positions_BT, segments_BT, shared, prefix_BT)
    layer_cache = {"k": cache["k"], "v": cache["v"]} if cache is not None else None
    x_BTD, layer_cache = _stack(x_BTD, params["layers"], context, layer_cache, config)
    x_BTD = reshard(layers.norm(x_BTD, params["final_norm"], config), X_BTD)
    x_BTD = layers.apart(x_BTD, config)
    return x_BTD, ({**cache, **layer_cache} if cache is not None else None)


def logits(params: Tree, x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns float32 logits_BTV over the true vocabulary, soft-capped if the family does so."""
    name = "embedding" if config.tie_embeddings else "head"
    out_BTV = jnp.einsum(
        "BTD,VD->BTV",
        x_BTD,
        _weight(name, params, config).value,
        preferred_element_type=jnp.float32,
        out_sharding=P(BATCH, SEQ, "tensor"),
    )
    out_BTV = reshard(out_BTV, P(BATCH, SEQ, None))[..., : config.vocab]
    if config.final_softcap:
        out_BTV = config.final_softcap * jnp.tanh(out_BTV / config.final_softcap)
    return out_BTV
