"""Evaluation: by microbatches as training, and of text without loss."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from tests.tiny import get_config
from trainer.data.config import FIELDS
from trainer.evaluate import evaluate
from trainer.plan.compile import abstract_batch
from trainer.state import abstract_state, init_state, make_layout
from trainer.step import make_eval_step


class Text:
    """Rows of random tokens, of which a share carries loss."""

    fields = FIELDS
    seq_len = 32
    rows_per_epoch = 50

    def __init__(self, share: float) -> None:
        self._share = share

    def bytes_per_token(self, row: int = 0) -> None:
        return None

    def rows(self, ids: np.ndarray, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        random = np.random.default_rng(int(ids[0]) if len(ids) else 0)
        tokens = random.integers(0, 256, (len(ids), self.seq_len), np.int32)
        targets = np.where(random.random(tokens.shape) < self._share, tokens, -1)
        places = np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), tokens.shape)
        rows = {"tokens": tokens, "targets": targets.astype(np.int32), "positions": places,
                "segment_ids": np.ones_like(tokens)}  # fmt: skip
        return {name: array[:, columns] for name, array in rows.items()}


def parts(accumulation: int, batch_size: int = 32):
    experiment = get_config()
    experiment.train.batch_size, experiment.train.accumulation = batch_size, accumulation
    mesh = make_mesh(experiment.mesh)
    return experiment, mesh, make_layout(experiment, mesh)


def evaluated(accumulation: int, share: float = 0.5, **more) -> dict:
    experiment, mesh, layout = parts(accumulation)
    with jax.set_mesh(mesh):
        step = jax.jit(make_eval_step(experiment))
        rows = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))
        params = init_state(experiment, layout).params
        return evaluate(step, params, Text(share), 32, rows, **more)


def test_microbatches_change_memory_and_not_the_result():
    at_once, in_turn = evaluated(1), evaluated(4)
    assert in_turn["tokens"] == at_once["tokens"] > 0
    # The same sums in another order, in float32.
    assert in_turn["loss"] == pytest.approx(at_once["loss"], rel=1e-6)

    def temporary(accumulation: int) -> int:
        experiment, mesh, layout = parts(accumulation, batch_size=512)
        with jax.set_mesh(mesh):
            params = abstract_state(experiment, layout).params
            lowered = jax.jit(make_eval_step(experiment)).lower(
                params, abstract_batch(experiment, mesh)
            )
            return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 3


def test_text_without_loss_has_none():
    phases = []
    found = evaluated(1, share=0.0, compiled=lambda: phases.append("eval"))
    assert found == {"loss": None, "bits_per_byte": None, "tokens": 0}
    assert phases == ["eval"]  # once, after the first of two batches
