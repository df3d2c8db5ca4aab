"""What the journal makes of a step's metrics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.flops import train_flops, train_flops_per_token
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from tests.tiny import get_config
from trainer import journal as journal_module
from trainer.config import Experiment
from trainer.data.config import DataConfig
from trainer.data.dataset import open_training
from trainer.data.rows import Steps
from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import ByteTokenizer
from trainer.journal import Journal
from trainer.metrics import read_metrics
from trainer.recovery.chaos import Chaos

STEPS, BATCH, LENGTH = 6, 8, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of documents of 2 to 150 tokens."""
    folder = tmp_path_factory.mktemp("data") / "set"
    random = np.random.default_rng(0)
    with DatasetWriter(folder, ByteTokenizer()) as writer:
        for length in random.integers(2, 150, 2000).tolist():
            writer.add("train", random.integers(0, 256, length), length - 1)
    return folder


def run_journal(tmp_path, experiment: Experiment, dataset: Steps, losses, start=0, skipped=None):
    """Returns the train records of steps with these losses."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with Journal(experiment, str(tmp_path), mesh, dataset, start, 0) as journal:
        for step, loss in enumerate(losses, start + 1):
            metrics = dict.fromkeys(("grad_norm", "learning_rate", "tokens"), jnp.ones(()))
            total = skipped[step - start - 1] if skipped else 0
            metrics |= {"loss": jnp.float32(loss), "skipped": jnp.asarray(total)}
            journal.step(step, metrics)
    return read_metrics(tmp_path, "train")


def config_for(folder, **changes) -> Experiment:
    experiment = get_config()
    experiment.data = DataConfig(path=str(folder), seq_len=LENGTH, window=256, **changes)
    experiment.train.steps, experiment.train.batch_size = STEPS, BATCH
    return experiment


def test_skipped_steps_are_those_since_the_last_record(tmp_path, folder):
    experiment = config_for(folder)
    data = open_training(experiment.data, BATCH)
    records = run_journal(tmp_path, experiment, data, [1.0] * 4, start=5, skipped=[0, 1, 1, 4])
    assert [r["skipped_steps"] for r in records] == [0, 1, 0, 3]


def test_mean_loss_is_that_of_the_steps_since_the_last_record(tmp_path, folder):
    """The loss of the step stays beside it, bit for bit; a loss that is not finite counts not."""
    experiment = config_for(folder)
    experiment.log.every = 3
    losses = [5.1, 4.0, 3.1, 6.0, math.nan, 2.0, math.inf, math.nan, math.nan]
    data = open_training(experiment.data, BATCH)
    records = run_journal(tmp_path, experiment, data, losses)
    assert [r["step"] for r in records] == [1, 3, 6, 9]
    of_step = [float(np.float32(value)) for value in (5.1, 3.1, 2.0)]
    assert [r["loss"] for r in records[:3]] == of_step and math.isnan(records[3]["loss"])
    means = [r["mean_loss"] for r in records]
    assert means[0] == of_step[0]
    assert means[1:3] == pytest.approx([(4.0 + 3.1) / 2, (6.0 + 2.0) / 2])
    assert math.isnan(means[3])
    ratio = data.bytes_per_token()
    bits = [mean / math.log(2) / ratio for mean in means[:3]]
    assert [r["bits_per_byte"] for r in records[:3]] == pytest.approx(bits)


def needed_flops(model: ModelConfig, batch: dict[str, np.ndarray]) -> float:
    """Counts multiplications and additions of a batch from its arrays, pair by pair."""
    width, heads = model.width, model.heads * model.head_dim
    kv = model.kv_heads * model.head_dim
    layer = width * heads + 2 * width * kv + heads * width + 3 * width * model.mlp
    weights = model.layers * layer + model.vocab * width
    segments, total = batch["segment_ids"], 0.0
    place = np.arange(segments.shape[1])
    causal = place[:, None] >= place[None, :]
    for row in segments:
        same = (row[:, None] == row[None, :]) & (row > 0)[:, None] & causal
        total += 6 * weights * (row > 0).sum()
        for kind in model.kinds:
            near = place[:, None] - place[None, :] < (model.window if kind == "local" else LENGTH)
            # Scores and values, 2 operations for each number of a head, backward twice the forward.
            total += 3 * 2 * 2 * heads * (same & near).sum()
    return float(total)


@pytest.mark.parametrize("changes", [{}, {"buckets": (32,)}, {"balance": 2}, {"packing": "concat"}])
def test_recorded_mfu_is_that_of_the_documents(tmp_path, folder, monkeypatch, changes):
    """Against a count from the arrays of all batches of the run."""
    experiment = config_for(folder, **changes)
    experiment.model.pattern, experiment.model.window = ("local", "global"), 20
    peak = 1e12
    monkeypatch.setattr(journal_module, "peak_flops", lambda devices: peak)
    data = open_training(experiment.data, BATCH)
    records = run_journal(tmp_path, experiment, data, [1.0] * STEPS)
    expected = []
    for step in range(STEPS):
        rows, first = data.step(step * BATCH, BATCH)
        size = BATCH * LENGTH // rows.seq_len
        expected.append(needed_flops(experiment.model, rows.rows(first + np.arange(size))))
    assert len({*expected}) > 1 and len(records) == STEPS
    for record in records[1:]:
        done = record["mfu"] * peak * record["step_ms"] / 1e3
        assert done == pytest.approx(np.mean(expected), rel=1e-6)
    full = BATCH * LENGTH * train_flops_per_token(experiment.model, LENGTH)
    assert np.mean(expected) < 0.99 * full


def test_full_rows_cost_what_the_planner_says():
    model = get_config().model
    model.pattern, model.window = ("local", "global", "global"), 20
    rows = {"segment_ids": np.ones((3, LENGTH), int)}
    assert train_flops(model, np.full(3, LENGTH)) == pytest.approx(needed_flops(model, rows))
    per_token = train_flops_per_token(model, LENGTH)
    assert 3 * LENGTH * per_token == pytest.approx(needed_flops(model, rows))
    assert train_flops(model, np.asarray([0, 5])) == train_flops(model, np.asarray([5]))


def test_there_is_no_mfu_on_cpu(tmp_path, folder):
    experiment = config_for(folder)
    records = run_journal(tmp_path, experiment, open_training(experiment.data, BATCH), [1.0] * 3)
    assert all(record["mfu"] is None for record in records[1:])


def test_a_drill_of_failing_reads_does_not_count_the_journals_look(folder):
    """The journal asks how steps are packed; only reads of training use up the faults."""
    experiment = config_for(folder)
    data = Chaos("error@1", STEPS, "").data(open_training(experiment.data, BATCH))
    assert len(data.segments(0, BATCH)) >= BATCH
    with pytest.raises(OSError, match="the read of step 1 fails"):
        data.step(0, BATCH)


@pytest.mark.parametrize(
    ("path", "least", "warned"), [("builtin", 1, True), ("builtin", 10**9, False), ("", 1, False)]
)
def test_a_large_model_on_the_built_in_text_is_warned(
    path, least, warned, tmp_path, folder, monkeypatch, capsys
):
    experiment = config_for(folder)
    dataset = open_training(experiment.data, BATCH, experiment.model.vocab)
    experiment.data.path = path or str(folder)
    monkeypatch.setattr(journal_module, "LARGE", least)
    run_journal(tmp_path, experiment, dataset, [1.0])
    told = [event for event in read_metrics(tmp_path, "event") if event["event"] == "warning"]
    assert bool(told) == warned
    assert ("give --config.data.path=DATASET" in capsys.readouterr().out) == warned
