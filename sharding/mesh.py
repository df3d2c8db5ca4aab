"""The mesh, and the only place that asks for devices.

Everything else is handed a mesh, so the same code runs on fake CPU devices, on a TPU topology that
is not there (ahead-of-time compilation) and on a pod. Axes are `AxisType.Explicit`: the sharding
of a value is part of its type, and a forgotten axis is an error when the step is traced.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sharding.config import AXES, MeshConfig
from sharding.errors import UsageError


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of axes data, fsdp, seq, tensor over `devices` (all of the job by default).

    Devices are ordered so that the axes at the end, which talk the most, lie along true rings of
    the torus; with `dcn_` sizes the slow network is crossed only by the outer part of those axes.

    Raises:
      UsageError: sizes that do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    grid = device_grid(config, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def device_grid(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """Returns the devices as an array with one dimension for each of AXES, ordered as a mesh is.

    Raises:
      UsageError: sizes that do not fit the devices.
    """
    sizes = config.sizes(len(devices))
    dcn = tuple(getattr(config, f"dcn_{axis}", 1) for axis in AXES)
    shape = tuple(sizes[axis] // slow for axis, slow in zip(AXES, dcn, strict=True))
    parts = np.empty(dcn, object)
    try:
        for place, granule in zip(np.ndindex(dcn), _granules(devices, parts.size), strict=True):
            parts[place] = mesh_utils.create_device_mesh(
                shape, granule, allow_split_physical_axes=True
            )
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise UsageError(f"config.mesh: {sizes} with dcn {dcn}: {error}") from error
    return np.block(parts.tolist())


def _granules(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """Returns the devices in `count` parts, within which the network is fast.

    A part is a slice where devices know theirs: a TPU slice; on GPUs a host, however many processes
    it has. Elsewhere, on CPUs, it is an equal number of processes, in the order of their numbers.
    """
    if count == 1:
        return [list(devices)]
    slices = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(slices) > 1:
        if len(slices) != count:
            raise ValueError(
                f"the dcn sizes are for {count} slices or hosts, there are {len(slices)}"
            )
        return [[d for d in devices if d.slice_index == number] for number in slices]
    processes = sorted({device.process_index for device in devices})
    if len(processes) % count:
        raise ValueError(
            f"the dcn sizes are for {count} hosts; {len(processes)} processes do not divide"
        )
    each = len(processes) // count
    groups = [set(processes[i : i + each]) for i in range(0, len(processes), each)]
    return [[d for d in devices if d.process_index in group] for group in groups]


def target_device() -> jax.Device | jax.sharding.AbstractDevice:
    """Returns what the current trace is compiled for: the mesh's device, else JAX's default one.

    A mesh may be of described devices that are not there; theirs are the kind and platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None else jax.local_devices()[0]
