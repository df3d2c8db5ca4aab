"""What the journal makes of a step's metrics."""

import jax
import jax.numpy as jnp

from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from tests.tiny import get_config
from trainer.data.dataset import open_dataset
from trainer.journal import Journal
from trainer.metrics import read_metrics


def test_skipped_steps_are_those_since_the_last_record(tmp_path):
    experiment = get_config()
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with Journal(experiment, str(tmp_path), mesh, open_dataset(experiment.data), 5, 2) as journal:
        for step, total in ((6, 2), (7, 3), (8, 3), (9, 6)):
            names = ("loss", "grad_norm", "learning_rate", "tokens")
            metrics = dict.fromkeys(names, jnp.ones(())) | {"skipped": jnp.asarray(total)}
            journal.step(step, metrics)
    assert [r["skipped_steps"] for r in read_metrics(tmp_path, "train")] == [0, 1, 0, 3]
