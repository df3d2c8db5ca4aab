"""Which backend runs, and every refusal."""

import jax.numpy as jnp
import pytest

from models.attention import dispatch
from models.attention.dispatch import Backend, attention
from models.attention.mask import Mask
from sharding.errors import UsageError


def call(T=64, S=64, N=4, K=2, mask=Mask(), **options):  # noqa: B008 (frozen)
    def ids(length):
        return jnp.ones((1, length), jnp.int32)

    return attention(
        jnp.ones((1, T, N, 8)), jnp.ones((1, S, K, 8)), jnp.ones((1, S, K, 8)), mask,
        q_positions_BT=ids(T), k_positions_BS=ids(S), q_segments_BT=ids(T), k_segments_BS=ids(S),
        scale=1.0, **options,
    )  # fmt: skip


@pytest.fixture
def chosen(monkeypatch):
    """A table of two recording backends: `fast` refuses windows and declines few queries."""
    ran = []

    def recorder(name):
        def run(q_BTNH, *arrays, **static):
            ran.append(name)
            return q_BTNH, q_BTNH[..., 0]

        return run

    table = (
        Backend(
            "fast",
            recorder("fast"),
            refusal=lambda problem: "it has no window" if problem.mask.window else None,
            fewest_queries=16,
        ),
        Backend("plain", recorder("plain")),
    )
    monkeypatch.setattr(dispatch, "BACKENDS", table)
    return ran


def test_auto_takes_the_first_that_can(chosen):
    call()
    call(mask=Mask(window=3))
    call(T=4)
    call(T=4, backend="fast")
    assert chosen == ["fast", "plain", "plain", "fast"]


def test_a_named_backend_that_cannot_names_those_that_can(chosen):
    with pytest.raises(UsageError, match=r"`fast` cannot .*: it has no window; .* can: plain"):
        call(mask=Mask(window=3), backend="fast")
    assert chosen == []


def test_no_backend_can(monkeypatch):
    only = Backend("only", lambda *a, **k: None, refusal=lambda problem: "it is broken")
    monkeypatch.setattr(dispatch, "BACKENDS", (only,))
    for backend in ("auto", "only"):
        with pytest.raises(
            UsageError, match="no attention backend can do this call: only: it is b"
        ):
            call(backend=backend)


def test_unknown_backend():
    message = "no attention backend `blockwize`; choose from auto, blockwise, reference; did you m"
    with pytest.raises(UsageError, match=message):
        call(backend="blockwize")


@pytest.mark.parametrize("window", [0, -1])
def test_window_below_one(window):
    with pytest.raises(UsageError, match=rf"window is {window}; .* smallest is 1"):
        Mask(window=window)


def test_window_without_causal():
    with pytest.raises(UsageError, match="window 8 needs a causal mask"):
        Mask(causal=False, window=8)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="3 query heads cannot share 2 kv heads"):
        call(N=3)
    with pytest.raises(ValueError, match="there are 32 queries and 64 keys"):
        call(T=32, rows_aligned=True)
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"q \(1, 4, 2, 8\), k \(1, 4, 2, 6\) .* must agree"):
        attention(
            jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 2, 6)), jnp.ones((1, 4, 2, 6)), Mask(),
            q_positions_BT=ids, k_positions_BS=ids, q_segments_BT=ids, k_segments_BS=ids, scale=1.0,
        )  # fmt: skip
