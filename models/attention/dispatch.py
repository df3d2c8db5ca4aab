"""`attention`: the one entry point, its contract, and the table of backends behind it.

A backend says in words what it cannot do; `auto` takes the first in the table that can do the call,
a backend asked for by name refuses with the names of those that can, and nothing ever drops a part
of the mask. Everything here is local to one device (call it inside `jax.shard_map`).

Shapes: B batch, T queries, S keys, N query heads, K kv heads (query head n reads kv head
n // (N // K)), H head dim of queries and keys, V head dim of values.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from models.attention.blockwise import blockwise_attention
from models.attention.cudnn import cudnn_attention
from models.attention.cudnn import refusal as cudnn_refusal
from models.attention.gpu import refusal as triton_refusal
from models.attention.gpu import triton_attention
from models.attention.mask import EMPTY_LSE, Mask, Reach, reach
from models.attention.problem import Extras, Problem
from models.attention.reference import reference_attention
from models.attention.tpu import refusal as tpu_refusal
from models.attention.tpu import tpu_attention
from sharding.errors import UsageError, nearest
from sharding.hardware import chip_for
from sharding.mesh import target_device

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    run: takes q, k, v, the mask's `Reach`, `Extras`, the `Problem` and `given`; returns
        (out_BTNV, lse_BTN), None for lse only where the problem needs none.
    refusal: returns why it cannot do a problem, or None when it can.
    fewest_queries: `auto` passes it over for calls with fewer, where another is faster.
    platform: `auto` takes it only there ("tpu" or "cuda"), None for everywhere.
    skips_padding: it reads no padding, so that arrays need not be copied without it.
    by_name: `auto` leaves it out, because it has not run on its hardware yet.
    """

    name: str
    run: Callable[..., tuple[jax.Array, jax.Array | None]]
    refusal: Callable[[Problem], str | None] = lambda problem: None
    fewest_queries: int = 1
    platform: str | None = None
    skips_padding: bool = False
    by_name: bool = False


