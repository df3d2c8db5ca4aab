"""The chip table, the way from a device to it, and the measured rate of a CPU."""

from dataclasses import dataclass

import jax
import pytest

from sharding.hardware import CHIPS, chip_for, peak_flops


@dataclass
class Device:
    """As much of a JAX device as the table looks at."""

    device_kind: str
    num_cores: int = 2
    platform: str = "tpu"
    process_index: int = 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_known_kinds(kind, name):
    assert chip_for(Device(kind)) is CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H200 MIG 1g.18gb", "NVIDIA H100 PCIe", ""])
def test_other_kinds_are_not_guessed(kind):
    assert chip_for(Device(kind)) is None


def test_v4_without_megacore_is_half_a_chip():
    half = chip_for(Device("TPU v4", num_cores=1))
    assert half.flops_bf16 * 2 == CHIPS["v4"].flops_bf16
    assert half.devices_per_chip == 2


def test_every_kind_belongs_to_one_chip():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_figures_are_in_base_units():
    for chip in CHIPS.values():
        assert 1e14 < chip.flops_bf16 < 1e16, chip.name
        assert 1e10 < chip.hbm_bytes < 1e12, chip.name
        assert 5e11 < chip.hbm_bandwidth < 1e13, chip.name
        assert 5e10 < chip.ici_bandwidth < 1e12, chip.name
        # Below this ratio of arithmetic to bandwidth no accelerator of the table lies.
        assert 100 < chip.flops_bf16 / chip.hbm_bandwidth < 1000, chip.name


# The vendors' own figures per chip: dense bfloat16 TFLOP/s, memory in GB (TPU: GiB), GB/s of memory
# and GB/s sent over all links of the chip (v5e: 1,600 Gb/s over two torus axes). The page of tpu7x
# counts both directions (1,200 GB/s bidirectional), as NVIDIA does for NVLink.
DATASHEETS = {
    "v4": (275, 32, 1228, 300), "v5e": (197, 16, 819, 200), "v5p": (459, 95, 2765, 600),
    "v6e": (918, 32, 1638, 400), "tpu7x": (2307, 192, 7380, 600),
    "a100-40": (312, 40, 1555, 300), "a100-80": (312, 80, 2039, 300),
    "h100": (989.4, 80, 3350, 450), "h200": (989.4, 141, 4800, 450), "b200": (2250, 180, 7700, 900),
}  # fmt: skip


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_those_of_the_datasheets(name):
    flops, memory, bandwidth, links = DATASHEETS[name]
    chip = CHIPS[name]
    unit = 2**30 if chip.torus_axes else 1e9
    assert chip.devices_per_chip * chip.flops_bf16 == flops * 1e12
    assert chip.devices_per_chip * chip.hbm_bytes == memory * unit
    assert chip.devices_per_chip * chip.hbm_bandwidth == bandwidth * 1e9
    assert max(chip.torus_axes, 1) * chip.ici_bandwidth == pytest.approx(links * 1e9)


def test_peak_of_several_devices():
    assert peak_flops([Device("TPU v5 lite")] * 4) == 4 * 197e12
    assert peak_flops([Device("TPU v5 lite"), Device("something new")]) is None
    assert peak_flops([]) is None


def test_cpu_has_no_peak():
    assert peak_flops(jax.devices()) is None
