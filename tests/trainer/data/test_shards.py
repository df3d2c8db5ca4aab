import dataclasses
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sharding.errors import UsageError
from trainer.data import manifest as manifest_module
from trainer.data import shards as shards_module
from trainer.data.config import DataConfig
from trainer.data.dataset import open_dataset
from trainer.data.manifest import Shard, parse_manifest, read_manifest
from trainer.data.shards import DatasetWriter, TokenShards, verify
from trainer.data.tokenizer import ByteTokenizer, TokenizerSpec


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_documents_come_back_over_many_shards(tmp_path):
    documents = [np.arange(n) % 256 for n in (0, 3, 10, 0, 4, 1, 50, 2)]
    with DatasetWriter(tmp_path / "set", ByteTokenizer(), shard_tokens=12) as writer:
        for document in documents:
            writer.add("train", document, len(document))
    shards = TokenShards(tmp_path / "set", "train")
    assert len(shards.manifest.shards) > 2
    assert shards.lengths.tolist() == [len(d) for d in documents]
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(shards.document(number), document)
    assert shards.text_bytes == 70
    assert verify(tmp_path / "set").fingerprint() == shards.manifest.fingerprint()


def test_fingerprints_outlive_new_fields(monkeypatch):
    """A run resumes by this one; fields that a later version adds count once they say something."""
    manifest = parse_manifest(json.dumps(OLD), "old")
    pinned = "sha256:d3eb974a422e9941427f05f3e4c5fa9836d937b7f34ee8bf2d603dad07804890"
    assert manifest.fingerprint() == pinned
    later = dataclasses.make_dataclass(
        "Shard", [("license", str, "")], bases=(Shard,), frozen=True
    )  # fmt: skip
    monkeypatch.setattr(manifest_module, "Shard", later)
    again = parse_manifest(json.dumps(OLD), "old")
    assert again.shards[0].license == "" and again.fingerprint() == pinned
    new = json.loads(json.dumps(OLD))
    new["shards"][0]["license"] = "MIT"
    assert parse_manifest(json.dumps(new), "new").fingerprint() != pinned
    new["shards"][0]["license"] = 1
    with pytest.raises(UsageError, match=r"malformed: Shard\.license = 1"):
        parse_manifest(json.dumps(new), "new")


OLD = {
    "version": 1, "complete": True, "source": "text", "python": "3.11.7", "preparation": {},
    "tokenizer": {
        "kind": "bytes", "vocab_size": 259, "bos": 256, "eos": 257, "pad": 258, "sha256": "ab" * 32
    },
    "shards": [
        {
            "file": f"{split}-00000.bin", "split": split, "docs": 2, "tokens": 9, "text_bytes": 5,
            "bytes": 18, "sha256": "cd" * 32, "index_sha256": "ef" * 32, "max_token": 257,
        }
        for split in ("train", "val")
    ],
}  # fmt: skip


def test_the_folder_appears_whole_or_not_at_all(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        DatasetWriter(tmp_path / "set", ByteTokenizer()) as writer,
    ):
        writer.add("train", np.arange(5), 5)
        assert not (tmp_path / "set").exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_wide_vocabulary_is_stored_in_four_bytes(tmp_path):
    wide = SimpleNamespace(spec=TokenizerSpec("wide", 65_537, 0, 1, 2, ""), files=dict)
    with DatasetWriter(tmp_path / "set", wide) as writer:
        writer.add("train", np.asarray([0, 65_536]), 1)
    shards = TokenShards(tmp_path / "set", "train")
    assert shards.manifest.dtype == np.dtype("<u4")
    assert shards.document(0).tolist() == [0, 65_536]
    with (
        pytest.raises(UsageError, match=r"run from 0 to 65537, the tokenizer 'wide' has 65537"),
        DatasetWriter(tmp_path / "more", wide) as writer,
    ):
        writer.add("train", np.asarray([0, 65_537]), 1)


def test_truncated_shard_is_refused_at_open(make_dataset):
    folder = make_dataset()
    path = folder / "train-00000.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-6])
    text = rf"train-00000\.bin has {size - 6:,} bytes, manifest says {size:,} \(truncated copy\?\)"
    with pytest.raises(UsageError, match=re.escape(str(folder)) + ": " + text):
        TokenShards(folder, "train")
    TokenShards(folder, "val")
    path.unlink()
    with pytest.raises(UsageError, match=r"train-00000\.bin cannot be read: No such file"):
        TokenShards(folder, "train")


