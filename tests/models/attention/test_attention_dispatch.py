"""Which backend runs, and every refusal."""

import jax
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


def described(kind: str) -> jax.sharding.AbstractMesh:
    """A mesh of one device of a kind that need not be there."""
    platform = {"TPU": "tpu", "NVIDIA": "gpu", "AMD": "gpu"}.get(kind.split()[0], "cpu")
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("TPU v5 lite", "pallas"),
        ("TPU v99", "blockwise"),
        ("NVIDIA H200", "blockwise"),
        ("AMD Instinct MI300X", "blockwise"),
        ("cpu", "blockwise"),
    ],
)
def test_auto_takes_kernels_on_the_tpu_that_is_compiled_for(kind, first, caplog):
    dispatch._log_once.cache_clear()
    with jax.sharding.use_abstract_mesh(described(kind)), caplog.at_level("INFO"):
        for _ in range(2):
            jax.eval_shape(call)
        jax.eval_shape(lambda: call(T=1))
    names = [record.getMessage().split(":")[0] for record in caplog.records]
    assert names == [f"attention by {first}", "attention by reference"]


def test_kernels_name_what_they_cannot_add():
    bias = jnp.zeros((1, 1, 64, 64))
    with pytest.raises(UsageError, match=r"adds no bias .*; .* can: blockwise, reference"):
        call(bias_BNTS=bias, backend="pallas")
    with pytest.raises(UsageError, match=r"`triton` .* adds no bias .*; .* can: blockwise, ref"):
        call(bias_BNTS=bias, backend="triton")
    with pytest.raises(UsageError, match=r"adds no ALiBi .*; .* can: triton, blockwise, ref"):
        call(alibi_slopes_N=jnp.ones(4), backend="pallas")


def test_sinks_of_a_part():
    with pytest.raises(ValueError, match="sinks belong to the whole"):
        call(sinks_N=jnp.zeros(4), given=(jnp.ones((1, 64, 4, 8)), jnp.ones((1, 64, 4))))


def test_a_bias_that_does_not_fit():
    with pytest.raises(ValueError, match=r"bias of shape \(1, 3, 64, 64\) does not fit scores"):
        call(bias_BNTS=jnp.zeros((1, 3, 64, 64)))


def test_unknown_backend():
    message = (
        "no attention backend `blockwize`; choose from auto, pallas, cudnn, triton, blockwise, "
        "reference; did"
    )
    with pytest.raises(UsageError, match=message):
        call(backend="blockwize")


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("name", ["window", "chunk"])
def test_window_or_chunk_below_one(name, size):
    with pytest.raises(UsageError, match=rf"{name} is {size}; .* smallest is 1"):
        Mask(**{name: size})


@pytest.mark.parametrize("name", ["window", "chunk"])
def test_window_or_chunk_without_causal(name):
    with pytest.raises(UsageError, match=f"{name} 8 needs a causal mask"):
        Mask(causal=False, **{name: 8})


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