BACKENDS: tuple[Backend, ...] = (
    Backend("pallas", tpu_attention, tpu_refusal, 32, "tpu", skips_padding=True),
    Backend("cudnn", cudnn_attention, cudnn_refusal, 32, "cuda"),
    Backend("triton", triton_attention, triton_refusal, 32, "cuda", by_name=True),
    Backend("blockwise", blockwise_attention, fewest_queries=32, skips_padding=True),
    Backend("reference", reference_attention),
)
"""In the order in which `auto` tries them."""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    mask: Mask,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    scale: float,
    softcap: float | None = None,
    prefix_BS: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    alibi_slopes_N: jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    logit_bound: float | None = None,
    backend: str = "auto",
    rows_aligned: bool = False,
    one_document: bool = False,
    needs_lse: bool = True,
    given: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns (out_BTNV in q's dtype, lse_BTN float32), both differentiable.

    Scores are `softcap(scale * q.k)` in float32, plus what is added to them, and lse is their
    natural log-sum-exp per row, so that results over parts of the keys can be merged. A row that
    sees no key gives out 0, lse `EMPTY_LSE` and no gradient. Padding (segment 0) may hold anything,
    NaN included: it reaches neither the results nor the gradients of other rows. Nor does a NaN in
    one document reach another, except with `reference`; in its own it stays to be seen.

    prefix_BS: bool, keys that every query of their segment sees, whatever else the mask says
        (a prefix language model's prompt).
    sinks_N: one more score per head that takes its share of the softmax and gives nothing
        (gpt-oss); lse includes it, so use it for one part only of keys that are merged later.
    alibi_slopes_N: subtracts slope times distance in positions (arXiv 2108.12409). Not trained: no
        gradient reaches the slopes.
    bias_BNTS: added to the scores after the soft-cap; batch and heads may be 1. Differentiable.
    logit_bound: a promise that scores stay within plus and minus this, as after QK norm. Kernels
        may then leave out the running maximum; a promise too large to be of use is ignored.
    rows_aligned: query row i and key row i are the same token, and the tokens of a segment are
        neighbours whose positions count up by one (training on packed rows). Tiles that the mask
        rules out are then skipped. Leave False for a KV cache or for queries that are a part of a
        longer sequence.
    one_document: a promise that every row holds one segment, from its first token on, and nothing
        but padding after it. Backends without segment ids then need no mask.
    needs_lse: False lets a backend return None in the place of lse. Ask for lse only to use it:
        cuDNN, the fast one on NVIDIA GPUs, has no gradient through it.
    given: (out, lse) of these queries over all the keys that they see, of which these are a part.
        The call is then for its gradients only, and they are what these keys add to the whole: no
        forward pass is repeated, and dq of the whole is the sum over its parts. Without sinks:
        they are applied to the whole.

    Under rematerialisation, save the names `attention_out` and `attention_lse`.

    Raises ValueError for shapes that do not fit together, and UsageError for an unknown backend or
    one that cannot do this call.
    """
    _check_shapes(q_BTNH, k_BSKH, v_BSKV, bias_BNTS, rows_aligned)
    if given is not None and sinks_N is not None:
        raise ValueError("attention: sinks belong to the whole, so not to a part with `given`")
    B, T, N, H = q_BTNH.shape
    S, K, V = v_BSKV.shape[1:]
    platform, chip = target()
    problem = Problem(
        mask=mask,
        batch=B,
        queries=T,
        keys=S,
        heads=N,
        kv_heads=K,
        head_dim=H,
        value_dim=V,
        dtype=q_BTNH.dtype,
        scale=scale,
        softcap=softcap,
        rows_aligned=rows_aligned and prefix_BS is None,
        logit_bound=logit_bound,
        alibi=alibi_slopes_N is not None,
        bias=bias_BNTS is not None,
        one_document=one_document,
        needs_lse=needs_lse or given is not None or sinks_N is not None,
        platform=platform,
        chip=chip,
    )
    chosen = _choose(problem, backend)
    _log_once(chosen.name, problem)
    extras = Extras(bias_BNTS)
    if alibi_slopes_N is not None:
        slopes_N = jax.lax.stop_gradient(alibi_slopes_N)
        extras = Extras(bias_BNTS, slopes_N, q_positions_BT, k_positions_BS)
    tokens = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, prefix_BS)
    run = chosen.run if chosen.skips_padding else functools.partial(_without_padding, chosen.run)
    out_BTNV, lse_BTN = run(q_BTNH, k_BSKH, v_BSKV, reach(mask, *tokens), extras, problem, given)
    return (out_BTNV, lse_BTN) if sinks_N is None else _with_sinks(out_BTNV, lse_BTN, sinks_N)


def merge(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BTNV, lse_BTN), float32, over the keys of both of two results. Associative."""
    (out_BTNV, lse_BTN), (other_out_BTNV, other_lse_BTN) = one, other
    total_BTN = jnp.logaddexp(lse_BTN, other_lse_BTN)
    share_BTN, other_share_BTN = (jnp.exp(x - total_BTN) for x in (lse_BTN, other_lse_BTN))
    return share_BTN[..., None] * out_BTNV + other_share_BTN[..., None] * other_out_BTNV, total_BTN


def _without_padding(run, q_BTNH, k_BSKH, v_BSKV, reach: Reach, *others):
    """Runs a backend on zeros in the place of padding: a probability of 0 times NaN is NaN."""
    q_real_BT11 = (reach.q_segments_BT > 0)[:, :, None, None]
    k_real_BS11 = (reach.k_segments_BS > 0)[:, :, None, None]
    arrays = (jnp.where(k_real_BS11, x, 0) for x in (k_BSKH, v_BSKV))
    out_BTNV, lse_BTN = run(jnp.where(q_real_BT11, q_BTNH, 0), *arrays, reach, *others)
    # No change to the values; it stops cotangents of padded rows before they meet the scores.
    out_BTNV = jnp.where(q_real_BT11, out_BTNV, 0)
    if lse_BTN is None:
        return out_BTNV, None
    return out_BTNV, jnp.where(q_real_BT11[..., 0], lse_BTN, EMPTY_LSE)


def _with_sinks(out_BTNV, lse_BTN, sinks_N) -> tuple[jax.Array, jax.Array]:
    """Gives the sinks their share; the gradient follows through lse."""
    sinks_BTN = jnp.broadcast_to(sinks_N.astype(jnp.float32), lse_BTN.shape)
    total_BTN = jnp.where(lse_BTN == EMPTY_LSE, EMPTY_LSE, jnp.logaddexp(lse_BTN, sinks_BTN))
    share_BTN = jnp.exp(lse_BTN - total_BTN)
    return (out_BTNV * share_BTN[..., None]).astype(out_BTNV.dtype), total_BTN


def target() -> tuple[str | None, str | None]:
    """Returns platform and chip (as in `Problem`) of the mesh's devices, which may be absent."""
    device = target_device()
    if device.platform in ("cuda", "gpu") and device.device_kind.startswith("NVIDIA"):
        return "cuda", None  # JAX calls AMD's "gpu" too
    chip = chip_for(device) if device.platform == "tpu" else None
    return ("tpu", chip.name) if chip is not None else (None, None)


@functools.cache
def _log_once(name: str, problem: Problem) -> None:
    """Logs which backend runs a problem, the first time that it does."""
    reasons = [
        f"{b.name}: {b.refusal(problem)}" for b in BACKENDS if b.refusal(problem) is not None
    ]
    _LOG.info(
        "attention by %s: %d queries, %d keys, %d/%d heads of %d, %s%s", name, problem.queries,
        problem.keys, problem.heads, problem.kv_heads, problem.head_dim, problem.mask,
        f" ({'; '.join(reasons)})" if reasons else "",
    )  # fmt: skip


def _choose(problem: Problem, name: str) -> Backend:
    """Returns the backend called `name`, or for `auto` the first that suits; raises UsageError."""
    names = [backend.name for backend in BACKENDS]
    if name not in ("auto", *names):
        raise UsageError(
            f"no attention backend `{name}`; choose from auto, {', '.join(names)}"
            f"{nearest(name, ['auto', *names])}"
        )
    able = [backend for backend in BACKENDS if backend.refusal(problem) is None]
    if not able:
        reasons = "; ".join(f"{b.name}: {b.refusal(problem)}" for b in BACKENDS)
        raise UsageError(f"no attention backend can do this call: {reasons}")
    if name == "auto":
        here = [b for b in able if b.platform in (None, problem.platform) and not b.by_name] or able
        return next((b for b in here if problem.queries >= b.fewest_queries), here[0])
    for backend in able:
        if backend.name == name:
            return backend
    reason = next(b for b in BACKENDS if b.name == name).refusal(problem)
    raise UsageError(
        f"attention backend `{name}` cannot do this call: {reason}; "
        f"backends that can: {', '.join(b.name for b in able)}"
    )


def _check_shapes(q_BTNH, k_BSKH, v_BSKV, bias_BNTS, rows_aligned: bool) -> None:
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKV.shape[:3] != (B, S, K):
        raise ValueError(
            f"attention: q {q_BTNH.shape}, k {k_BSKH.shape} and v {v_BSKV.shape} must agree in "
            "batch, q and k in head dim, and k and v in all others"
        )
    if N % K:
        raise ValueError(f"attention: {N} query heads cannot share {K} kv heads evenly")
    if rows_aligned and T != S:
        raise ValueError(
            f"attention: rows_aligned says that query and key rows are the same tokens, but there "
            f"are {T} queries and {S} keys"
        )
    if bias_BNTS is not None and (
        bias_BNTS.shape[2:] != (T, S)
        or any(size not in (1, full) for size, full in zip(bias_BNTS.shape, (B, N), strict=False))
    ):
        raise ValueError(
            f"attention: a bias of shape {bias_BNTS.shape} does not fit scores of {(B, N, T, S)}; "
            "only batch and heads may be 1"
        )
