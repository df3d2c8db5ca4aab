"""Devices that lie are named; the trial before a start finds each kind of fault."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from trainer import integrity
from trainer.integrity import Odd, device_sums, odd_repeats, odd_replicas, replicated, self_check
from trainer.recovery.health import Unhealthy


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=4, fsdp=2))


def broken(array: jax.Array, victim: int, word: int, bit: int) -> jax.Array:
    """The array, with one bit flipped in the shard that one device holds."""
    shards = [shard.data for shard in array.addressable_shards]
    hurt = np.array(shards[victim])
    hurt.view(np.uint32).reshape(-1)[word] ^= np.uint32(1 << bit)
    shards[victim] = jax.device_put(hurt, shards[victim].device)
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def arrays(mesh):
    key = jax.random.key(0)
    return {
        "sharded": jax.device_put(jax.random.normal(key, (8, 6)), NamedSharding(mesh, P("fsdp"))),
        "whole": jax.device_put(jax.random.normal(key, (5,)), NamedSharding(mesh, P())),
        "pieces": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P(("data", "fsdp")))),
    }


@pytest.mark.parametrize("victim", range(8))
def test_any_bit_on_any_device_is_found(mesh, victim):
    rng = np.random.default_rng(victim)
    tree = arrays(mesh)
    shared = replicated(tree)
    assert list(shared) == ["sharded", "whole"]
    specs = {name: array.sharding.spec for name, array in shared.items()}
    with jax.set_mesh(mesh):
        calm = np.asarray(device_sums(list(shared.values())))
        assert calm.shape == (4, 2, 1, 1, 2) and odd_replicas(calm, specs, mesh) is None
        for name in shared:
            word, bit = int(rng.integers(5)), int(rng.integers(32))
            hurt = shared | {name: broken(shared[name], victim, word, bit)}
            odd = odd_replicas(np.asarray(device_sums(list(hurt.values()))), specs, mesh)
            device = shared[name].addressable_shards[victim].device
            assert odd.devices == (device,) and odd.certain and name in str(odd)
            assert f"device {device.id} of process 0" in str(odd)
            assert "cannot be told" not in str(odd)


def test_of_two_copies_both_are_named(mesh):
    sums = np.zeros((2, 4, 1, 1, 1), np.uint32)
    pair = make_mesh(MeshConfig(data=2, fsdp=4))
    sums[1, 2] = 1
    odd = odd_replicas(sums, {"w": P("fsdp")}, pair)
    assert set(odd.devices) == {pair.devices[0, 2, 0, 0], pair.devices[1, 2, 0, 0]}
    assert not odd.certain and "cannot be told" in str(odd)


def test_repeats(mesh):
    once = np.arange(8, dtype=np.uint32).reshape(4, 2, 1, 1, 1)
    assert odd_repeats(once, once.copy(), mesh) is None
    again = once.copy()
    again[2, 1] ^= 1
    odd = odd_repeats(once, again, mesh)
    assert odd.devices == (mesh.devices[2, 1, 0, 0],) and odd.certain


def test_only_the_process_with_the_odd_device_is_suspect():
    """The scheduler leaves out the host that ends with 77, and no other."""
    here, there = (SimpleNamespace(id=n, process_index=n) for n in (0, 1))
    assert Odd((here,), True, "x").status == Odd((here, there), False, "x").status == 77
    assert Odd((there,), True, "x").status == 1


def test_sound_devices_pass(mesh, tmp_path):
    self_check(mesh, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_wrong_products_and_wrong_bytes_are_named(mesh, tmp_path, monkeypatch):
    right = np.zeros((4, 2, 1, 1, 5), np.uint32)
    for place, match in (
        ((3, 0, 0, 0, 0), "device 6 of process 0: a matrix product differs"),
        ((1, 1, 0, 0, 2), "device 3 of process 0: wrong bytes arrive along mesh axis fsdp"),
    ):
        wrong = right.copy()
        wrong[place] = 1
        monkeypatch.setattr(integrity, "_trial", lambda numbers, wrong=wrong: wrong)
        with pytest.raises(Unhealthy, match=match) as caught:
            self_check(mesh, tmp_path)
        assert caught.value.status == 77


def test_collectives_are_really_tried(mesh, monkeypatch):
    """The trial itself sees bytes that come from elsewhere."""
    true_gather = jax.lax.all_gather

    def crossed(x, axis, **named):
        found = true_gather(x, axis, **named)
        return found[::-1] if axis == "data" else found

    monkeypatch.setattr(jax.lax, "all_gather", crossed)
    integrity._trial.clear_cache()
    try:
        assert "along mesh axis data" in str(integrity.device_problem(mesh))
    finally:
        integrity._trial.clear_cache()


def test_a_folder_that_cannot_be_written(mesh, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Unhealthy, match=r"self-check: host .*process 0: cannot write and read"):
        self_check(mesh, tmp_path / "file" / "run")
