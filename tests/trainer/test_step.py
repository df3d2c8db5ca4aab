"""One step on many meshes: the same losses, and the bytes per device that the axes promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from models.config import ModelConfig
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from trainer.config import Experiment, OptimizerConfig, TrainConfig
from trainer.state import Layout, TrainState, abstract_state, init_state, make_layout
from trainer.step import make_train_step

STEPS = 20
TOLERANCE = 2e-5  # relative, float32: what reordering the sums of 20 steps may do
ROWS, LENGTH = 16, 32

MODEL = ModelConfig(
    vocab=250,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,  # fewer than the devices of "tensor 4"
    head_dim=16,
    mlp=64,
    max_length=LENGTH,
    dtype="float32",
    remat="none",
)


def experiment(mesh: MeshConfig, accumulation: int = 1) -> Experiment:
    return Experiment(
        model=MODEL,
        mesh=mesh,
        # Adam would blow up the rounding of gradients that are next to nothing, were eps below it.
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=4, eps=1e-6),
        train=TrainConfig(steps=STEPS, batch_size=ROWS, accumulation=accumulation),
    )


def batches(rows: NamedSharding, count: int = STEPS, seed: int = 0):
    """Packed rows with unequal padding, so that a mean of per-device means would show."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens = rng.integers(0, MODEL.vocab, (ROWS, LENGTH + 1))
        segments = np.ones((ROWS, LENGTH), int)
        positions = np.tile(np.arange(LENGTH), (ROWS, 1))
        segments[:, 12:], positions[:, 12:] = 2, positions[:, : LENGTH - 12]
        segments[:5, 20:] = 0
        batch = {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:],
            "positions": positions, "segment_ids": segments,
        }  # fmt: skip
        yield {k: jax.device_put(v.astype(np.int32), rows) for k, v in batch.items()}


