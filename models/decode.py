"""Generating text: a KV cache, prefill and one-token steps inside one jitted loop, sampling.

A batch may hold prompts of different lengths. A column of segment 0 is a hole: it takes a slot of
the cache that nobody sees and no position, so prompts are padded on the left and all rows write
the same slot. What a row draws depends on its own seed and on nothing else in the batch.

Decoding needs a mesh whose `seq` axis is 1; the cache is sharded over batch and KV heads.
Letters: B batch, T new columns, S cache slots, V vocabulary, M generated tokens, K, H as elsewhere.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from models import linear
from models.config import ModelConfig
from models.decoder import forward, logits, param_specs
from models.spec import Tree
from sharding.errors import UsageError
from sharding.rules import BATCH, SEQ, spec_for

ROWS = P(BATCH)
COLUMNS = P(BATCH, SEQ)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; static, so each value compiles its own program.

    Logits are divided by `temperature` (0 takes the largest), then cut to the `top_k` largest
    (0 = all; equal ones stay together), then to the fewest that hold `top_p` of what is left
    (arXiv:1904.09751). A row ends at any token of `stop`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()

    def validate(self) -> None:
        """Raises UsageError for values outside their range."""
        if not self.temperature >= 0:
            raise UsageError(f"temperature = {self.temperature}: at least 0 (0 is greedy)")
        if self.top_k < 0:
            raise UsageError(f"top-k = {self.top_k}: at least 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p = {self.top_p}: above 0 and at most 1 (1 keeps all tokens)")


# ---------------------------------------------------------------- cache


def init_cache(config: ModelConfig, batch: int, slots: int) -> Tree:
    """Returns an empty cache for `batch` rows of `slots` columns, sharded as the mesh context says.

    k and v are (layers, batch, slots, kv_heads, head_dim) in the compute dtype; segments_BS marks
    the slots in use, positions_BS their positions, and `offset` is the next slot of every row.

    Raises:
      UsageError: a mesh with `seq` above 1, or a batch or KV heads that do not divide over it.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    if sizes[SEQ] > 1:
        raise UsageError(f"decoding needs a mesh with {SEQ} = 1, this one has {sizes[SEQ]}")
    shape = (config.layers, batch, slots, config.kv_heads, config.head_dim)
    axes = ("layers", "batch", None, "kv_heads", "head_dim")
    heads = spec_for(axes, shape, sizes, "KV cache")

    def rows() -> jax.Array:
        return jnp.zeros((batch, slots), jnp.int32, out_sharding=P(BATCH, None))

    return {
        "k": jnp.zeros(shape, jnp.dtype(config.dtype), out_sharding=heads),
        "v": jnp.zeros(shape, jnp.dtype(config.dtype), out_sharding=heads),
        "positions_BS": rows(),
        "segments_BS": rows(),
        "offset": jnp.zeros((), jnp.int32),
    }


def extend(
    params: Tree, tokens_BT: jax.Array, real_BT: jax.Array, cache: Tree, config: ModelConfig
) -> tuple[jax.Array, Tree]:
    """Runs T further columns; returns their hidden states x_BTD and the cache that holds them.

    Args:
      params: as for `forward`, or what `resident` returns.
      tokens_BT: int32.
      real_BT: 1 for a token, 0 for a hole.
      cache: with at least T free slots, which is not checked.
    """
    real_BT = reshard(real_BT.astype(jnp.int32), P(BATCH, None))
    before_B1 = jnp.sum(cache["segments_BS"], axis=1, keepdims=True)
    positions_BT = jnp.maximum(before_B1 + jnp.cumsum(real_BT, axis=1) - 1, 0)

    def write(rows_BS: jax.Array, new_BT: jax.Array) -> jax.Array:
        whole_BT = reshard(new_BT, P(BATCH, None))
        return jax.lax.dynamic_update_slice_in_dim(rows_BS, whole_BT, cache["offset"], axis=1)

    cache = cache | {
        "positions_BS": write(cache["positions_BS"], positions_BT),
        "segments_BS": write(cache["segments_BS"], real_BT),
    }
    columns = (reshard(a_BT, COLUMNS) for a_BT in (tokens_BT, positions_BT, real_BT))
    x_BTD, cache = forward(params, *columns, config, cache)
    return x_BTD, cache | {"offset": cache["offset"] + tokens_BT.shape[1]}


def resident(params: Tree, config: ModelConfig) -> Tree:
    """Returns the weights as every step uses them: compute dtype, whole on each fsdp shard.

    Done once before a loop, it saves a cast and an all-gather of the whole model per token.
    """
    return linear.resident(params, param_specs(config), config)


# ---------------------------------------------------------------- sampling


