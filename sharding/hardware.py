"""What the chips can do: peak arithmetic, memory and links, per device as JAX counts devices.

Owns the numbers that MFU, the planner and `torus doctor` divide by, and the way from a JAX device
to them. Figures are the vendors' own, dense (no sparsity): for TPU the system-architecture pages at
cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), for NVIDIA the A100, H100, H200 and HGX B200
datasheets (SXM boards). Clocks are those at which the peak is quoted; NVIDIA's and those of v6e and
tpu7x follow from peak FLOP/s and the size of the matrix units. Nothing here imports JAX.
"""

import glob
import re
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


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Returns the bfloat16 peak of `devices` together in FLOP/s, or None where it is not known.

    Of CPUs it never is: they have no such datasheet, and the rate of a shared machine changes too
    much from one second to the next to be measured once.
    """
    chips = [chip_for(device) for device in devices]
    if chips and all(chip is not None for chip in chips):
        return sum(chip.flops_bf16 for chip in chips if chip is not None)
    return None
