"""Datasets in object storage: S3 by moto in a real process, GCS by a stand-in for its reads."""

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import UsageError
from tests.buckets import google
from tests.processes import ROOT, run_processes
from tests.tiny import get_config
from tests.trainer.data.emulator import Emulator
from trainer.data import remote as remote_module
from trainer.data.config import DataConfig, RemoteConfig
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.manifest import read_manifest
from trainer.data.remote import Bucket
from trainer.data.rows import resume_row
from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.multiprocess
DOCUMENTS, HELD_OUT, LENGTH = 400, 20, 60
SHARD = 2_000  # tokens, and 4,000 bytes
SMALL = 8 * 2 * SHARD / 1e9  # a cache of 8 of the 13 shards
URL = "s3://bucket/set"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Path:
    """A folder that is served as a bucket: `set` has 13 shards to train on, one held out."""
    folder = tmp_path_factory.mktemp("bucket")
    random = np.random.default_rng(0)
    with DatasetWriter(folder / "set", ByteTokenizer(), shard_tokens=SHARD) as writer:
        for number in range(DOCUMENTS + HELD_OUT):
            document = random.integers(0, 256, LENGTH + number % 9)
            document[0] = ByteTokenizer.BOS
            writer.add("train" if number < DOCUMENTS else "val", document, len(document) - 1)
    assert len(read_manifest(folder / "set").split("train")) == 13
    return folder


@pytest.fixture(scope="module")
def emulator(bucket, tmp_path_factory) -> Iterator[Emulator]:
    server = Emulator(bucket, tmp_path_factory.mktemp("log") / "moto.log")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def storage(emulator, tmp_path, monkeypatch) -> Emulator:
    """The emulator, found through the environment, and an empty cache of the test's own."""
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path / "cache"))
    return emulator


def config(path: Path | str, **remote) -> DataConfig:
    values = {"cache_gb": SMALL, "workers": 2, "ahead": 16, "patience": 30.0} | remote
    return DataConfig(path=str(path), seq_len=64, window=40, remote=RemoteConfig(**values))


def cached(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").rglob("*.bin*")}


def assert_same_rows(remote: Dataset, local: Dataset, ids: np.ndarray) -> None:
    wanted = local.rows(ids)
    for name, array in remote.rows(ids).items():
        np.testing.assert_array_equal(array, wanted[name])


def test_rows_are_those_of_a_local_copy(storage, bucket, tmp_path, caplog):
    local = open_dataset(config(bucket / "set"))
    with caplog.at_level(logging.WARNING):
        remote = open_dataset(config(URL))
    assert "does not hold them" in caplog.text
    assert remote.identity() == local.identity()
    assert remote.tokenizer.spec == local.tokenizer.spec
    budget = int(SMALL * 1e9)
    for first in range(0, local.rows_per_epoch, 8):
        assert_same_rows(remote, local, np.arange(first, first + 8))
        with remote.shards._lock:  # so that nothing is counted under both of its names
            used = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*.bin*"))
        assert used <= budget
    assert_same_rows(remote, local, np.asarray([3, 1_000_000, 2]))


def test_shards_are_fetched_ahead_and_kept(storage, bucket, tmp_path):
    folder = bucket / "set"
    remote = open_dataset(config(URL, cache_gb=1, ahead=1_000))
    assert cached(tmp_path) == set()
    remote.rows(np.arange(1))
    deadline = time.monotonic() + 10
    everything = {path.name for path in folder.glob("train-*.bin")}
    while cached(tmp_path) != everything and time.monotonic() < deadline:
        time.sleep(0.02)
    assert cached(tmp_path) == everything
    asked = storage.requests("set/train-00003.bin")
    again = open_dataset(config(URL, cache_gb=1))  # another run on this machine
    assert_same_rows(again, open_dataset(config(folder)), np.arange(again.rows_per_epoch))
    assert storage.requests("set/train-00003.bin") == asked


def test_the_longest_unused_shard_makes_room(tmp_path):
    def file(name: str, age: float) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10)
        os.utime(path, (time.time() - age,) * 2)
        return path

    def reserve(size: int, keep: frozenset[Path] = frozenset()) -> Path | None:
        return remote_module._reserve(tmp_path / "a/new.bin", size, tmp_path, 40, keep)

    old, older, index = file("a/1.bin", 10), file("b/2.bin", 20), file("b/2.idx.npy", 90)
    arriving, left = file("a/3.bin.77.part", 30), file("a/4.bin.88.part", 7200)
    part = reserve(10)
    assert part is not None and part.stat().st_size == 10 and part.suffix == ".part"
    assert not left.exists() and all(f.exists() for f in (old, older, index, arriving))
    assert reserve(20, frozenset({old})) is None  # its own part and an arriving one stay
    assert older.exists()
    assert reserve(10, frozenset({older})) is not None
    assert older.exists() and not old.exists()


