"""What attention must not cost: memory, a second forward, computed tiles, repeated keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models.attention.dispatch import attention
from models.attention.mask import Mask, tiles

B, N, K, H = 2, 4, 2, 32


def problem(T, mask=Mask(), backend="blockwise"):  # noqa: B008 (frozen)
    """Returns (function of q, k, v giving out and lse, its arguments)."""
    ids = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    ones = jnp.ones((B, T), jnp.int32)

    def call(q, k, v):
        return attention(
            q, k, v, mask, q_positions_BT=ids, k_positions_BS=ids, q_segments_BT=ones,
            k_segments_BS=ones, scale=H**-0.5, backend=backend, rows_aligned=True,
        )  # fmt: skip

    rng = np.random.default_rng(0)
    return call, [rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K)]


def inner_jaxprs(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def count(jaxpr, primitive: str) -> int:
    """Occurrences of a primitive in the text of a program, inner programs included."""
    own = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
    return own + sum(count(j, primitive) for e in jaxpr.eqns for j in inner_jaxprs(e))


@pytest.mark.parametrize(
    ("names", "products"),
    [(("attention_out", "attention_lse"), 2 + 5), ((), 2 + 2 + 5)],
    ids=["saved", "unsaved"],
)
def test_saved_names_spare_the_second_forward(names, products):
    """A forward has two products (q.k, p.v), a backward five; nothing saved costs two more."""
    call, arrays = problem(256)
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(q, k, v):
        out, lse = jax.checkpoint(call, policy=policy)(q, k, v)
        return (out**2).sum() + lse.sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    assert count(program.jaxpr, "dot_general") == products


def test_saved_names_spare_the_second_forward_in_a_scan_over_layers():
    call, (q, k, v) = problem(128)
    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    def loss(q):
        def layer(q, _):
            return q + call(jnp.sin(q), k, v)[0], None

        return jax.lax.scan(jax.checkpoint(layer, policy=names), q, length=3)[0].sum()

    assert count(jax.make_jaxpr(jax.grad(loss))(q).jaxpr, "dot_general") == 2 + 5


def compiled_gradient(T, backend="blockwise"):
    call, arrays = problem(T, backend=backend)
    gradient = jax.grad(lambda q, k, v: (call(q, k, v)[0] ** 2).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(*arrays).compile()


def test_memory_grows_with_length_not_its_square():
    short, long = (compiled_gradient(T).memory_analysis().temp_size_in_bytes for T in (1024, 4096))
    assert long / short < 4.5, f"4 times the tokens took {long / short:.1f} times the memory"


def test_keys_are_not_repeated_for_grouped_heads():
    """No array of the program is larger than the accumulators and one tile of scores."""
    call, arrays = problem(512)
    gradient = jax.grad(lambda q, k, v: (call(q, k, v)[0] ** 2).sum(), argnums=(0, 1, 2))
    shapes = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            shapes.update(out.aval.shape for out in equation.outvars)
            for inner in inner_jaxprs(equation):
                walk(inner)

    walk(jax.make_jaxpr(gradient)(*arrays).jaxpr)
    assert max(np.prod(shape) for shape in shapes) <= B * N * max(512 * H, 128 * 128)


def test_ruled_out_tiles_are_not_visited():
    def visited(mask, rows_aligned=True):
        return len(tiles(mask, 1024, 1024, 128, 128, rows_aligned))

    assert visited(Mask(causal=False)) == 64
    assert visited(Mask()) == 36
    assert visited(Mask(window=128)) == 15  # the diagonal and the one below it
    assert visited(Mask(window=130)) == 15 + 6  # one tile more has its corner inside the window
    assert visited(Mask(window=1)) == 8
    assert visited(Mask(), rows_aligned=False) == 64


def test_every_visible_pair_lies_in_a_visited_tile():
    for window in (None, 1, 2, 7, 8, 9, 30):
        visited = tiles(Mask(window=window), 32, 32, 8, 4, rows_aligned=True)
        covered = np.zeros((32, 32), bool)
        for q0, k0 in visited:
            covered[q0 : q0 + 8, k0 : k0 + 4] = True
        distance = np.arange(32)[:, None] - np.arange(32)[None, :]
        visible = (distance >= 0) & (distance < (window or 99))
        assert not (visible & ~covered).any()


def test_inside_shard_map():
    """Batch and heads spread over four devices give what one device gives."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    T = 160
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    call, arrays = problem(T)

    def local(q, k, v, positions):
        segments = jnp.ones_like(positions)
        return attention(
            q, k, v, Mask(), q_positions_BT=positions, k_positions_BS=positions,
            q_segments_BT=segments, k_segments_BS=segments, scale=H**-0.5, rows_aligned=True,
        )  # fmt: skip

    spread = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*[P("data", None, "tensor")] * 3, P("data")),
        out_specs=(P("data", None, "tensor"), P("data", None, "tensor")),
        check_vma=False,
    )

    def loss(function, *arrays):
        out, lse = function(*arrays)
        return (out**2).sum() + jnp.sin(lse).sum()

    placed = [jax.device_put(x, jax.NamedSharding(mesh, P("data", None, "tensor"))) for x in arrays]
    placed_positions = jax.device_put(positions, jax.NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(lambda *a: loss(spread, *a, placed_positions), argnums=(0, 1, 2)))(
            *placed
        )
    want = jax.jit(jax.grad(lambda *a: loss(call, *a), argnums=(0, 1, 2)))(*arrays)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
