"""Devices that compute or remember other bits than they must, found and named.

Copies of one shard on several devices are compared by a sum of their bits (four bytes an array and
device); a step that is done twice is compared the same way; and before a start every device solves
the same problem and sends known bytes along every axis of the mesh. Where most devices agree the
odd one is named; of two that differ it cannot be told which is wrong.
Silent corruption of this kind: arXiv:2102.11245; gone unseen by checks for NaN: arXiv:2502.12340.
"""

import math
import os
import socket
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, reshard

from checkpoint.fingerprint import array_sums
from checkpoint.steps import folder_path
from sharding.config import AXES
from trainer.recovery.health import SUSPECT, Unhealthy

_EACH = PartitionSpec(*AXES)  # one element per device
_SIDE, _BLOCK = 256, 1 << 14  # of the matrices; words that travel


@jax.jit
def device_sums(leaves: list[jax.Array]) -> jax.Array:
    """Returns uint32 (*mesh, arrays): a sum of the bits of every device's shard of every array."""

    def local(*shards: jax.Array) -> jax.Array:
        sums = jnp.stack([array_sums(shard)[0] for shard in shards])
        return sums.reshape((1,) * len(AXES) + (-1,))

    specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
    found = jax.shard_map(local, in_specs=specs, out_specs=_EACH, check_vma=False)(*leaves)
    return reshard(found, PartitionSpec())


@dataclass(frozen=True)
class Odd:
    """Devices whose bits differ from what they should be; `certain` if no others can be meant."""

    devices: tuple[Any, ...]
    certain: bool
    what: str

    def __str__(self) -> str:
        ranks = sorted({device.process_index for device in self.devices})
        which = ", ".join(str(device.id) for device in self.devices[:8])
        who = f"device {which} of process {', '.join(map(str, ranks))}"
        return f"{who}: {self.what}" + ("" if self.certain else "; which is wrong cannot be told")

    @property
    def status(self) -> int:
        """What this process ends with: SUSPECT if a device of its own is meant, else a failure."""
        own = any(device.process_index == jax.process_index() for device in self.devices)
        return SUSPECT if own else 1


