"""The runtime's settings, and what becomes of them where JAX is another."""

import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src import cache_key

from sharding import runtime
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


def _two(key, devices):
    key.update(b"as JAX does it")


def _three(key, devices, more):
    raise AssertionError("never called")


@pytest.mark.parametrize(
    "private",
    [
        SimpleNamespace(),  # renamed
        SimpleNamespace(_hash_accelerator_config=_three),  # other parameters
        SimpleNamespace(_hash_accelerator_config=None),
        None,  # no such module
    ],
)
def test_a_jax_without_the_private_name_only_compiles_more(monkeypatch, private):
    if private is None:
        monkeypatch.delattr(jax._src, "cache_key")
        monkeypatch.setitem(sys.modules, "jax._src.cache_key", None)
    else:
        monkeypatch.setattr(jax._src, "cache_key", private)
    before = dict(vars(private)) if private else {}
    runtime._share_compiled()
    assert (dict(vars(private)) if private else {}) == before


def test_only_the_key_of_cpus_is_changed(monkeypatch):
    private = SimpleNamespace(_hash_accelerator_config=_two)
    monkeypatch.setattr(jax._src, "cache_key", private)
    runtime._share_compiled()
    keys = {}
    for platform in ("cpu", "tpu"):
        found = []
        devices = np.array([SimpleNamespace(platform=platform)])
        private._hash_accelerator_config(SimpleNamespace(update=found.append), devices)
        keys[platform] = found
    assert keys["tpu"] == [b"as JAX does it"] != keys["cpu"]


def test_this_jax_has_the_private_name(monkeypatch):
    """Else every process of a CPU job compiles for itself: a reason to look, and no more."""
    before = cache_key._hash_accelerator_config
    monkeypatch.setattr(cache_key, "_hash_accelerator_config", before)
    runtime._share_compiled()
    assert cache_key._hash_accelerator_config is not before
