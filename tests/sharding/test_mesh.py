"""Processes of one job and the compilation cache that they share."""

from tests.processes import run_processes

_CODE = """
import os
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from sharding.runtime import start_runtime

os.environ["TORUS_CACHE"] = sys.argv[1]
start_runtime()
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name.rpartition("/")[2]))
with jax.set_mesh(jax.make_mesh((4,), ("data",))):
    rows = NamedSharding(jax.sharding.get_mesh(), PartitionSpec("data"))
    x = jax.make_array_from_callback((8,), rows, lambda index: np.arange(8.0)[index])
    found.clear()
    total = float(jax.jit(lambda x: (2 * x).sum())(x))
print(found.count("cache_hits"), found.count("cache_misses"), total)
"""


def test_all_processes_find_what_the_first_one_compiled(tmp_path):
    first, again = (
        [job.stdout.splitlines()[-1] for job in run_processes(_CODE, 2, 2, [tmp_path])]
        for _ in range(2)
    )
    assert first[0] == "0 1 56.0"
    assert again == ["1 0 56.0"] * 2
