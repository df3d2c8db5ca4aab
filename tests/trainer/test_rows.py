"""Rows in training: packed documents apart, buckets, mixtures and collated data in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.decoder import forward, head_VD
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from tests.tiny import get_config
from trainer.config import check_sizes, validate
from trainer.data.config import CollateConfig, DataConfig
from trainer.data.dataset import open_dataset
from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import ByteTokenizer
from trainer.loop import train
from trainer.metrics import read_metrics
from trainer.state import init_state, make_layout
from trainer.step import make_eval_step

ROWS = P(BATCH, SEQ)


@pytest.fixture
def folders(tmp_path):
    """Two datasets of documents of 2 to 70 tokens."""
    for number in range(2):
        random = np.random.default_rng(number)
        with DatasetWriter(tmp_path / f"set{number}", ByteTokenizer()) as writer:
            for split, documents in (("train", 500), ("val", 20)):
                for length in random.integers(2, 70, documents).tolist():
                    tokens = random.integers(97, 101, length)
                    tokens[0] = ByteTokenizer.BOS
                    writer.add(split, tokens, length - 1)
    return [str(tmp_path / f"set{number}") for number in range(2)]


def test_changing_one_document_leaves_the_logits_of_the_next_bit_equal(folders):
    experiment = get_config()
    dataset = open_dataset(DataConfig(folders[0], seq_len=64))
    batch = dataset.rows(np.arange(40))
    row = int(np.flatnonzero(batch["segment_ids"].max(axis=1) >= 3)[0])
    batch = {name: array[[row]] for name, array in batch.items()}
    segments = batch["segment_ids"][0]
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = init_state(experiment, make_layout(experiment, mesh)).params

        @jax.jit
        def run(batch):
            x_BTD, _ = forward(
                params,
                batch["tokens"],
                batch["positions"],
                batch["segment_ids"],
                experiment.model,
            )
            return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD(params), out_sharding=ROWS)

        def logits(batch):
            return np.asarray(run(jax.device_put(batch, NamedSharding(mesh, ROWS))))[0]

        before = logits(batch)
        for changed in (1, 2, 3):
            tokens = batch["tokens"].copy()
            tokens[0, segments == changed] = 120
            after = logits({**batch, "tokens": tokens})
            others = (segments != changed) & (segments > 0)
            np.testing.assert_array_equal(after[others], before[others])
            assert not np.array_equal(after[segments == changed], before[segments == changed])


def test_a_prefix_is_seen_both_ways_and_trains(folders, tmp_path):
    experiment = get_config()
    collate = CollateConfig("prefix")
    experiment.data = DataConfig(folders[0], seq_len=32, collate=collate)
    experiment.train.steps, experiment.eval.every, experiment.checkpoint.every = 6, 6, 0
    result = train(experiment, str(tmp_path / "run"))
    assert np.isfinite(result.last_eval["loss"]) and result.last_eval["bits_per_byte"] is None

    batch = open_dataset(experiment.data).rows(np.arange(8))
    long = [(batch["prefix"][row] > 0) & (batch["segment_ids"][row] == 1) for row in range(8)]
    row = int(np.argmax([mask.sum() for mask in long]))
    prompt = np.flatnonzero(long[row])
    assert len(prompt) > 2
    batch = {name: array[[row]] for name, array in batch.items()}
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = init_state(experiment, make_layout(experiment, mesh)).params

        @jax.jit
        def hidden(batch):
            fields = (batch[name] for name in ("tokens", "positions", "segment_ids"))
            return forward(params, *fields, experiment.model, prefix_BT=batch.get("prefix"))[0][0]

        def changed(batch):
            tokens = batch["tokens"].copy()
            tokens[0, prompt[-1]] += 1
            return [
                np.asarray(hidden(jax.device_put(b, NamedSharding(mesh, ROWS))))[prompt[0]]
                for b in (batch, {**batch, "tokens": tokens})
            ]

        before, after = changed(batch)
        assert not np.array_equal(before, after)  # the first token sees the last one
        before, after = changed({name: batch[name] for name in batch if name != "prefix"})
        np.testing.assert_array_equal(before, after)
    with pytest.raises(UsageError, match="'prefix' needs rows on one device, mesh axis seq = 2"):
        check_sizes(experiment, {"data": 1, "fsdp": 1, "seq": 2, "tensor": 1})


def losses(workdir):
    return {record["step"]: record["loss"] for record in read_metrics(workdir, "train")}


def test_training_in_buckets_resumes_exactly(folders, tmp_path):
    experiment = get_config()
    experiment.data = DataConfig(folders[0], seq_len=32, buckets=(16,), balance=2)
    experiment.train.steps, experiment.eval.every = 8, 8
    experiment.checkpoint.every = 0
    whole = train(experiment, str(tmp_path / "whole"))
    assert np.isfinite(whole.last_eval["loss"]) and whole.last_eval["bits_per_byte"] > 0
    experiment.train.stop_at = 3
    train(experiment, str(tmp_path / "halves"))
    experiment.train.stop_at = 0
    train(experiment, str(tmp_path / "halves"))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 8


def test_training_on_a_mixture_whose_weights_change_on_resume(folders, tmp_path):
    experiment = get_config()
    experiment.data = DataConfig(mixture=((folders[0], 0.7), (folders[1], 0.3)), seq_len=32)
    experiment.train.steps, experiment.train.stop_at, experiment.eval.every = 6, 3, 6
    result = train(experiment, str(tmp_path / "run"))
    assert result.step == 3
    experiment.train.stop_at = 0
    experiment.data.mixture = ((folders[0], ((0, 0.7), (24, 0.0))), (folders[1], 0.3))
    assert train(experiment, str(tmp_path / "run")).step == 6
    changed = ((folders[0], 0.5), (folders[1], 0.5))
    experiment.data.mixture, experiment.train.steps = changed, 6
    with pytest.raises(UsageError, match="data mixture is"):
        train(experiment, str(tmp_path / "run"))


def test_loss_counts_predicted_tokens_only(folders):
    experiment = get_config()
    collate = CollateConfig("instruction", begin=(97,), end=(98,))
    dataset = open_dataset(DataConfig(folders[0], seq_len=32, collate=collate))
    batch = dataset.rows(np.arange(8))
    predicted = (batch["segment_ids"] > 0) & (batch["targets"] >= 0)
    assert 0 < predicted.sum() < (batch["segment_ids"] > 0).sum()
    garbage = np.where(predicted, batch["targets"], -7).astype(np.int32)
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        params = init_state(experiment, make_layout(experiment, mesh)).params
        step = jax.jit(make_eval_step(experiment))
        found, other = (
            step(params, jax.device_put(rows, NamedSharding(mesh, ROWS)))
            for rows in (batch, {**batch, "targets": garbage})
        )
    assert int(found["tokens"]) == predicted.sum()
    assert float(found["nll"]) == float(other["nll"])
    assert float(found["nll"]) / predicted.sum() == pytest.approx(np.log(259), rel=0.1)


def test_bucket_rows_must_divide_over_the_mesh():
    experiment = get_config()
    experiment.data.buckets, experiment.train.batch_size = (24,), 8
    with pytest.raises(UsageError, match=r"rows of 24 do not divide the 256 tokens of a step"):
        validate(experiment)
    experiment.data.buckets, experiment.train.batch_size = (24,), 6
    sizes = {"data": 1, "fsdp": 3, "seq": 1, "tensor": 1}
    with pytest.raises(UsageError, match=r"8 rows of 24 in a microbatch do not divide over .* = 3"):
        check_sizes(experiment, sizes)
    experiment.data.buckets = (4,)
    with pytest.raises(
        UsageError, match=r"config.data.buckets = 4 does not divide over .* seq = 8"
    ):
        check_sizes(experiment, {**sizes, "fsdp": 2, "seq": 8})
