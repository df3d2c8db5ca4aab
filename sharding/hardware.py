"""What the chips can do: peak arithmetic, memory and links, per device as JAX counts devices.

Owns the numbers that MFU, the planner and `torus doctor` divide by, and the way from a JAX device
to them. Figures are the vendors' own, dense (no sparsity): for TPU the system-architecture pages at
cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), for NVIDIA the A100, H100, H200 and HGX B200
datasheets (SXM boards). Clocks are those at which the peak is quoted; NVIDIA's and those of v6e and
tpu7x follow from peak FLOP/s and the size of the matrix units. Nothing here touches a device at
import, and JAX is imported only by `measured_cpu_flops`.
"""

import glob
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

_GIB = 2.0**30


@dataclass(frozen=True)
class Chip:
    """The peak figures of one JAX device of a kind.

    A TPU v4 or v5p chip has two cores that JAX shows as one device; tpu7x shows its two halves as
    two devices, so its figures are halves of the datasheet's and `devices_per_chip` is 2.
    """

    name: str
    flops_bf16: float  # dense bfloat16 FLOP/s of one device
    hbm_bytes: float  # memory of one device
    hbm_bandwidth: float  # bytes/s between a device and its memory
    # bytes/s that one chip can send along one torus axis, both directions together: all-gathers
    # and reductions on a ring run at this rate. For a GPU: bytes/s it can send over NVLink.
    ici_bandwidth: float
    torus_axes: int  # torus dimensions of the interconnect; 0 for a switch
    clock: float  # Hz
    devices_per_chip: int
    kinds: tuple[str, ...]  # what `device.device_kind` says


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * _GIB, 1228e9, 100e9, 3, 1.05e9, 1, ("TPU v4",)),
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 100e9, 2, 1.5e9, 1, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 200e9, 3, 1.75e9, 1, ("TPU v5", "TPU v5p")),
        Chip("v6e", 918e12, 32 * _GIB, 1638e9, 200e9, 2, 1.75e9, 1, ("TPU v6 lite", "TPU v6e")),
        Chip("tpu7x", 1153.5e12, 96 * _GIB, 3690e9, 200e9, 3, 2.2e9, 2, ("TPU7x", "TPU v7x")),
        # PCIe boards of the A100 have the same arithmetic, a little less bandwidth, rarely NVLink.
        Chip("a100-40", 312e12, 40e9, 1555e9, 300e9, 0, 1.41e9, 1,
             ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
        Chip("a100-80", 312e12, 80e9, 2039e9, 300e9, 0, 1.41e9, 1,
             ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
        Chip("h100", 989.4e12, 80e9, 3350e9, 450e9, 0, 1.83e9, 1, ("NVIDIA H100 80GB HBM3",)),
        Chip("h200", 989.4e12, 141e9, 4800e9, 450e9, 0, 1.83e9, 1, ("NVIDIA H200",)),
        Chip("b200", 2250e12, 180e9, 7700e9, 900e9, 0, 1.85e9, 1, ("NVIDIA B200",)),
    )
}  # fmt: skip

_CHIP_OF_KIND = {kind.lower(): chip for chip in CHIPS.values() for kind in chip.kinds}


def has_tpu() -> bool:
    """Whether this machine shows the device files of a TPU; asks neither JAX nor libtpu."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def chip_for(device: Any) -> Chip | None:
    """Returns the chip of a JAX device, or None for a kind the table does not know (and for CPU).

    Kinds match exactly: a slice of a GPU ("NVIDIA H200 MIG 1g.18gb") or a slower board of the same
    family must not be credited with the whole chip's peak.
    """
    kind = re.sub(r"\s+", " ", str(getattr(device, "device_kind", ""))).strip().lower()
    chip = _CHIP_OF_KIND.get(kind)
    if chip is not None and chip.name == "v4" and getattr(device, "num_cores", 2) == 1:
        # A v4 topology made without megacore shows each core as a device of its own.
        return replace(
            chip,
            flops_bf16=chip.flops_bf16 / 2,
            hbm_bytes=chip.hbm_bytes / 2,
            hbm_bandwidth=chip.hbm_bandwidth / 2,
            devices_per_chip=2,
        )
    return chip


def peak_flops(
    devices: Sequence[Any], cpu_seconds: float = 0.0, cpu_dtype: str = "bfloat16"
) -> float | None:
    """Returns the bfloat16 peak of `devices` together in FLOP/s, or None where it is not known.

    CPU devices have no datasheet: with `cpu_seconds` > 0 their matmul rate in `cpu_dtype` (the
    run's compute dtype) is measured for about that long. Fake CPU devices share one machine, so
    the measured rate counts once, not per device.
    """
    chips = [chip_for(device) for device in devices]
    if chips and all(chip is not None for chip in chips):
        return sum(chip.flops_bf16 for chip in chips if chip is not None)
    if devices and cpu_seconds > 0 and all(d.platform == "cpu" for d in devices):
        hosts = len({device.process_index for device in devices})
        return hosts * measured_cpu_flops(cpu_seconds, cpu_dtype)
    return None


def measured_cpu_flops(seconds: float = 0.5, dtype: str = "bfloat16", size: int = 768) -> float:
    """Returns the best matmul rate of this machine's CPU in FLOP/s, measured for about `seconds`.

    A square matmul of `size` in `dtype` (the compute dtype of the run), timed after compilation;
    the best of several runs, because on a shared machine every disturbance only adds time. An MFU
    taken against it reads "share of what this machine's matmuls reach", not of a datasheet.
    """
    import jax
    import numpy as np

    cpu = jax.local_devices(backend="cpu")[0]
    rows = np.arange(size * size, dtype=np.float32).reshape(size, size) % 7 - 3
    a_DD = jax.device_put(rows.astype(jax.numpy.dtype(dtype)), cpu)
    matmul = jax.jit(lambda x_DD, y_DD: x_DD @ y_DD)
    best, deadline, left = math.inf, math.inf, 6  # at least five, however slow the first ones are
    with jax.set_mesh(jax.sharding.Mesh([cpu], ("cpu",))):  # the caller's mesh has more devices
        while left > 0 or time.perf_counter() < deadline:
            left -= 1
            start = time.perf_counter()
            matmul(a_DD, a_DD).block_until_ready()
            if deadline == math.inf:  # the first run compiled
                deadline = time.perf_counter() + seconds
            else:
                best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
