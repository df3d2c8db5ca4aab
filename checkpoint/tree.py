"""Names for arrays that outlive a change of optimizer, and what cannot be stored under a name.

Optax keeps its state as nested tuples, so an array's place changes whenever a transformation is
added to the chain. Here the name of an array is the field of the state that holds it and the path
of the parameter below it, whatever the state is wrapped in: `mu/layers/wq`, `nu/layers/wq`,
`count`. Works on arrays and on their abstract shapes alike; does not read or write anything.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from sharding.errors import UsageError

Tree = Any

# Wrappers that pass every update on, so counters inside and outside of them stay equal. Any other
# wrapper (MultiSteps, apply_if_finite) may hold updates back, and its counters are its own.
_TRANSPARENT = {
    "MaskedState",
    "MultiTransformState",
    "PartitionState",
    "InjectHyperparamsState",
    "InjectStatefulHyperparamsState",
}


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of a tree by name, the parts of the path joined by '/'."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_part(key) for key in path): leaf for path, leaf in leaves}


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested dict whose leaves have these names; the reverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        node = tree
        *parents, last = name.split("/")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def check_storable(state: Tree) -> None:
    """Refuses what Orbax would lose, merge or write wrongly without a word.

    Raises:
        UsageError: a container other than a dict with string keys; a path part that is empty or
            holds '.' or '/' (storage joins the parts by '.', so two arrays could become one); a
            leaf that is not an array, is empty, is a typed random key, or lives in one process
            of several. The message lists the paths.
    """
    problems: dict[str, list[str]] = {}
    _check_containers(state, (), problems)
    if not problems:
        for name, leaf in flatten(state).items():
            problem = _leaf_problem(leaf)
            if problem:
                problems.setdefault(problem, []).append(name)
    if problems:
        text = "; ".join(f"{problem}: {_first(paths)}" for problem, paths in problems.items())
        raise UsageError(f"cannot store this state: {text}")


def name_optimizer(opt_state: Tree) -> dict[str, Any]:
    """Returns the arrays of an optax state as a nested dict under stable names.

    States without arrays vanish. Counters of transformations that always advance together are
    stored once, so a schedule added to a chain later finds its place.

    Raises:
        UsageError: two different arrays would get one name; the message names both states.
    """
    named: dict[str, Any] = {}
    for name, leaf, first in _named_leaves(opt_state):
        if first:
            _put(named, name, leaf)
    return named


def unname_optimizer(named: dict[str, Any], like: Tree) -> Tree:
    """Returns an optax state shaped like `like` with the arrays of `named`.

    Raises:
        UsageError: an array that `like` needs is not in `named`.
    """
    found = flatten(named)
    leaves = []
    for name, _, first in _named_leaves(like):
        path = "/".join(name)
        if path not in found:
            raise UsageError(f"the optimizer state needs `{path}`, which was not stored")
        leaf = found[path]
        # A counter stored once goes to several states, and one buffer cannot be donated twice.
        leaves.append(leaf if first or not isinstance(leaf, jax.Array) else jnp.copy(leaf))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named_leaves(opt_state: Tree) -> Iterable[tuple[tuple[str, ...], Any, bool]]:
    """Yields (name, leaf, is this the first leaf of that name) in the order of the leaves."""
    owners: dict[tuple[str, ...], tuple[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        fields = [index for index, key in enumerate(path) if isinstance(key, GetAttrKey)]
        start = fields[-1] if fields else 0
        name = tuple(_part(key) for key in path[start:])
        owner, scope = _owner(opt_state, path, fields)
        if name in owners:
            other, other_scope = owners[name]
            if not (_is_counter(name, leaf) and scope == other_scope):
                where = "" if owner != other else f" at {jax.tree_util.keystr(path)}"
                raise UsageError(
                    f"two optimizer states would be stored as `{'/'.join(name)}`: "
                    f"{other} and {owner}{where}"
                )
        yield name, leaf, name not in owners
        owners.setdefault(name, (owner, scope))


def _owner(opt_state: Tree, path: tuple, fields: list[int]) -> tuple[str, Any]:
    """Returns the class that holds the last field of `path`, and the nearest opaque wrapper."""
    node, scope, owner = opt_state, (), type(opt_state).__name__
    for index, key in enumerate(path):
        if index in fields:
            owner = type(node).__name__
            if index != fields[-1] and owner not in _TRANSPARENT:
                scope = path[:index], owner
        node = _descend(node, key)
    return owner, scope


def _is_counter(name: tuple[str, ...], leaf: Any) -> bool:
    return name == ("count",) and leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer)


def _descend(node: Any, key: Any) -> Any:
    if isinstance(key, GetAttrKey):
        return getattr(node, key.name)
    return node[key.idx if isinstance(key, SequenceKey) else key.key]


def _part(key: Any) -> str:
    if isinstance(key, GetAttrKey):
        return key.name
    if isinstance(key, SequenceKey):
        return str(key.idx)
    if isinstance(key, DictKey | FlattenedIndexKey):
        return str(key.key)
    raise TypeError(f"unknown kind of tree path: {key!r}")


def _put(named: dict[str, Any], name: tuple[str, ...], leaf: Any) -> None:
    node = named
    for part in name[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UsageError(f"optimizer states would be stored as both `{part}` and below it")
    if name[-1] in node:
        raise UsageError(f"optimizer states would be stored as both `{name[-1]}` and below it")
    node[name[-1]] = leaf


def _check_containers(node: Any, path: tuple[str, ...], problems: dict[str, list[str]]) -> None:
    here = "/".join(path) or "the top"
    if isinstance(node, dict):
        for key, child in node.items():
            if not isinstance(key, str):
                problems.setdefault("names must be strings", []).append(f"{here}: {key!r}")
                continue
            if not key or "." in key or "/" in key:
                problem = "a name cannot be empty or contain '.' or '/'"
                problems.setdefault(problem, []).append(f"{here}: {key!r}")
            _check_containers(child, (*path, key), problems)
    elif not path or node is None or not jax.tree_util.all_leaves([node]):
        problem = "only nested dicts of arrays can be stored"
        problems.setdefault(problem, []).append(f"{here} is {type(node).__name__}")


def _leaf_problem(leaf: Any) -> str | None:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return "not an array"
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "a typed random key (store jax.random.key_data of it)"
    if leaf.size == 0:
        return "an array without elements"
    local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    if local and jax.process_count() > 1:
        return "an array of this process alone"
    return None


def _first(paths: list[str]) -> str:
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(paths[:4]) + more
