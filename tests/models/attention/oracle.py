"""Attention in float64 NumPy, one query row at a time, with its gradient derived by hand.

Slow and plain on purpose: it shares no formula layout, no masking code and no library with the
implementations that it judges.
"""

from typing import NamedTuple

import numpy as np


class Tokens(NamedTuple):
    """Positions and segment ids, in the order in which the backends take them."""

    q_positions_BT: np.ndarray
    k_positions_BS: np.ndarray
    q_segments_BT: np.ndarray
    k_segments_BS: np.ndarray


class Answer(NamedTuple):
    """Results, and gradients for the given cotangents. lse is nan in rows that see no key."""

    out_BTNH: np.ndarray
    lse_BTN: np.ndarray
    dq_BTNH: np.ndarray
    dk_BSKH: np.ndarray
    dv_BSKH: np.ndarray


def visible(tokens: Tokens, b: int, t: int, causal: bool, window: int | None) -> np.ndarray:
    """Indices of the keys that query row t of batch row b may attend to."""
    segment, position = tokens.q_segments_BT[b, t], tokens.q_positions_BT[b, t]
    keys = []
    for s in range(tokens.k_segments_BS.shape[1]):
        oldest = position - window + 1 if window else 0
        if segment == 0 or tokens.k_segments_BS[b, s] != segment:
            continue
        if causal and not oldest <= tokens.k_positions_BS[b, s] <= position:
            continue
        keys.append(s)
    return np.array(keys, int)


def attend(q, k, v, dout, dlse, tokens, *, causal, window, scale, softcap) -> Answer:
    """Returns out, lse and the gradients of sum(out * dout) + sum(lse * dlse)."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    (B, T, N, _), K = q.shape, k.shape[2]
    out, lse = np.zeros_like(q), np.full((B, T, N), np.nan)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t in np.ndindex(B, T):
        keys = visible(tokens, b, t, causal, window)
        if keys.size == 0:
            continue
        for n in range(N):
            g = n // (N // K)
            raw = scale * (k[b, keys, g] @ q[b, t, n])
            score = softcap * np.tanh(raw / softcap) if softcap else raw
            total = np.exp(score - score.max()).sum()
            lse[b, t, n] = score.max() + np.log(total)
            p = np.exp(score - lse[b, t, n])
            out[b, t, n] = p @ v[b, keys, g]
            dp = v[b, keys, g] @ dout[b, t, n]
            dscore = p * (dp - p @ dp + dlse[b, t, n])
            draw = dscore * (1 - (score / softcap) ** 2) if softcap else dscore
            dq[b, t, n] = scale * draw @ k[b, keys, g]
            dk[b, keys, g] += scale * np.outer(draw, q[b, t, n])
            dv[b, keys, g] += np.outer(p, dout[b, t, n])
    return Answer(out, lse, dq, dk, dv)
