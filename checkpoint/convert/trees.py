"""Trees of JAX stacks: named tensors from paths of keys, Adam's moments found, stacks taken apart.

A tensor is called by its keys joined by dots, NNX's last key `value` left out. State of optax's
Adam is found wherever `mu`, `nu` and `count` lie side by side. A table may name one layer of a
tensor that holds them all along an axis: `kernel[_,{L}]` is layer L along the second one.
"""

import re
from typing import Any

from checkpoint.convert.families import Family
from checkpoint.convert.pieces import PieceTensors
from checkpoint.convert.sources import MU, NU, PARAMS, Source
from sharding.errors import MismatchError, UnsafeInputError

COUNT = "count"
LAYERS = 2**14  # most that a stack may hold

Keys = tuple[str, ...]


def source_of(tree: dict[Keys, Any], left: list[str], where: str) -> Source:
    """Returns what a tree holds: moments under the names of their weights, and their count.

    Args:
      tree: keys → tensor (dtype, shape, read(start, stop)).
      left: names of values that are no tensors.

    Raises:
      UnsafeInputError: two tensors have one name.
    """
    bare = {keys[:-1] if keys[-1:] == ("value",) else keys: t for keys, t in tree.items()}
    nodes = {keys[:-1] for keys in bare if keys[-1:] == (COUNT,)}
    for name in (MU, NU):
        nodes &= {keys[:i] for keys in bare for i, key in enumerate(keys) if key == name}
    parts: dict[str, dict[str, Any]] = {PARAMS: {}}
    steps = set()
    for keys, tensor in bare.items():
        node = next((keys[:i] for i in range(len(keys)) if keys[:i] in nodes), None)
        part, name = PARAMS, ".".join(keys)
        if node is not None:
            part = keys[len(node)]
            if part == COUNT and not tensor.shape and tensor.dtype.kind in "iu":
                steps.add(int(tensor.read(0, 1)))
                continue
            if part not in (MU, NU):
                left.append(name)
                continue
            name = ".".join((*node, *keys[len(node) + 1 :]))
        if name in parts.setdefault(part, {}):
            raise UnsafeInputError(f"{where}: two tensors are called `{name}`")
        parts[part][name] = tensor
    if len(bare) != len(tree):
        raise UnsafeInputError(f"{where}: two tensors have one name")
    tensors = {part: PieceTensors(found) for part, found in parts.items()}
    return Source(tensors, steps.pop() if len(steps) == 1 else None, left=sorted(left))


def apart(tensors: Any, family: Family) -> Any:
    """Returns the tensors with those that the family's table names by layer taken apart.

    Raises:
      MismatchError: a tensor has no such axis, absurdly many layers, or a format without it.
    """
    stacks = dict(r.theirs.name.split("[", 1) for r in family.rows if "[" in r.theirs.name)
    found = {}
    for name, fact in tensors.facts.items() if stacks else ():
        base = next((b for b in stacks if f".{name}".endswith(f".{b}")), None)
        if base is None:
            found[name] = tensors.tensors[name]
            continue
        axis, shape = stacks[base].count(","), fact[1]
        tensor = tensors.tensors[name]
        if len(shape) < max(2, axis + 1) or shape[axis] > LAYERS or not hasattr(tensor, "at"):
            raise MismatchError(f"`{name}` {list(shape)} cannot be taken apart along axis {axis}")
        for layer in range(shape[axis]):
            index = re.sub(r"{\w+}", str(layer), stacks[base])
            found[f"{name}[{index}"] = tensor.at(axis, layer)
    return PieceTensors(found) if stacks else tensors