def first_state(exp: Experiment) -> TrainState:
    """The state before the first step, made on one device, as arrays of NumPy."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_state(exp, make_layout(exp, mesh))
    return jax.tree.map(np.asarray, state)


def placed(state: TrainState, exp: Experiment, layout: Layout) -> TrainState:
    """Puts a state on a mesh, which takes a tenth of the time of compiling its start there."""
    return jax.device_put(state, jax.tree.map(lambda a: a.sharding, abstract_state(exp, layout)))


@functools.cache
def start() -> TrainState:
    return first_state(experiment(MeshConfig()))


def run(mesh_config: MeshConfig, devices: int, accumulation: int = 1):
    exp = experiment(mesh_config, accumulation)
    mesh = make_mesh(exp.mesh, jax.devices()[:devices])
    layout = make_layout(exp, mesh)
    rows = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))
    with jax.set_mesh(mesh):
        state = placed(start(), exp, layout)
        step = jax.jit(make_train_step(exp, layout), donate_argnums=0)
        losses = []
        for batch in batches(rows):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return run(MeshConfig(fsdp=1), 1)[0]


MESHES = {
    "data 8": (MeshConfig(data=8, fsdp=1), 8, 1),
    "fsdp 8": (MeshConfig(fsdp=8), 8, 1),
    "tensor 4": (MeshConfig(fsdp=1, tensor=4), 4, 1),
    "seq 4": (MeshConfig(fsdp=1, seq=4), 4, 1),
    "data 2 fsdp 2 tensor 2": (MeshConfig(data=2, fsdp=2, tensor=2), 8, 1),
    "zero 1": (MeshConfig(fsdp=8, zero=1), 8, 1),
    "zero 2": (MeshConfig(fsdp=8, zero=2), 8, 1),
    "accumulation 4": (MeshConfig(data=2, fsdp=2), 4, 4),
    "all axes": (MeshConfig(fsdp=2, seq=2, tensor=2, zero=2), 8, 2),
}


@pytest.mark.parametrize("name", MESHES)
def test_losses_do_not_depend_on_the_mesh(name, reference):
    losses, state = run(*MESHES[name])
    np.testing.assert_allclose(losses, reference, rtol=TOLERANCE)
    check_bytes(state, MESHES[name][0], MESHES[name][1])


def test_a_state_begins_with_the_same_bits_on_every_mesh():
    exp = experiment(MESHES["all axes"][0])
    mesh = make_mesh(exp.mesh)
    with jax.set_mesh(mesh):
        state = init_state(exp, make_layout(exp, mesh))
    jax.tree.map(np.testing.assert_array_equal, state, start())


def check_bytes(state, mesh_config: MeshConfig, devices: int):
    """Moments live on their parameters' shards over fsdp and tensor, whatever the ZeRO stage."""
    sizes = mesh_config.sizes(devices)
    weight = state.params["layers"]["mlp"]["up"]
    total = weight.size * 4
    moment_share = total // (sizes["fsdp"] * sizes["tensor"])
    param_share = total // (sizes["tensor"] * (sizes["fsdp"] if mesh_config.zero == 3 else 1))
    adam = state.opt_state[0]
    for moment in (adam.mu, adam.nu):
        held = [s.data.nbytes for s in moment["layers"]["mlp"]["up"].addressable_shards]
        assert held == [moment_share] * devices
    assert [s.data.nbytes for s in weight.addressable_shards] == [param_share] * devices


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3, 1e3])
def test_a_step_clips_and_takes_the_rate_of_its_schedule(clip_norm):
    """After one step Adam's moments tell the gradient that it got, and the parameters the rate."""
    exp = experiment(MeshConfig(fsdp=2))
    exp.optimizer = OptimizerConfig(peak_lr=1e-2, warmup_steps=4, clip_norm=clip_norm, eps=1e-20)
    mesh = make_mesh(exp.mesh, jax.devices()[:2])
    layout = make_layout(exp, mesh)
    rows = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))
    with jax.set_mesh(mesh):
        before = placed(start(), exp, layout)
        after, metrics = jax.jit(make_train_step(exp, layout))(before, next(batches(rows)))
    norm, moments = float(metrics["grad_norm"]), jax.tree.map(np.asarray, after.opt_state[0])
    squares = sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(
        moments.mu))  # fmt: skip
    clipped = np.sqrt(squares) / (1 - exp.optimizer.b1)
    assert norm > 0.1 and clipped == pytest.approx(min(norm, clip_norm or norm), rel=1e-5)
    # The first of four warm-up steps. Adam's first direction is the gradient's sign; norms never
    # decay.
    assert float(metrics["learning_rate"]) == pytest.approx(2.5e-3, rel=1e-6)
    moved = np.abs(np.asarray(after.params["final_norm"]["scale"]) - 1.0)
    np.testing.assert_allclose(moved, 2.5e-3, rtol=1e-3)


def test_a_non_finite_step_changes_nothing_and_is_counted():
    exp = experiment(MeshConfig(fsdp=2, tensor=2))
    mesh = make_mesh(exp.mesh, jax.devices()[:4])
    layout = make_layout(exp, mesh)
    rows = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))
    with jax.set_mesh(mesh):
        state = placed(start(), exp, layout)
        scale = state.params["final_norm"]["scale"] * jnp.nan
        poisoned = state.params | {"final_norm": {"scale": scale}}
        state = dataclasses.replace(state, params=poisoned)
        step = jax.jit(make_train_step(exp, layout))
        after, metrics = step(state, next(batches(rows)))
    assert int(metrics["skipped"]) == int(after.skipped) == 1
    assert int(after.step) == 1
    unchanged = (state.params, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), unchanged)


def test_bfloat16_follows_float32(reference):
    exp = experiment(MeshConfig(fsdp=1))
    exp.model = dataclasses.replace(MODEL, dtype="bfloat16", remat="full")
    mesh = make_mesh(exp.mesh, jax.devices()[:1])
    rows = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))
    with jax.set_mesh(mesh):
        layout = make_layout(exp, mesh)
        state = placed(start(), exp, layout)
        step = jax.jit(make_train_step(exp, layout))
        low = []
        for batch in batches(rows, 5):
            state, metrics = step(state, batch)
            low.append(float(metrics["loss"]))
    # bfloat16 keeps 8 bits: 2^-8 of each activation, averaged over a thousand tokens.
    np.testing.assert_allclose(low, reference[:5], rtol=5e-3)
