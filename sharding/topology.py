"""Named TPU slices and hosts of GPUs, and the devices of a slice that is not there.

`parse_slice` reads the names that a cloud sells slices under and needs neither JAX nor libtpu;
`slice_devices` asks libtpu to describe the slice, with the wraparound links it really has (without
them XLA spells gathers in ways that cost twice the bytes). The devices can be compiled for, with
`sharding.mesh.make_mesh`, and never run on.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sharding.errors import UsageError, install_hint, nearest
from sharding.hardware import CHIPS, has_tpu

_GIB = 2.0**30
GPUS = tuple(name for name, chip in CHIPS.items() if chip.torus_axes == 0)
HOST = 8  # GPUs of a host, joined by NVLink: NVIDIA's HGX and DGX boards
NETWORK = 50e9  # bytes/s that one GPU sends to other hosts: 400 Gb/s of InfiniBand or RoCE


@dataclass(frozen=True)
class Family:
    """A TPU generation as a cloud sells it.

    cores: what the number in a slice name counts per chip; v4, v5p and tpu7x count TensorCores.
    compiler_bytes: memory of one device that the compiler lets a program use, read from its own
        refusals (libtpu 0.0.42 and 0.0.51); the rest of the chip's memory is the runtime's.
    """

    shapes: tuple[tuple[int, ...], ...]  # chips along each torus dimension, smallest slice first
    cores: int
    compiler_bytes: float
    options: tuple[tuple[str, Any], ...] = ()


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8),
    (8, 8, 16), (8, 16, 16),
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    # Without megacore each core of a v4 chip would be a device of its own.
    "v4": Family(_CUBES, 2, 30.75 * _GIB, (("chip_config_name", "megacore"),)),
    "v5e": Family(_FLAT, 1, 15.75 * _GIB),
    "v5p": Family((*_CUBES, (16, 16, 16)), 2, 95.73 * _GIB),
    "v6e": Family(_FLAT, 1, 31.24 * _GIB),
    "tpu7x": Family((*_CUBES, (16, 16, 16)), 2, 94.74 * _GIB),
}


@dataclass(frozen=True)
class Slice:
    """One or more equal TPU slices, joined by the data-centre network; or hosts of GPUs."""

    chip: str  # a key of CHIPS; of FAMILIES too for a TPU
    shape: tuple[int, ...]  # chips along each torus dimension of one slice; (GPUs of a host,)
    count: int = 1
    network: float = NETWORK  # bytes/s between hosts, of one GPU

    @property
    def gpu(self) -> bool:
        return self.chip in GPUS

    @property
    def name(self) -> str:
        """The name that `parse_slice` reads: `v5e-256`, `2xv5e-256`, `v5p:4x4x12`, `4x8xH200`."""
        prefix = f"{self.count}x" if self.count > 1 else ""
        if self.gpu:
            return f"{prefix}{self.shape[0]}x{self.chip.upper()}"
        if self.shape in FAMILIES[self.chip].shapes:
            return f"{prefix}{self.chip}-{_number(self.chip, self.shape)}"
        return f"{prefix}{self.chip}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return self.count * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many devices JAX shows."""
        return self.chips * CHIPS[self.chip].devices_per_chip

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Which torus dimensions close to a ring.

        v4, v5p and tpu7x close all three in slices made of whole 4x4x4 cubes, and none in smaller
        ones; v5e and v6e close the dimensions that are 16 long, the whole side of their pod.
        """
        if len(self.shape) == 2:
            return (self.shape[0] == 16, self.shape[1] == 16, False)
        return (all(size % 4 == 0 for size in self.shape),) * 3


def parse_slice(name: str) -> Slice:
    """Reads `CHIP-NUMBER`, `CHIP:AxB[xC]`, or either after `COUNTx` for several slices.

    GPUs are `COUNTxGPU` of one host, or that after `HOSTSx`; `a100` is the one of 80 GB.

    Raises:
      UsageError: an unknown chip, or a size that the chip is not sold in.
    """
    pattern = r"(?:(\d+)x)?(?:(\d+)x)?([a-z][a-z0-9]*)(?:-(\d+)(?:gb)?|:(\d+(?:x\d+)*))?"
    match = re.fullmatch(pattern, name.strip().lower())
    count, inner, chip, number, layout = match.groups() if match else (None, None, name, None, None)
    chip = {"v5litepod": "v5e", "v7x": "tpu7x"}.get(chip, chip)
    gpu = f"{chip}-{number}" if number else {"a100": "a100-80"}.get(chip, chip)
    if gpu in GPUS:
        hosts, gpus = (int(count), int(inner)) if inner else (1, int(count or 0))
        if layout or not hosts or not 1 <= gpus <= HOST:
            host = f"{HOST}x{gpu.upper()}"
            raise UsageError(
                f"no GPUs {name!r}: a host has 1 to {HOST}, as {host}; two are 2x{host}"
            )
        return Slice(gpu, (gpus,), hosts)
    if chip not in FAMILIES or inner:
        raise UsageError(
            f"no TPU slice {name!r}: a chip of {', '.join(FAMILIES)}, then - and a size, as "
            f"v5e-256; nor GPUs: a count, then x and one of {', '.join(GPUS)}, as 8xH200"
            f"{nearest(chip.partition('-')[0], (*FAMILIES, *GPUS, 'a100'))}"
        )
    family = FAMILIES[chip]
    by_number = {_number(chip, shape): shape for shape in family.shapes}
    sizes = ", ".join(f"{chip}-{n}" for n in by_number)
    dimensions = len(family.shapes[0])
    if count == "0" or (number is None and layout is None):
        raise UsageError(f"no TPU slice {name!r}; {chip} comes as {sizes}")
    if layout is not None:
        shape = tuple(int(size) for size in layout.split("x"))
        if len(shape) != dimensions or min(shape) < 1:
            example = "x".join(map(str, family.shapes[3]))
            raise UsageError(
                f"no TPU slice {name!r}: {chip} has {dimensions} torus dimensions, as "
                f"{chip}:{example}"
            )
        return Slice(chip, shape, int(count or 1))
    if int(number) not in by_number:
        close = min(by_number, key=lambda n: abs(math.log(n / max(int(number), 1))))
        counts = "TensorCores" if family.cores > 1 else "chips"
        example = "x".join("4" * dimensions)
        raise UsageError(
            f"no TPU slice {name!r}; did you mean `{chip}-{close}`? The number counts {counts}: "
            f"{sizes}; any other shape is written {chip}:{example}"
        )
    return Slice(chip, by_number[int(number)], int(count or 1))


def _number(chip: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * FAMILIES[chip].cores


def program_bytes(chip: str) -> float:
    """Returns the bytes of one device that a program may use; of a GPU what JAX takes at once.

    Raises:
      UsageError: XLA_CLIENT_MEM_FRACTION is no share.
    """
    if chip in FAMILIES:
        return FAMILIES[chip].compiler_bytes
    share = os.environ.get("XLA_CLIENT_MEM_FRACTION") or "0.75"  # JAX's default
    if not re.fullmatch(r"0?\.\d*[1-9]\d*|1(\.0*)?", share):
        raise UsageError(f"XLA_CLIENT_MEM_FRACTION={share}: a share of the GPU's memory, as 0.9")
    return float(share) * CHIPS[chip].hbm_bytes


def require_libtpu() -> None:
    """Raises UsageError, naming the extra to install, where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "compiling for a TPU that is not there needs its compiler, the package libtpu: "
            + install_hint("aot")
        )


def compiler_environment() -> dict[str, str]:
    """Returns the environment of a process that compiles for TPUs; set it before JAX is imported.

    JAX itself stays on CPU. On a machine without a TPU several such processes may load libtpu
    at once; on one with a TPU its lock stands, because it protects the devices.
    """
    environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    if not has_tpu():
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    return environment


def slice_devices(target: Slice) -> Sequence[Any]:
    """Returns the devices of `target`, with their places in the torus, without any TPU.

    Call it in a process that was started with `compiler_environment()`.

    Raises:
      UsageError: libtpu is missing, or knows no such slice.
    """
    require_libtpu()
    import jax
    from jax.experimental import topologies

    options = {"wrap": target.wrap, **dict(FAMILIES[target.chip].options)}
    if target.count > 1:
        options["num_slices"] = target.count
    if math.prod(target.shape) == 1:  # libtpu expects hosts of 2 x 2 chips unless told
        options["chips_per_host_bounds"] = (1, 1, 1)
    layout = "x".join(map(str, target.shape))
    try:
        return topologies.get_topology_desc(
            f"{target.chip}:{layout}", platform="tpu", **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"libtpu cannot describe {target.name}: {reason}") from error
