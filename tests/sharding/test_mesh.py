"""Where devices go in the mesh: which axes cross the slow network between slices and hosts."""

from types import SimpleNamespace

import numpy as np
import pytest

from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import device_grid
from tests.processes import run_processes


def devices(hosts: int, processes: int, each: int, slices: str = "same") -> list:
    """Returns fake devices of so many hosts, with processes on each, and devices in each of these.

    `slices` says what their slice is: their host's number, as on GPUs, or the same for all; with
    "none" they do not say.
    """
    count = hosts * processes * each
    rows = [
        {"id": n, "platform": "cuda", "device_kind": "NVIDIA H100", "process_index": n // each,
         "slice_index": n // (each * processes) if slices == "host" else 0}
        for n in range(count)
    ]  # fmt: skip
    for row in rows if slices == "none" else ():
        del row["slice_index"]
    return [SimpleNamespace(**row) for row in rows]


def grid(config: MeshConfig, given: list) -> np.ndarray:
    """Returns the devices' numbers, without the axes that have one device."""
    return np.vectorize(lambda device: device.id)(device_grid(config, given)).squeeze()


@pytest.mark.parametrize("slices", ["host", "same", "none"])
def test_a_granule_is_a_host_not_a_process(slices):
    """Two hosts, a process for each of four GPUs: fsdp stays within a host."""
    config = MeshConfig(data=2, fsdp=4, dcn_data=2)
    assert grid(config, devices(2, 4, 1, slices)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("slices", ["host", "same"])
def test_both_slow_axes_and_tensor_within_a_host(slices):
    config = MeshConfig(data=2, fsdp=4, tensor=2, dcn_data=2, dcn_fsdp=2)
    found = grid(config, devices(4, 2, 2, slices))  # axes data, fsdp, tensor
    hosts = found // 4
    assert hosts.tolist() == [
        [[0, 0], [0, 0], [1, 1], [1, 1]], [[2, 2], [2, 2], [3, 3], [3, 3]],
    ]  # fmt: skip
    assert sorted(found.flat) == list(range(16))


def test_the_order_of_devices_does_not_matter():
    config = MeshConfig(data=2, fsdp=4, dcn_data=2)
    given = devices(2, 4, 1, "host")
    hosts = grid(config, given[1::2] + given[::2]) // 4
    assert hosts.tolist() == [[0] * 4, [1] * 4]


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (MeshConfig(data=2, fsdp=4, dcn_data=2), devices(4, 2, 1, "host"),
         "for 2 slices or hosts, there are 4"),
        (MeshConfig(data=2, fsdp=3, dcn_data=2), devices(3, 1, 2), "for 2 hosts; 3 processes"),
        (MeshConfig(data=2, fsdp=2, dcn_data=2), devices(1, 1, 4), "for 2 hosts; 1 processes"),
    ],
)  # fmt: skip
def test_dcn_sizes_that_do_not_fit_are_refused(config, given, message):
    with pytest.raises(UsageError, match=message):
        device_grid(config, given)


_CODE = """
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.runtime import start_runtime

start_runtime()
mesh = make_mesh(MeshConfig(data=2, fsdp=2, dcn_data=2))
rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
x = jax.make_array_from_callback((4,), rows, lambda index: np.arange(4.0)[index])
with jax.set_mesh(mesh):
    total = float(jax.jit(lambda x: (2 * x).sum())(x))
print([d.process_index for d in mesh.devices.flat], total)
"""


@pytest.mark.soak
@pytest.mark.multiprocess
def test_four_processes_on_two_hosts_make_one_mesh():
    for job in run_processes(_CODE, 4, 1, []):
        assert job.stdout.splitlines()[-1] == "[0, 1, 2, 3] 12.0"