class Outage:
    """Kills the emulator in the middle of the n-th read and starts it again after a while."""

    def __init__(self, emulator: Emulator, monkeypatch, *, at: int, seconds: float) -> None:
        self._emulator, self._at, self._seconds = emulator, at, seconds
        self._read, self._count, self._lock = Bucket.read, 0, threading.Lock()
        self._thread = threading.Thread(target=self._restart)
        monkeypatch.setattr(Bucket, "read", lambda bucket, *what: self.read(bucket, *what))

    def read(self, bucket: Bucket, *what) -> bytes:
        with self._lock:
            self._count += 1
            if self._count == self._at:
                self._emulator.kill()
                self._thread.start()
        return self._read(bucket, *what)

    def _restart(self) -> None:
        time.sleep(self._seconds)
        self._emulator.start()

    def wait(self) -> None:
        self._thread.join()
        assert self._count > self._at + 5  # it went on reading


@pytest.mark.parametrize("seconds", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_training_outlives_an_outage(storage, bucket, tmp_path, monkeypatch, seconds, caplog):
    """Whose storage went away for a while: losses, evaluations and what compressors make of the
    held-out text are those of a run on local files."""
    from trainer.loop import train
    from trainer.metrics import read_metrics

    monkeypatch.setattr(remote_module, "_DELAYS", (0.1, 1.0))
    compared = ("kind", "step", "loss", "bits_per_byte", "event", "gzip_bits_per_byte")
    found = {}
    for name, path in (("local", bucket / "set"), ("remote", URL)):
        experiment = get_config()
        experiment.data = config(path, ahead=8)
        experiment.model.vocab = 259
        experiment.train.steps = 12
        experiment.checkpoint.every = 100
        experiment.eval.every = 6
        if path == URL:
            outage = Outage(storage, monkeypatch, at=45, seconds=seconds)
        train(experiment, str(tmp_path / name))
        records = read_metrics(tmp_path / name)
        found[name] = [
            {key: value for key, value in record.items() if key in compared} for record in records
        ]
    outage.wait()
    assert "again in" in caplog.text  # it did wait
    assert [r["step"] for r in found["local"] if r["kind"] == "eval"] == [6, 12]
    (baseline,) = [r for r in found["local"] if r.get("event") == "baseline"]
    assert 7 < baseline["gzip_bits_per_byte"] < 9  # of random bytes
    assert found["remote"] == found["local"]


def test_two_processes_train_and_evaluate_on_remote_data(storage, bucket, tmp_path):
    code = (
        "import sys\n"
        "from sharding.config import MeshConfig\n"
        "from tests.trainer.data.test_remote import *\n"
        "from trainer.loop import train\n"
        "experiment = get_config()\n"
        "experiment.mesh, experiment.data = MeshConfig(fsdp=2), config(URL)\n"
        "experiment.train.steps = experiment.eval.every = 2\n"
        "experiment.optimizer.warmup_steps = 0\n"
        "train(experiment, sys.argv[1])\n"
    )
    run_processes(code, 2, args=[tmp_path / "run"])
    from trainer.metrics import read_metrics

    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2]
    (evaluated,) = [r for r in records if r["kind"] == "eval"]
    held_out = open_dataset(config(bucket / "set"), "val")
    assert evaluated["tokens"] == held_out.shards.starts[-1] - HELD_OUT  # each once
    assert evaluated["loss"] == pytest.approx(np.log(259), rel=0.1)  # of random bytes
    assert "baseline" in [r.get("event") for r in records]


def test_a_mixture_of_remote_and_local_data(storage, bucket, tmp_path):
    copy = shutil.copytree(bucket / "set", tmp_path / "copy")
    for split in ("train", "val"):
        rows = []
        for path in (URL, bucket / "set"):
            mixed = dataclasses.replace(config(path), mixture=((str(path), 2.0), (str(copy), 1.0)))
            rows.append(open_dataset(mixed, split).rows(np.arange(40)))
        for name, array in rows[0].items():
            np.testing.assert_array_equal(array, rows[1][name])


