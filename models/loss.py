"""Cross-entropy that never holds full logits, with its gradient computed in the same pass.

The head and the loss are one function of hidden states: for a chunk of tokens it makes the logits,
their log-sum-exp and, when a gradient is wanted, d(loss)/d(logits), multiplies that back into the
hidden states and the head at once, and drops the chunk. No head matmul is ever recomputed, and
temporary memory is one chunk of logits instead of all. The vocabulary may be sharded over
`tensor`, tokens over `data`, `fsdp` and `seq`, the head's rows over `fsdp`: everything inside is
local arrays and explicit collectives.

Letters: B batch, T time, D width, V vocabulary, C tokens of one chunk.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig
from sharding.rules import BATCH, SEQ

X_BTD = P(BATCH, SEQ, None)
TOKENS = (*BATCH, SEQ)  # mesh axes that tokens are sharded over
VOCAB = "tensor"
CHUNK_BYTES = 32 * 2**20  # automatic chunks hold at least about this much of float32 logits


@dataclass(frozen=True)
class LossOptions:
    """Static choices of the loss. `vocab` is the true size; padded columns get probability 0."""

    vocab: int
    dtype: str
    softcap: float = 0.0
    z_loss: float = 0.0  # weight of the squared log-sum-exp (PaLM, arXiv:2204.02311, section 5)
    chunks: int = 0
    reduce_dtype: str = "float32"  # in which the head's gradient is summed over tokens and devices

    @classmethod
    def of(cls, config: ModelConfig, z_loss: float = 0.0) -> "LossOptions":
        return cls(
            config.vocab, config.dtype, config.final_softcap, z_loss, config.loss_chunks,
            config.reduce_dtype,
        )  # fmt: skip


def loss_weights(targets_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Returns float32 weights: 0 on padding (segment 0) and negative targets, 1 elsewhere."""
    return ((segment_ids_BT > 0) & (targets_BT >= 0)).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    options: LossOptions,
) -> tuple[jax.Array, jax.Array]:
    """Returns (objective, nll): weighted sums over all tokens, in nats, float32 scalars.

    The objective is nll plus the z-loss and is what gradients flow from; nll carries none.

    Args:
      x_BTD: hidden states after the final norm.
      head_VD: output projection, float32, rows over `tensor`, columns over `fsdp` or whole.
      targets_BT: int32 token ids; what they are does not matter where the weight is 0.
      weights_BT: float32 weight of each token; padding has 0.
    """
    objective, nll, _, _ = _sharded(x_BTD, head_VD, targets_BT, weights_BT, options, False)
    return objective, nll


def _forward(x_BTD, head_VD, targets_BT, weights_BT, options):
    objective, nll, dx_BTD, dhead_VD = _sharded(
        x_BTD, head_VD, targets_BT, weights_BT, options, True
    )
    return (objective, nll), (dx_BTD, dhead_VD)


def _backward(options, gradients, cotangents):
    dx_BTD, dhead_VD = gradients
    scale, _ = cotangents  # float32; rounded to bfloat16 it would scale the whole body's gradient
    dx_BTD = (scale * dx_BTD.astype(jnp.float32)).astype(dx_BTD.dtype)
    return dx_BTD, scale * dhead_VD, None, None


cross_entropy.defvjp(_forward, _backward)


def _sharded(x_BTD, head_VD, targets_BT, weights_BT, options, with_gradient):
    """Runs `_local` on every device's tokens and vocabulary rows."""
    head_spec = P(*jax.typeof(head_VD).sharding.spec)
    sizes = jax.sharding.get_abstract_mesh().shape
    gathered = "fsdp" in head_spec and sizes["fsdp"] > 1
    rows = P(BATCH, SEQ)
    gradients = (X_BTD, head_spec) if with_gradient else (None, None)
    return jax.shard_map(
        functools.partial(_local, options=options, gathered=gathered, with_gradient=with_gradient),
        in_specs=(X_BTD, head_spec, rows, rows),
        out_specs=(P(), P(), *gradients),
        check_vma=False,
    )(x_BTD, head_VD, targets_BT, weights_BT)


