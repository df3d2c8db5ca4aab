import gzip
import platform

import numpy as np
import pytest

from sharding.errors import UsageError
from trainer.data import corpus
from trainer.data.config import DataConfig
from trainer.data.dataset import open_dataset
from trainer.data.shards import TokenShards
from trainer.data.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield corpus.dataset_folder("builtin")


def test_it_is_deterministic(builtin, tmp_path):
    corpus.build(tmp_path / "again")
    again = TokenShards(tmp_path / "again", "train").manifest
    assert again.fingerprint() == TokenShards(builtin, "train").manifest.fingerprint()
    assert platform.python_version() in again.source
    assert again.python == platform.python_version()


def test_size_and_held_out_share(builtin):
    train, held_out = (TokenShards(builtin, split) for split in ("train", "val"))
    total = train.text_bytes + held_out.text_bytes
    assert total > 5_000_000
    assert 0.005 < held_out.text_bytes / total < 0.05
    assert train.text_bytes == train.starts[-1] - 2 * len(train)  # BOS and EOS, all else is text
    assert train.max_token == ByteTokenizer().spec.eos


def test_held_out_bytes_are_what_the_rows_predict(builtin):
    data = corpus.split_bytes(TokenShards(builtin, "val"))
    dataset = open_dataset(DataConfig(path=str(builtin), seq_len=2048), "val")
    shards = dataset.shards
    assert len(data) == shards.text_bytes
    assert dataset.plan.positions_per_epoch == len(data) + len(shards)  # and the end of each
    batch = dataset.rows(np.arange(dataset.rows_per_epoch))
    targets = batch["targets"][batch["segment_ids"] > 0]
    np.testing.assert_array_equal(
        np.bincount(targets[targets != ByteTokenizer().spec.eos], minlength=256),
        np.bincount(np.frombuffer(data, np.uint8), minlength=256),
    )


def test_a_damaged_cache_says_how_to_repair_it(builtin, monkeypatch, tmp_path):
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path))
    folder = corpus.dataset_folder("builtin")
    (folder / "train-00000.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="remove the folder and it is written anew"):
        open_dataset(DataConfig())


def test_compression_baselines():
    bits = corpus.compression_baselines(b"abc" * 10_000)
    assert set(bits) == {"gzip", "xz"} and all(0 < value < 0.1 for value in bits.values())
    data = np.random.default_rng(0).bytes(5000)
    assert bits != corpus.compression_baselines(data)
    assert corpus.compression_baselines(data)["gzip"] == pytest.approx(
        8 * len(gzip.compress(data, 9)) / 5000
    )
    with pytest.raises(ValueError, match="no bytes"):
        corpus.compression_baselines(b"")
