"""Sequence parallelism: every strategy gives the loss and the gradients of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models import spec
from models.attention import sequence
from models.config import ModelConfig
from models.decoder import param_specs
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from trainer.config import Experiment, OptimizerConfig, TrainConfig
from trainer.step import loss_sums

# float32; as a part of the largest gradient. Another order of the same sums.
TOLERANCE = 2e-5
B, T = 2, 64
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

MODEL = ModelConfig(
    vocab=61, layers=2, width=32, heads=8, kv_heads=8, head_dim=8, mlp=32, max_length=T,
    dtype="float32", remat="full", pad_vocab_to=64, attention="blockwise",
)  # fmt: skip
LOCAL = {"pattern": ("local",), "window": 11}
CASES = {
    "causal": {},
    "window": LOCAL,
    "packed": {},
    "softcap": {"attention_softcap": 1.0},
    "gqa 8 to 1": {"kv_heads": 1},
    "packed gqa softcap window": {"kv_heads": 2, "attention_softcap": 1.0, **LOCAL},
}
STRATEGIES = {
    "gather": {},
    "ulysses": {},
    "ring contiguous": {"seq_order": "contiguous"},
    "ring zigzag": {"seq_order": "zigzag"},
    "ring striped": {"seq_order": "striped"},
    "bidirectional": {},
    "bidirectional contiguous": {"seq_order": "contiguous"},
    "hybrid": {},
    "hybrid striped": {"seq_order": "striped", "seq_head_devices": 4},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several tiles to a block, so that some are skipped and some are not."""
    monkeypatch.setattr(sequence, "PIECE", 3)


def model(case: str, strategy: str | None = None) -> ModelConfig:
    config = dataclasses.replace(MODEL, **CASES[case])
    if strategy is None:
        return config
    return dataclasses.replace(
        config, seq_strategy=strategy.split()[0], **STRATEGIES[strategy]
    )


def batch(packed: bool) -> dict[str, np.ndarray]:
    """Rows of one document each, or of several and padding."""
    lengths = [(5, 30, 3, 17), (41, 2, 21)] if packed else [(T,), (T,)]
    segments_BT, positions_BT = np.zeros((2, B, T), np.int32)
    for b, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, 1):
            segments_BT[b, start : start + length] = number
            positions_BT[b, start : start + length] = range(length)
            start += length
    tokens_BT, targets_BT = np.random.default_rng(0).integers(0, 61, (2, B, T), dtype=np.int32)
    return dict(
        tokens=tokens_BT, targets=targets_BT, positions=positions_BT, segment_ids=segments_BT
    )


def loss_and_gradient(config: ModelConfig, mesh: MeshConfig, devices: int, packed: bool):
    mesh = make_mesh(mesh, jax.devices()[:devices])
    rng = np.random.default_rng(0)
    params = spec.map_specs(
        lambda _, s: s.fill + (s.std or 0.1) * rng.normal(size=s.shape).astype(np.float32),
        param_specs(config),
    )
    columns = {
        name: jax.device_put(a, NamedSharding(mesh, P(BATCH, SEQ)))
        for name, a in batch(packed).items()
    }
    experiment = Experiment(model=config)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, spec.shardings(param_specs(config), mesh))
        step = jit(jax.value_and_grad(lambda p, b: loss_sums(p, b, experiment)[0]))
        return jax.tree.map(np.asarray, step(params, columns))


@functools.cache
def wanted(case: str):
    return loss_and_gradient(model(case), MeshConfig(fsdp=1), 1, "packed" in case)


def check(found, case: str):
    loss, gradients = wanted(case)
    np.testing.assert_allclose(found[0], loss, rtol=TOLERANCE)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, found[1])
        largest = np.abs(gradient).max()
        assert largest > 0, f"{path}: no gradient at all"
        np.testing.assert_allclose(ours, gradient, atol=TOLERANCE * largest, err_msg=str(path))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_those_of_one_device(strategy, case):
    found = loss_and_gradient(
        model(case, strategy), MeshConfig(fsdp=1, seq=8), 8, "packed" in case
    )
    check(found, case)
