"""Products with weights, which are cast and gathered before and whose gradients are summed after.

A `Weight` is what a layer multiplies by. Its value is the parameter in the compute dtype, gathered
over fsdp; its gradient goes to the float32 parameter itself, so that it is summed over tokens and
devices in `reduce_dtype` and lands on the parameter's own shards without passing through the
compute dtype.

Letters: B batch, T time, D width, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig
from models.spec import Tree, is_spec
from sharding.rules import SEQ, STREAM


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "source"],
    meta_fields=["placed", "reduce_dtype"],
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of a layer.

    value: in the compute dtype, whole over fsdp. No gradient flows through it.
    source: the parameter as stored, which takes the gradient; None in what a backward pass saves.
    placed: the PartitionSpec of `source`.
    reduce_dtype: in which the gradient is summed over tokens and devices.
    """

    value: jax.Array
    source: jax.Array | None
    placed: P
    reduce_dtype: str


def gathered(params: Tree, specs: Tree, config: ModelConfig) -> Tree:
    """Returns the params of a layer with each matrix as a `Weight`; norms and biases stay float32.

    The cast comes before the all-gather over fsdp, so that half as many bytes travel.

    Args:
      params: arrays, in a tree of the form of `specs`.
    """

    def leaf(s, w):
        if not s.decay:
            return w
        placed = jax.typeof(w).sharding.spec
        value = _whole(jax.lax.stop_gradient(w), jnp.dtype(config.dtype))
        return Weight(value, w, placed, config.reduce_dtype)

    return jax.tree.map(leaf, specs, params, is_leaf=is_spec)


def resident(params: Tree, specs: Tree, config: ModelConfig) -> Tree:
    """Returns the values that `gathered` makes of all params, as plain arrays without gradients."""
    weights = gathered(params, specs, config)
    return jax.tree.map(
        lambda w: w.value if isinstance(w, Weight) else w,
        weights,
        is_leaf=lambda w: isinstance(w, Weight),
    )


def _whole(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Casts, then gathers over fsdp."""
    w, spec = w.astype(dtype), jax.typeof(w).sharding.spec
    without = P(*(None if axis == "fsdp" else axis for axis in spec))
    return w if without == spec else reshard(w, without)


# ---------------------------------------------------------------- matmul


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, w: Weight, contracted: int = 1, spec: P | None = None) -> jax.Array:
    """Contracts the last `contracted` dimensions of x with the first ones of w.

    The gradients are spelled out because JAX's own for the weight comes out transposed, and
    XLA:CPU then transposes an activation for it: a quarter of the time of a layer. `spec` is the
    sharding of the result, needed where a contracted dimension is sharded. Operands whose tokens
    are spread over STREAM are gathered here and kept spread for the backward pass, where their
    gradient is reduced and spread in one step (sequence parallelism, arXiv:2205.05198).
    """
    batch = x.ndim - contracted
    return _dot(x, w.value, range(batch, x.ndim), range(contracted), spec)


def _matmul_forward(x, w, contracted, spec):
    return matmul(x, w, contracted, spec), (x, dataclasses.replace(w, source=None))


def _matmul_backward(contracted, spec, saved, dy):
    x, w = saved
    batch, out = x.ndim - contracted, range(contracted, w.value.ndim)
    dx = _dot(dy, w.value, range(batch, dy.ndim), out, jax.typeof(x).sharding.spec)
    dw = _dot(x, dy, range(batch), range(batch), w.placed, jnp.dtype(w.reduce_dtype))
    return dx, dataclasses.replace(w, value=None, source=dw.astype(jnp.float32))


matmul.defvjp(_matmul_forward, _matmul_backward)


def _dot(a, b, a_axes, b_axes, spec: P | None, dtype: jnp.dtype | None = None) -> jax.Array:
    sharding = None if spec is None else NamedSharding(jax.sharding.get_abstract_mesh(), spec)
    a, b = _with_all_tokens(a), _with_all_tokens(b)
    return jax.lax.dot_general(
        a,
        b,
        ((tuple(a_axes), tuple(b_axes)), ((), ())),
        out_sharding=sharding,
        preferred_element_type=dtype,
    )


def _with_all_tokens(x: jax.Array) -> jax.Array:
    spec = jax.typeof(x).sharding.spec
    if STREAM not in spec:
        return x
    with jax.named_scope("all_tokens"):  # trainer/plan/audit.py knows it by this
        return reshard(x, P(*(SEQ if axis == STREAM else axis for axis in spec)))


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x plus a float32 bias in x's dtype; the bias's gradient is summed in float32."""
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


# ---------------------------------------------------------------- rows of a table


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table_VD: Weight, rows_BT: jax.Array, spec: P) -> jax.Array:
    """Returns the rows of a table, sharded as `spec`.

    A frequent token adds thousands of gradients to one row, which a bfloat16 sum would stop
    counting after a few hundred: the sum over a device's own tokens is always float32.
    """
    return table_VD.value.at[rows_BT].get(out_sharding=spec)


def _lookup_forward(table_VD, rows_BT, spec):
    return lookup(table_VD, rows_BT, spec), (dataclasses.replace(table_VD, source=None), rows_BT)


def _lookup_backward(spec, saved, dx_BTD):
    table_VD, rows_BT = saved
    value = jax.typeof(table_VD.value)
    like = jax.ShapeDtypeStruct(value.shape, jnp.float32, sharding=value.sharding)
    transposed = jax.linear_transpose(lambda t: t.at[rows_BT].get(out_sharding=spec), like)
    (dtable_VD,) = transposed(dx_BTD.astype(jnp.float32))
    dtable_VD = reshard(dtable_VD.astype(table_VD.reduce_dtype), table_VD.placed)
    return dataclasses.replace(table_VD, value=None, source=dtable_VD.astype(jnp.float32)), None


lookup.defvjp(_lookup_forward, _lookup_backward)
