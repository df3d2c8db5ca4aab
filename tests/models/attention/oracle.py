"""Attention in float64 NumPy, one query row at a time, with its gradient derived by hand.

Slow and plain on purpose: it shares no formula layout, no masking code and no library with the
implementations that it judges.
"""

from typing import NamedTuple

import numpy as np


class Tokens(NamedTuple):
    """Positions and segment ids, in the order in which `attention` names them."""

    q_positions_BT: np.ndarray
    k_positions_BS: np.ndarray
    q_segments_BT: np.ndarray
    k_segments_BS: np.ndarray


class Rule(NamedTuple):
    """Who sees whom and what is added to the scores; None where the call has none of it."""

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    prefix_BS: np.ndarray | None = None
    sinks_N: np.ndarray | None = None
    slopes_N: np.ndarray | None = None
    bias_BNTS: np.ndarray | None = None


class Answer(NamedTuple):
    """Results, and gradients for the given cotangents. lse is nan in rows that see no key."""

    out_BTNV: np.ndarray
    lse_BTN: np.ndarray
    dq_BTNH: np.ndarray
    dk_BSKH: np.ndarray
    dv_BSKV: np.ndarray
    dsinks_N: np.ndarray
    dbias_BNTS: np.ndarray


def visible(tokens: Tokens, b: int, t: int, rule: Rule) -> np.ndarray:
    """Indices of the keys that query row t of batch row b may attend to."""
    segment, position = tokens.q_segments_BT[b, t], tokens.q_positions_BT[b, t]
    keys = []
    for s in range(tokens.k_segments_BS.shape[1]):
        key = tokens.k_positions_BS[b, s]
        if segment == 0 or tokens.k_segments_BS[b, s] != segment:
            continue
        allowed = not (rule.causal and key > position)
        allowed &= not (rule.window and position - key >= rule.window)
        allowed &= not (rule.chunk and position // rule.chunk != key // rule.chunk)
        if allowed or (rule.prefix_BS is not None and rule.prefix_BS[b, s]):
            keys.append(s)
    return np.array(keys, int)


def attend(
    q, k, v, dout, dlse, tokens: Tokens, rule: Rule, scale: float, sizes: bool = False
) -> Answer | tuple[Answer, Answer]:
    """Returns out, lse and the gradients of sum(out * dout) + sum(lse * dlse).

    With `sizes`, also how far each of them moves, in units of a relative rounding error, when what
    a 16-bit kernel rounds is off by one unit and all errors add up: results; probabilities and
    their gradients, before products; and out (with sinks dout too), before the row constant of
    FlashAttention's gradient. lse is not rounded anywhere.
    """
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    (B, T, N, _), (S, K, V) = q.shape, v.shape[1:]
    out, lse = np.zeros((B, T, N, V)), np.full((B, T, N), np.nan)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dsinks, dbias = np.zeros(N), np.zeros((B, N, T, S))
    off = Answer(*(np.zeros_like(x) for x in (out, lse, dq, dk, dv, dsinks, dbias)))
    for b, t in np.ndindex(B, T):
        keys = visible(tokens, b, t, rule)
        if keys.size == 0:
            continue
        distance = np.abs(tokens.q_positions_BT[b, t] - tokens.k_positions_BS[b, keys])
        for n in range(N):
            g = n // (N // K)
            capped = scale * (k[b, keys, g] @ q[b, t, n])
            slope = 1.0
            if rule.softcap:
                tanh = np.tanh(capped / rule.softcap)
                capped, slope = rule.softcap * tanh, 1 - tanh**2
            score = capped
            if rule.slopes_N is not None:
                score = score - rule.slopes_N[n] * distance
            if rule.bias_BNTS is not None:
                full = np.broadcast_to(rule.bias_BNTS, (B, N, T, S))
                score = score + full[b, n, t, keys]
            sink = -np.inf if rule.sinks_N is None else rule.sinks_N[n]
            top = max(score.max(), sink)
            lse[b, t, n] = top + np.log(np.exp(score - top).sum() + np.exp(sink - top))
            p = np.exp(score - lse[b, t, n])
            out[b, t, n] = p @ v[b, keys, g]
            dp = v[b, keys, g] @ dout[b, t, n]
            total = p @ dp
            dscore = p * (dp - total + dlse[b, t, n])
            dsinks[n] += np.exp(sink - lse[b, t, n]) * (dlse[b, t, n] - total)
            dbias[b, n, t, keys] = dscore
            draw = dscore * slope
            dq[b, t, n] = scale * draw @ k[b, keys, g]
            dk[b, keys, g] += scale * np.outer(draw, q[b, t, n])
            dv[b, keys, g] += np.outer(p, dout[b, t, n])
            if not sizes:
                continue
            twice = 1.0 if rule.sinks_N is None else 2.0  # sinks round out and dout once more
            constant = twice * (np.abs(dout[b, t, n]) @ np.abs(out[b, t, n]))
            row = constant + (twice - 1) * (np.abs(v[b, keys, g]) @ np.abs(dout[b, t, n]))
            moved = np.abs(draw) + p * slope * row
            off.out_BTNV[b, t, n] = p @ np.abs(v[b, keys, g])
            off.dq_BTNH[b, t, n] = scale * moved @ np.abs(k[b, keys, g])
            off.dk_BSKH[b, keys, g] += scale * np.outer(moved, np.abs(q[b, t, n]))
            off.dv_BSKV[b, keys, g] += twice * np.outer(p, np.abs(dout[b, t, n]))
            off.dsinks_N[n] += np.exp(sink - lse[b, t, n]) * constant
            off.dbias_BNTS[b, n, t, keys] = p * row
    answer = Answer(out, lse, dq, dk, dv, dsinks, dbias)
    if not sizes:
        return answer
    return answer, Answer(*(o + np.abs(a) for o, a in zip(off, answer, strict=True)))
