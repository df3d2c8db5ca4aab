"""One table from logical axis names to mesh axes, for parameters and for activations.

Every dimension of every array has a logical name; changing the parallelism means changing this
table or the mesh, never model code. A name that the table lacks, a mesh axis used twice and a size
that does not divide are errors that name the array, the dimension, the size and the axis.
"""

import math
from collections.abc import Sequence

from jax.sharding import PartitionSpec as P

from sharding.errors import UsageError, nearest

# Logical axis → mesh axes, tried in the order of the array's dimensions.
RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "seq": ("seq",),
    # Parameters and activations.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # Parameters only: what fsdp shards.
    "embed": ("fsdp",),
    # Never sharded.
    "layers": (),
    "head_dim": (),
    "norm": (),
    "positions": (),
}
BATCH, SEQ = RULES["batch"], RULES["seq"][0]  # what every activation is sharded over
STREAM = (SEQ, "tensor")  # tokens between the blocks, where nothing else is split over tensor

# These are whole on every device where the mesh axes have more devices than there are of them, a
# multiple: each KV head then serves several devices (models/decoder.py picks a device's own).
REPLICATED_IF_FEW = frozenset({"kv_heads"})


def spec_for(
    axes: Sequence[str | None],
    shape: Sequence[int],
    sizes: dict[str, int],
    name: str,
    without: frozenset[str] = frozenset(),
) -> P:
    """Returns the PartitionSpec of one array.

    Args:
      axes: logical name of each dimension; None is never sharded.
      shape: sizes of the dimensions, checked against the mesh.
      sizes: mesh axis → size.
      name: how errors call the array.
      without: mesh axes to leave out, as `{"fsdp"}` for a weight gathered for compute.

    Raises:
      UsageError: unknown logical name, mesh axis used twice, or a size that does not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(axes)} axis names for shape {tuple(shape)}")
    entries, used = [], set()
    for dimension, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if axis is None:
            entries.append(None)
            continue
        if axis not in RULES:
            raise UsageError(
                f"{name}: no sharding rule for logical axis {axis!r} (rules: {', '.join(RULES)})"
                f"{nearest(axis, RULES)}"
            )
        mesh_axes = tuple(a for a in RULES[axis] if a not in without)
        shards = math.prod(sizes[a] for a in mesh_axes)
        if axis in REPLICATED_IF_FEW and size < shards and shards % size == 0:
            mesh_axes, shards = (), 1
        if twice := used.intersection(mesh_axes):
            raise UsageError(f"{name}: mesh axis {twice.pop()!r} would shard two dimensions {axes}")
        used.update(mesh_axes)
        if size % shards:
            raise UsageError(
                f"{name}: dimension {dimension} ({axis}, size {size}) does not divide over mesh "
                f"axis {' × '.join(mesh_axes)} of size {shards}"
            )
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return P(*entries)