def filtered(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns logits over temperature, with -inf where top-k or top-p rule a token out."""
    logits_BV = logits_BV / sampling.temperature
    V = logits_BV.shape[-1]
    if 0 < sampling.top_k < V:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < sampling.top_p  # those before hold too little
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def sample(
    logits_BV: jax.Array, seeds_B: jax.Array, step: jax.Array, sampling: Sampling
) -> jax.Array:
    """Returns one token for each row, a function of its logits, its seed and the step."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def local(logits_BV, seeds_B, step):
        def draw(logits_V, seed):
            key = jax.random.fold_in(jax.random.key(seed), step)
            return jax.random.categorical(key, logits_V)

        return jax.vmap(draw)(filtered(logits_BV, sampling), seeds_B).astype(jnp.int32)

    return jax.shard_map(
        local, in_specs=(P(BATCH, None), ROWS, P()), out_specs=ROWS, check_vma=False
    )(reshard(logits_BV, P(BATCH, None)), reshard(seeds_B, ROWS), jnp.asarray(step))


# ---------------------------------------------------------------- the loop

Generate = Callable[[Tree, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_generate(config: ModelConfig, max_tokens: int, sampling: Sampling) -> Generate:
    """Returns generate(params, tokens_BT, real_BT, seeds_B) → (tokens_BM, lengths_B), to be jitted.

    The prompts come from `pad_prompts`. Row b continues for `lengths_B[b]` tokens, its stop token
    not counted; what follows in tokens_BM is 0. The loop ends when every row has stopped.

    Raises:
      UsageError: from here, bad sampling values; when traced, prompts and `max_tokens` that
        together exceed the model's `max_length`, or a mesh that decoding cannot use.
    """
    sampling.validate()
    if max_tokens < 1:
        raise UsageError(f"max-tokens = {max_tokens}: at least 1")
    config = dataclasses.replace(config, remat="none")  # there is no backward pass

    def generate(params: Tree, tokens_BT: jax.Array, real_BT: jax.Array, seeds_B: jax.Array):
        batch, length = tokens_BT.shape
        check_length(config, length, max_tokens)
        params = resident(params, config)
        cache = init_cache(config, batch, length + max_tokens - 1)

        def choose(x_BTD, step, alive_B):
            """Draws a token for each row; returns it and the rows that go on."""
            last_BV = logits(params, x_BTD[:, -1:], config)[:, 0]
            token_B = reshard(sample(last_BV, seeds_B, step, sampling), ROWS)
            for stop in sampling.stop:
                alive_B &= token_B != stop
            return token_B, alive_B

        def record(tokens_BM, lengths_B, token_B, alive_B, step):
            column_B1 = jnp.where(alive_B, token_B, 0)[:, None]
            tokens_BM = jax.lax.dynamic_update_slice_in_dim(tokens_BM, column_B1, step, axis=1)
            return tokens_BM, lengths_B + alive_B

        def unfinished(carry):
            step, _, alive_B, _, _, _ = carry
            return (step < max_tokens) & jnp.any(alive_B)

        def body(carry):
            step, token_B, alive_B, tokens_BM, lengths_B, cache = carry
            token_B1 = token_B[:, None]
            x_BTD, cache = extend(params, token_B1, jnp.ones_like(token_B1), cache, config)
            token_B, alive_B = choose(x_BTD, step, alive_B)
            written = record(tokens_BM, lengths_B, token_B, alive_B, step)
            return step + 1, token_B, alive_B, *written, cache

        first = jnp.zeros((), jnp.int32)
        x_BTD, cache = extend(params, tokens_BT, real_BT, cache, config)
        all_B = jnp.ones(batch, bool, out_sharding=ROWS)
        token_B, alive_B = choose(x_BTD, first, all_B)
        tokens_BM = jnp.zeros((batch, max_tokens), jnp.int32, out_sharding=P(BATCH, None))
        lengths_B = jnp.zeros(batch, jnp.int32, out_sharding=ROWS)
        written = record(tokens_BM, lengths_B, token_B, alive_B, first)
        start = (first + 1, token_B, alive_B, *written, cache)
        _, _, _, tokens_BM, lengths_B, _ = jax.lax.while_loop(unfinished, body, start)
        return reshard(tokens_BM, P()), reshard(lengths_B, P())

    return generate


def check_length(config: ModelConfig, prompt: int, max_tokens: int) -> None:
    """Raises UsageError when prompt and new tokens do not fit in the model's `max_length`."""
    if prompt + max_tokens > config.max_length:
        raise UsageError(
            f"a prompt of {prompt} tokens and {max_tokens} new ones exceed the model's longest "
            f"sequence, {config.max_length}"
        )


def pad_prompts(
    prompts: Sequence[Sequence[int]], multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 (tokens_BT, real_BT), prompts padded on the left to the longest.

    The batch is filled up to a multiple of `multiple` (rows the mesh needs) with copies of the
    last prompt, whose results are to be dropped.

    Raises:
      UsageError: no prompt, or one without tokens.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UsageError("a prompt has no tokens: there is nothing to continue")
    rows = [*prompts, *[prompts[-1]] * (-len(prompts) % multiple)]
    length = max(len(row) for row in rows)
    tokens_BT, real_BT = np.zeros((2, len(rows), length), np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, length - len(row) :] = row
        real_BT[b, length - len(row) :] = 1
    return tokens_BT, real_BT
