"""ParamSpec: the one table from which everything about a parameter is derived.

Initial values (sharded at birth), shardings, abstract targets for restore and for ahead-of-time
compilation, weight-decay masks and parameter counts all come from a tree of ParamSpec.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sharding.rules import spec_for

Tree = Any


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, logical name of each dimension, how it starts, whether it decays.

    `std` is the standard deviation of a normal start; 0 with `fill` gives a constant.
    `unpadded` is the shape without vocabulary padding, for counting; None means `shape`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float = 0.0
    fill: float = 0.0
    decay: bool = True
    unpadded: tuple[int, ...] | None = None


def is_spec(x: object) -> bool:
    return isinstance(x, ParamSpec)


def path_name(path: tuple) -> str:
    """Returns "a/b/c" for a key path of nested dicts."""
    return "/".join(str(getattr(k, "key", k)) for k in path)


def map_specs(f, specs: Tree) -> Tree:
    """Returns the tree of `f(name, spec)`."""
    return jax.tree_util.tree_map_with_path(lambda p, s: f(path_name(p), s), specs, is_leaf=is_spec)


def shardings(specs: Tree, mesh: Mesh, without: frozenset[str] = frozenset()) -> Tree:
    """Returns the NamedSharding of every parameter; raises UsageError as `spec_for` does."""
    sizes = dict(mesh.shape)
    return map_specs(
        lambda name, s: NamedSharding(
            mesh, spec_for(s.axes, s.shape, sizes, f"parameter {name}", without)
        ),
        specs,
    )


def abstract(specs: Tree, shardings_: Tree, dtype: jnp.dtype = jnp.float32) -> Tree:
    """Returns ShapeDtypeStructs with shardings: what restore and AOT compilation take."""
    return jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, dtype, sharding=sh),
        specs,
        shardings_,
        is_leaf=is_spec,
    )


def init(specs: Tree, key: jax.Array) -> Tree:
    """Returns float32 initial values; jit it with `out_shardings` so that they are born sharded.

    Each parameter draws from the key folded with a hash of its own name, so adding a parameter
    leaves the others' values as they were.
    """

    def leaf(name: str, spec: ParamSpec) -> jax.Array:
        if not spec.std:
            return jnp.full(spec.shape, spec.fill, jnp.float32)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        return spec.std * jax.random.normal(own, spec.shape, jnp.float32)

    return map_specs(leaf, specs)


def decay_mask(specs: Tree) -> Tree:
    """Returns True for the parameters that weight decay applies to."""
    return jax.tree.map(lambda s: s.decay, specs, is_leaf=is_spec)


def count(specs: Tree) -> int:
    """Returns the number of parameters, without vocabulary padding."""
    return sum(math.prod(s.unpadded or s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))