def test_an_outage_beyond_the_patience_is_an_error(storage, monkeypatch, tmp_path):
    remote = open_dataset(config(URL, patience=0.5, workers=1))
    outage = Outage(storage, monkeypatch, at=1, seconds=3)
    text = r"s3://bucket/set: train-\d+\.bin could not be read for .*patience = 0\.5 s: .*onnect"
    with pytest.raises(ConnectionError, match=text):
        remote.rows(np.arange(8))
    outage._thread.join()
    remote.rows(np.arange(8))  # what failed is tried again when it is asked for again


def test_a_reader_that_waits_can_be_closed(storage, monkeypatch, tmp_path):
    remote = open_dataset(config(URL))
    outage = Outage(storage, monkeypatch, at=1, seconds=1)
    threading.Timer(0.3, remote.cancel).start()
    with pytest.raises(CancelledError):
        remote.rows(np.arange(8))
    outage._thread.join()
    remote.rows(np.arange(8))


def test_an_outage_does_not_hold_up_the_end_of_the_program(storage, monkeypatch, tmp_path):
    """Though shards are being fetched in the background, patiently."""
    code = (
        "from tests.trainer.data.test_remote import *\n"
        "shards = open_dataset(config(URL, patience=600.0)).shards\n"
        "print('opened', flush=True)\n"
        "input()\n"
        "shards.expect(np.arange(len(shards)))\n"
        "time.sleep(1)\n"
        "print('threads', threading.active_count(), flush=True)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "opened\n"
            storage.kill()
            out, err = process.communicate("\n", timeout=60)
        finally:
            process.kill()
            storage.start()
    assert out == "threads 3\n" and process.returncode == 0
    assert "again in" in err and "Traceback" not in err


@pytest.fixture
def damage(storage, bucket, tmp_path) -> Iterator[Callable[[str, bytes | None], None]]:
    """Returns a function that replaces a stored file; what it did is undone at the end."""
    originals = {}

    def change(name: str, content: bytes | None) -> None:
        path = bucket / "set" / name
        originals[path] = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        storage.kill()
        storage.start()

    yield change
    for path, content in originals.items():
        path.write_bytes(content)
    storage.kill()
    storage.start()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "train-00005.bin is not there"),
        (b"\0" * 4_000, "train-00005.bin has sha256"),
        (b"\0" * 100, "train-00005.bin is shorter than its manifest says"),
    ],
    ids=["missing", "damaged", "truncated"],
)
def test_a_bad_shard_is_an_error_or_padding(storage, bucket, damage, content, reason, caplog):
    good = open_dataset(config(bucket / "set"))
    ids = np.arange(good.rows_per_epoch)
    wanted = good.rows(ids)
    owners = np.repeat(np.arange(13), [s.docs for s in good.shards.manifest.split("train")])
    if content is not None:
        content = content[: good.shards.manifest.shards[5].bytes]
    damage("train-00005.bin", content)

    remote = open_dataset(config(URL))
    with pytest.raises(UsageError, match=rf"{reason}.* \S*skip_shards = 0 does not allow it"):
        remote.rows(ids)
    assert remote.skipped() == {}

    remote = open_dataset(config(URL, skip_shards=1))
    rows = remote.rows(ids)
    assert "1 of 1 skipped" in caplog.text
    lost = np.zeros_like(wanted["segment_ids"])  # the places of the shard's documents
    pieces = good.plan.rows(ids)
    for document, row, column, count in zip(
        pieces.documents, pieces.rows, pieces.columns, pieces.counts, strict=True
    ):
        if owners[document] == 5:
            lost[row, column : column + count] = 1
    assert 0 < lost.sum() < lost.size
    for name in ("tokens", "targets", "positions"):
        np.testing.assert_array_equal(rows[name], np.where(lost, 0, wanted[name]))
    np.testing.assert_array_equal(
        rows["segment_ids"] > 0, (wanted["segment_ids"] > 0) & (lost == 0)
    )
    assert remote.skipped() == {remote.identity()["fingerprint"]: ["train-00005.bin"]}