@pytest.mark.parametrize("file", ["train-00001.bin", "train-00001.idx.npy"])
def test_flipped_byte_is_found(make_dataset, monkeypatch, file):
    folder = make_dataset()
    data = bytearray((folder / file).read_bytes())
    at = 100
    if file.endswith("npy"):  # an offset between two long documents, so that it stays monotone
        lengths = np.diff(np.load(folder / file))
        between = 1 + np.flatnonzero((lengths[1:] > 2) & (lengths[:-1] > 2))[0]
        at = len(data) - 8 * (len(lengths) + 1 - between)
    data[at] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(UsageError, match=rf"{re.escape(file)} has sha256 \w+…, manifest says"):
        verify(folder)
    with pytest.raises(UsageError, match="damaged or replaced"):
        TokenShards(folder, "train")
    monkeypatch.setattr(shards_module, "HASH_AT_OPEN", 0)
    TokenShards(folder, "train")  # a large dataset is checked by verify only


def test_bad_index_is_refused(make_dataset):
    folder = make_dataset()
    path = folder / "train-00000.idx.npy"
    index = np.load(path)
    np.save(path, np.concatenate([index[:3], index[3:5][::-1], index[5:]]))
    with pytest.raises(UsageError, match=r"idx\.npy is not monotone: document 3 ends before"):
        TokenShards(folder, "train")
    np.save(path, index[:-1])
    with pytest.raises(UsageError, match=r"manifest says int64"):
        TokenShards(folder, "train")
    np.save(path, index + 1)
    with pytest.raises(UsageError, match=r"runs from 1 to"):
        TokenShards(folder, "train")
    path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"idx\.npy is not an index"):
        TokenShards(folder, "train")


def set_shard(**values):
    return lambda content: content["shards"][0].update(values)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(complete=False), r"complete: false, its preparation did not finish"),
        (lambda c: c.update(version=9), r"has version 9, this reads 1"),
        (lambda c: c.pop("tokenizer"), r"is malformed: 'tokenizer'"),
        (lambda c: c.update(colour="red"), r"malformed: .*colour"),
        (set_shard(max_token=259), r"holds token 259, the tokenizer has 259"),
        (set_shard(tokens=-1), r"malformed: Shard.tokens = -1"),
        (set_shard(tokens="many"), r"malformed: Shard.tokens = 'many'"),
        (set_shard(bytes=4), r"in 4 bytes, at 2 bytes a token"),
        (set_shard(file="../train-00000.bin"), r"'../train-00000.bin' lies outside"),
        (set_shard(file="/etc/train-00000.bin"), r"lies outside the dataset folder"),
        (set_shard(file="manifest.json"), r"does not end in \.bin"),
    ],
)
def test_bad_manifest_is_refused(make_dataset, change, text):
    folder = make_dataset()
    edit_manifest(folder, change)
    with pytest.raises(UsageError, match=text):
        read_manifest(folder)


def test_what_is_not_a_dataset_is_refused(make_dataset, tmp_path):
    with pytest.raises(UsageError, match=r"no manifest\.json there"):
        TokenShards(tmp_path / "nowhere", "train")
    folder = make_dataset()
    with pytest.raises(UsageError, match=r"no split 'trian', there is train, val; did you mean"):
        TokenShards(folder, "trian")
    with pytest.raises(UsageError, match="folder is not empty"):
        DatasetWriter(folder, ByteTokenizer())
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        TokenShards(folder, "train")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"packing": "best"}, r"config\.data\.packing = 'best': choose bestfit or concat"),
        ({"seq_len": 0}, r"config\.data\.seq_len = 0: must be at least 1"),
        ({"window": 0}, r"config\.data\.window = 0"),
        ({"prefetch": -1}, r"config\.data\.prefetch = -1"),
        ({"seed": -1}, r"config\.data\.seed = -1"),
        ({"seed": 1 << 63}, r"seed = 9223372036854775808 .*2\*\*63"),
        ({"path": ""}, r"config\.data\.path is empty"),
    ],
)
def test_bad_config_is_refused(values, text):
    with pytest.raises(UsageError, match=text):
        DataConfig(**values).validate()


def test_opening_the_builtin_dataset_is_quick(tmp_path, monkeypatch):
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path))
    open_dataset(DataConfig())
    times = []
    for _ in range(3):
        begin = time.process_time()
        open_dataset(DataConfig())
        times.append(time.process_time() - begin)
    assert min(times) < 0.3