def replicated(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns those of the arrays of which several devices hold the same shard."""
    return {name: a for name, a in arrays.items() if a.sharding.num_devices > _pieces(a)}


def odd_replicas(sums: np.ndarray, specs: dict[str, PartitionSpec], mesh: Mesh) -> Odd | None:
    """Returns the devices whose shards differ from the other copies of the same shard.

    Args:
      sums: of `device_sums`, for arrays with these names and specs.
    """
    wrong: dict[Any, None] = {}  # a set that keeps its order
    names, certain = [], True
    for number, (name, spec) in enumerate(specs.items()):
        used = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
        copies = [place for place, axis in enumerate(AXES) if axis not in used]
        last = range(len(AXES) - len(copies), len(AXES))
        count = math.prod(mesh.devices.shape[place] for place in copies)
        values, devices = (
            np.moveaxis(a, copies, last).reshape(-1, count)
            for a in (sums[..., number], mesh.devices)
        )
        for group, holders in zip(values.tolist(), devices.tolist(), strict=True):
            (common, votes), *others = Counter(group).most_common()
            if not others:
                continue
            certain &= 2 * votes > count
            odd = [d for v, d in zip(group, holders, strict=True) if v != common]
            wrong |= dict.fromkeys(odd if 2 * votes > count else holders)
            names.append(name)
    if not wrong:
        return None
    arrays = ", ".join(list(dict.fromkeys(names))[:3])
    return Odd(tuple(wrong), certain, f"other bits than the replicas hold, in {arrays}")


def odd_repeats(once: np.ndarray, again: np.ndarray, mesh: Mesh) -> Odd | None:
    """Returns the devices on which a step done twice, with these sums, gave different bits."""
    differs = (once != again).any(axis=-1)
    if not differs.any():
        return None
    devices = tuple(mesh.devices[differs].tolist())
    return Odd(devices, len(devices) == 1, "the same step, done twice, gave other bits")


def self_check(mesh: Mesh, workdir: str | os.PathLike) -> None:
    """Tries what a run needs of every device and host, in about a second.

    Raises:
      Unhealthy: naming the device or host that computes, sends, stores or remembers wrongly.
    """
    if text := _file_problem(workdir):
        raise Unhealthy(SUSPECT, f"self-check: {text}")
    if odd := _memory_problem(mesh) or device_problem(mesh):
        raise Unhealthy(odd.status, f"self-check: {odd}")


def device_problem(mesh: Mesh) -> Odd | None:
    """Returns which devices compute otherwise than the others or get wrong bytes."""
    with jax.set_mesh(mesh):
        numbers = np.arange(mesh.size, dtype=np.int32).reshape(mesh.devices.shape)
        placed = jax.make_array_from_callback(
            numbers.shape, NamedSharding(mesh, _EACH), lambda index: numbers[index]
        )
        results = np.asarray(_trial(placed))
    products, sent = results[..., 0], results[..., 1:]
    (common, votes), *others = Counter(products.reshape(-1).tolist()).most_common()
    if others:
        certain = 2 * votes > mesh.size
        wrong = mesh.devices[(products != common) | (not certain)]
        return Odd(tuple(wrong.tolist()), certain, "a matrix product differs from the others'")
    for axis in np.argwhere(sent.any(axis=tuple(range(len(AXES)))))[:1, 0]:
        wrong = tuple(mesh.devices[sent[..., axis] > 0].tolist())
        return Odd(wrong, False, f"wrong bytes arrive along mesh axis {AXES[axis]}")
    return None


def in_a_row(devices: list[Any]) -> Mesh:
    """Returns a mesh of `devices` along fsdp."""
    grid = np.asarray(devices).reshape(1, -1, 1, 1)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


@jax.jit
def _trial(numbers: jax.Array) -> jax.Array:
    """Returns uint32 (*mesh, 1 + axes): a product's sum, and whether wrong bytes came, by axis."""
    sizes = dict(zip(AXES, numbers.shape, strict=True))

    def local(number: jax.Array) -> jax.Array:
        row, column = (lax.broadcasted_iota(jnp.int32, (_SIDE, _SIDE), axis) for axis in (0, 1))
        left_DD = ((7919 * row + 104_729 * column) % 509).astype(jnp.float32) / 509
        product_DD = jnp.tanh(left_DD @ left_DD.T / _SIDE) @ left_DD
        found = [array_sums(product_DD)[0]]
        stride = numbers.size
        for axis, size in sizes.items():
            stride //= size
            came = lax.all_gather(jnp.full(_BLOCK, number.reshape(())), axis)
            first = number.reshape(()) - stride * lax.axis_index(axis)
            right = first + stride * jnp.arange(size)
            found.append(jnp.any(came != right[:, None]).astype(jnp.uint32))
        return jnp.stack(found).reshape((1,) * len(AXES) + (-1,))

    found = jax.shard_map(local, in_specs=_EACH, out_specs=_EACH, check_vma=False)(numbers)
    return reshard(found, PartitionSpec())


def _memory_problem(mesh: Mesh) -> Odd | None:
    """A device of this host with much less free memory than its neighbours: somebody else's."""
    free = {}
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free[device] = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    for device, left in free.items():
        if left < 0.8 * statistics.median(free.values()):
            return Odd((device,), True, f"only {left / 2**30:.1f} GiB of memory are free")
    return None


def _file_problem(workdir: str | os.PathLike) -> str:
    who = f"host {socket.gethostname()}, process {jax.process_index()}"
    path = folder_path(workdir) / f".self-check-{jax.process_index()}"
    content = os.urandom(4096)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        back = path.read_bytes()
        path.unlink()
    except OSError as error:
        return f"{who}: cannot write and read {path.parent}: {error.strerror}"
    return "" if back == content else f"{who}: {path.parent} gives back other bytes"


def _pieces(array: jax.Array) -> int:
    """How many different shards an array is cut into."""
    return math.prod(
        size // part
        for size, part in zip(array.shape, array.sharding.shard_shape(array.shape), strict=True)
    )