def test_a_resumed_run_skips_what_it_had_skipped(storage, bucket, tmp_path):
    """Even if the shard can be read again by then, and from a local copy too."""
    rows = []
    for path in (URL, bucket / "set"):
        dataset = open_dataset(config(path))
        skipped = {dataset.identity()["fingerprint"]: ["train-00005.bin"]}
        state = {"version": 1, "next_row": 8, **dataset.identity(), "skipped": skipped}
        assert resume_row(state, dataset) == 8
        assert dataset.skipped() == skipped
        rows.append(dataset.rows(np.arange(8, 40)))
        assert (rows[-1]["segment_ids"] == 0).sum() > 64
    for name, array in rows[0].items():
        np.testing.assert_array_equal(array, rows[1][name])
    with pytest.raises(UsageError, match=r"set, split train: no shard 'other\.bin'"):
        dataset.adopt({dataset.identity()["fingerprint"]: ["other.bin"]})


def test_bad_indices_and_manifests_are_refused_at_open(storage, damage):
    damage("train-00002.idx.npy", b"nothing")
    with pytest.raises(UsageError, match=r"s3://bucket/set: train-00002\.idx\.npy has sha256"):
        open_dataset(config(URL))
    damage("manifest.json", b"{}")
    with pytest.raises(UsageError, match=r"s3://bucket/set: manifest\.json has version None"):
        open_dataset(config(URL))


def test_what_is_no_dataset_is_refused(storage):
    with pytest.raises(UsageError, match=r"s3://bucket/none: manifest\.json is not there"):
        open_dataset(config("s3://bucket/none"))
    with pytest.raises(UsageError, match=r"choose gs://BUCKET/FOLDER or s3://"):
        open_dataset(config("ftp://host/set"))
    with pytest.raises(
        UsageError, match=r"cache_gb = 1e-05: shards of 3\.99e-06 GB.* need 1\.2e-05"
    ):
        open_dataset(config(URL, cache_gb=1e-5))
    with pytest.raises(UsageError, match=r"config\.data\.remote\.workers = 0: must be at least 1"):
        open_dataset(config(URL, workers=0))


def test_google_storage(bucket, tmp_path, monkeypatch):
    with google() as store:
        store.fill("bucket", bucket)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        monkeypatch.setenv("TORUS_CACHE", str(tmp_path / "cache"))
        remote = open_dataset(config("gs://bucket/set"))
        ids = np.arange(remote.rows_per_epoch)
        assert_same_rows(remote, open_dataset(config(bucket / "set")), ids)


def test_permanent_errors_end_at_once(storage, monkeypatch):
    """Of a name no bucket can have, a bucket that is not there, and a server that refuses."""
    monkeypatch.setattr(remote_module, "_pause", lambda seconds: pytest.fail("it waited"))
    for url, reason in (
        ("s3://a/set", "manifest.json cannot be read: Invalid S3 bucket name"),
        ("gs://Not_a_bucket!/set", "manifest.json cannot be read: .*Invalid GCS bucket name"),
        ("s3://nobody/set", r"manifest\.json is not there; is there a bucket 'nobody'\?"),
    ):
        with pytest.raises(UsageError, match=rf"^dataset {url}: {reason}") as caught:
            open_dataset(config(url, patience=600.0))
        assert "\n" not in str(caught.value)
    with google() as store:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        for status, reason in (
            (400, "cannot be read: Bad Request"),
            (401, r"access refused \(are credentials set\?\): PERMISSION_DENIED"),
            (403, r"access refused \(are credentials set\?\): PERMISSION_DENIED"),
            (404, r"manifest\.json is not there; is there a bucket 'bucket'\?"),
            (405, "cannot be read: UNKNOWN: Method Not Allowed"),
        ):
            store.refuse = status
            with pytest.raises(UsageError, match=rf"^dataset gs://bucket/set: .*{reason}"):
                open_dataset(config("gs://bucket/set", patience=600.0))


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_transient_errors_are_retried(bucket, monkeypatch, tmp_path, caplog, status):
    monkeypatch.setattr(remote_module, "_DELAYS", (0.01, 0.05))
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path))
    with google() as store:
        store.fill("bucket", bucket)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        store.refuse = status
        threading.Timer(0.2, setattr, (store, "refuse", 0)).start()
        open_dataset(config("gs://bucket/set"))
    assert "again in" in caplog.text and f"http_response_code='{status}'" in caplog.text