def _local(x_BTD, head_VD, targets_BT, weights_BT, *, options, gathered, with_gradient):
    dtype = jnp.dtype(options.dtype)
    B, T, D = x_BTD.shape
    head = head_VD.astype(dtype)
    if gathered:
        head = jax.lax.all_gather(head, "fsdp", axis=1, tiled=True)
    V = head.shape[0]
    chunks = options.chunks or _automatic_chunks(B * T, V, D)
    C = -(-B * T // chunks)
    padded = chunks * C - B * T

    def by_chunk(a):  # (B, T, ...) → (chunks, C, ...), zero weight where padded
        flat = a.reshape(B * T, *a.shape[2:])
        return jnp.pad(flat, ((0, padded), *[(0, 0)] * (flat.ndim - 1))).reshape(
            chunks, C, *flat.shape[1:]
        )

    xs = (by_chunk(x_BTD), by_chunk(targets_BT), by_chunk(weights_BT.astype(jnp.float32)))
    one = functools.partial(_chunk, head_VD=head, options=options, with_gradient=with_gradient)
    zero = jnp.zeros((), jnp.float32)
    if chunks == 1:
        objective, nll, dx_CD, dhead = one(*(a[0] for a in xs))
        dx = dx_CD
    else:

        def body(carry, chunk):
            objective, nll, dhead = carry
            o, n, dx_CD, d = one(*chunk)
            dhead = dhead + d if with_gradient else None
            return (objective + o, nll + n, dhead), dx_CD

        start = jnp.zeros((V, D), jnp.float32) if with_gradient else None
        (objective, nll, dhead), dx = jax.lax.scan(body, (zero, zero, start), xs)
    objective, nll = jax.lax.psum((objective, nll), TOKENS)
    if not with_gradient:
        return objective, nll, None, None
    dx = _sum(dx, (VOCAB,)).reshape(-1, D)[: B * T].reshape(B, T, D)
    dhead = dhead.astype(options.reduce_dtype)
    if gathered:
        dhead = jax.lax.psum_scatter(dhead, "fsdp", scatter_dimension=1, tiled=True)
        dhead = _sum(dhead, tuple(a for a in TOKENS if a != "fsdp"))
    else:
        dhead = _sum(dhead, TOKENS)
    return objective, nll, dx.astype(x_BTD.dtype), dhead.astype(head_VD.dtype)


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """psum over the axes that have more than one device; XLA:CPU copies for the others too."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in axes if sizes[axis] > 1)
    return jax.lax.psum(x, axes) if axes else x


def _automatic_chunks(tokens: int, vocab: int, width: int) -> int:
    """Fewest chunks whose float32 logits stay near CHUNK_BYTES, or half of the head's gradient.

    Between chunks that gradient is carried in float32, read and written once a chunk: chunks much
    smaller than it save nothing and cost more memory traffic than arithmetic.
    """
    return max(1, min(tokens, round(tokens * vocab * 4 / max(CHUNK_BYTES, 2 * vocab * width))))


def _chunk(x_CD, target_C, weight_C, *, head_VD, options, with_gradient):
    """Loss sums of C tokens, and the gradients of the objective by x_CD and head_VD."""
    V = head_VD.shape[0]
    raw_CV = jnp.einsum("CD,VD->CV", x_CD, head_VD, preferred_element_type=jnp.float32)
    logits_CV = raw_CV
    if options.softcap:
        logits_CV = options.softcap * jnp.tanh(raw_CV / options.softcap)
    first = jax.lax.axis_index(VOCAB) * V
    column_V = first + jnp.arange(V)
    logits_CV = jnp.where(column_V < options.vocab, logits_CV, -jnp.inf)
    # Every device has at least one true column, or its maximum is -inf and harmless under pmax.
    top_C = jax.lax.pmax(jnp.max(logits_CV, axis=-1), VOCAB)
    lse_C = top_C + jnp.log(
        jax.lax.psum(jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1), VOCAB)
    )
    index_C = target_C - first
    mine_C = (index_C >= 0) & (index_C < V)
    picked_C = jnp.take_along_axis(logits_CV, jnp.clip(index_C, 0, V - 1)[:, None], axis=1)[:, 0]
    target_logit_C = jax.lax.psum(jnp.where(mine_C, picked_C, 0.0), VOCAB)
    nll = jnp.sum(weight_C * (lse_C - target_logit_C))
    objective = nll + options.z_loss * jnp.sum(weight_C * jnp.square(lse_C))
    if not with_gradient:
        return objective, nll, None, None

    slope_C = weight_C * (1.0 + 2.0 * options.z_loss * lse_C)
    dlogits_CV = jnp.exp(logits_CV - lse_C[:, None]) * slope_C[:, None]
    hit_CV = index_C[:, None] == jnp.arange(V)
    dlogits_CV = dlogits_CV - jnp.where(hit_CV, weight_C[:, None], 0.0)
    if options.softcap:
        dlogits_CV = dlogits_CV * (1.0 - jnp.square(jnp.tanh(raw_CV / options.softcap)))
    dlogits_CV = dlogits_CV.astype(head_VD.dtype)
    dx_CD = jnp.einsum("CV,VD->CD", dlogits_CV, head_VD)
    dhead_VD = jnp.einsum(
        "CV,CD->VD", dlogits_CV, x_CD, preferred_element_type=options.reduce_dtype
    )
    return objective, nll, dx_CD, dhead_VD
