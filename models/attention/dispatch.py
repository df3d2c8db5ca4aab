"""`attention`: the one entry point, its contract, and the table of backends behind it.

A backend says in words what it cannot do; `auto` takes the first in the table that can do the call,
a backend asked for by name refuses with the names of those that can, and nothing ever drops a part
of the mask. Everything here is local to one device (call it inside `jax.shard_map`).

Shapes: B batch, T queries, S keys, N query heads, K kv heads (query head n reads kv head
n // (N // K)), H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from models.attention.blockwise import blockwise_attention
from models.attention.mask import EMPTY_LSE, Mask
from models.attention.reference import reference_attention
from sharding.errors import UsageError, nearest


@dataclass(frozen=True)
class Problem:
    """What is known about a call before it is traced: all that a backend may decide on."""

    mask: Mask
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    softcap: float | None
    rows_aligned: bool


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    run: takes the seven arrays of `attention` by position, then mask, scale, softcap, rows_aligned
        and given by name; returns (out_BTNH, lse_BTN).
    refusal: returns why it cannot do a problem, or None when it can.
    fewest_queries: `auto` passes it over for calls with fewer, where another is faster.
    """

    name: str
    run: Callable[..., tuple[jax.Array, jax.Array]]
    refusal: Callable[[Problem], str | None] = lambda problem: None
    fewest_queries: int = 1


BACKENDS: tuple[Backend, ...] = (
    Backend("blockwise", blockwise_attention, fewest_queries=32),
    Backend("reference", reference_attention),
)
"""In the order in which `auto` tries them."""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    scale: float,
    softcap: float | None = None,
    backend: str = "auto",
    rows_aligned: bool = False,
    given: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BTNH in q's dtype, lse_BTN float32), both differentiable.

    Scores are `softcap(scale * q.k)` in float32 and lse is their natural log-sum-exp per row, so
    that results over parts of the keys can be merged. A row that sees no key gives out 0,
    lse `EMPTY_LSE` and no gradient. Padding (segment 0) may hold anything, NaN included: it reaches
    neither the results nor the gradients of other rows.

    rows_aligned: query row i and key row i are the same token, and positions count up by one along
        each segment's rows (training on packed rows). Tiles that the mask rules out are then
        skipped. Leave False for a KV cache or for queries that are a part of a longer sequence.

    given: (out, lse) of these queries over all the keys that they see, of which these are a part.
        The call is then for its gradients only, and they are what these keys add to the whole: no
        forward pass is repeated, and dq of the whole is the sum over its parts.

    Under rematerialisation, save the names `attention_out` and `attention_lse`.

    Raises ValueError for shapes that do not fit together, and UsageError for an unknown backend or
    one that cannot do this call.
    """
    _check_shapes(q_BTNH, k_BSKH, v_BSKH, rows_aligned)
    problem = Problem(
        mask=mask,
        queries=q_BTNH.shape[1],
        keys=k_BSKH.shape[1],
        heads=q_BTNH.shape[2],
        kv_heads=k_BSKH.shape[2],
        head_dim=q_BTNH.shape[3],
        dtype=q_BTNH.dtype,
        softcap=softcap,
        rows_aligned=rows_aligned,
    )
    # Zeroed rather than masked: a probability of 0 times NaN is NaN.
    q_real_BT11 = (q_segments_BT > 0)[:, :, None, None]
    k_real_BS11 = (k_segments_BS > 0)[:, :, None, None]
    out_BTNH, lse_BTN = _choose(problem, backend).run(
        jnp.where(q_real_BT11, q_BTNH, 0),
        jnp.where(k_real_BS11, k_BSKH, 0),
        jnp.where(k_real_BS11, v_BSKH, 0),
        q_positions_BT,
        k_positions_BS,
        q_segments_BT,
        k_segments_BS,
        mask=mask,
        scale=scale,
        softcap=softcap,
        rows_aligned=rows_aligned,
        given=given,
    )
    # No change to the values; it stops cotangents of padded rows before they meet the scores.
    out_BTNH = jnp.where(q_real_BT11, out_BTNH, 0)
    return out_BTNH, jnp.where(q_real_BT11[..., 0], lse_BTN, EMPTY_LSE)


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
        suited = [b for b in able if problem.queries >= b.fewest_queries]
        return (suited or able)[0]
    for backend in able:
        if backend.name == name:
            return backend
    reason = next(b for b in BACKENDS if b.name == name).refusal(problem)
    raise UsageError(
        f"attention backend `{name}` cannot do this call: {reason}; "
        f"backends that can: {', '.join(b.name for b in able)}"
    )


def _check_shapes(q_BTNH, k_BSKH, v_BSKH, rows_aligned: bool) -> None:
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != (B, S, K, H):
        raise ValueError(
            f"attention: q {q_BTNH.shape}, k {k_BSKH.shape} and v {v_BSKH.shape} must agree in "
            "batch and head dim, and k and v in all dimensions"
        )
    if N % K:
        raise ValueError(f"attention: {N} query heads cannot share {K} kv heads evenly")
    if rows_aligned and T != S:
        raise ValueError(
            f"attention: rows_aligned says that query and key rows are the same tokens, but there "
            f"are {T} queries and {S} keys"
        )
