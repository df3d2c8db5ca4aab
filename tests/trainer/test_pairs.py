"""Every feature with resuming, accumulation, evaluation, remote data, a supervisor, two processes.

docs/pairs.md is the table of what is tested here and elsewhere, and of what is refused.
"""

import functools
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.processes import ROOT, environment, run_processes
from tests.trainer import pairs
from tests.trainer.data.emulator import Emulator
from tests.trainer.recovery.runs import at_step, ended, incidents, trainers
from tests.trainer.test_resume import stored_state
from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import ByteTokenizer
from trainer.loop import train
from trainer.metrics import read_metrics

# Features under which another split of a batch changes more than the order of sums: "skip spikes"
# may leave out an update that lies at its limit.
LOOSE = {"bfloat16": 2e-2, "skip spikes": 1e-4}
TOLERANCE = 2e-5  # relative, float32: what reordering the sums of six steps may do
CONFIG = Path(pairs.__file__)
SOAK = pytest.mark.soak
ALONE = ["ring", "concat, tensor"]  # in one process too, these are soak tests only
FAST = ["mixture, fim, balance", "buckets, bfloat16"]  # with remote data on every change


def groups(soak: Callable[[str], bool]) -> list:
    return [pytest.param(g, marks=SOAK) if soak(g) else g for g in pairs.TOGETHER]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Path:
    """A folder with two datasets of documents of 2 to 70 tokens, served as a bucket too."""
    folder = tmp_path_factory.mktemp("bucket")
    for number in range(2):
        random = np.random.default_rng(number)
        with DatasetWriter(folder / f"set{number}", ByteTokenizer(), shard_tokens=3000) as writer:
            for split, documents in (("train", 400), ("val", 30)):
                for length in random.integers(2, 70, documents).tolist():
                    tokens = random.integers(97, 101, length)
                    tokens[0] = ByteTokenizer.BOS
                    writer.add(split, tokens, length - 1)
    return folder


@pytest.fixture
def data(bucket, monkeypatch) -> Path:
    monkeypatch.setenv("PAIRS_DATA", str(bucket))
    return bucket


def losses(folder: Path, kind: str = "train") -> list[float]:
    return [record["loss"] for record in read_metrics(folder, kind)]


def tolerance(features: str) -> float:
    named = pairs.TOGETHER.get(features, (features,))
    return max(LOOSE.get(feature, TOLERANCE) for feature in named)


def run(folder: Path, features: str, *, accumulation=1, evaluate=True, stop=0):
    exp = pairs.get_config(features)
    exp.train.accumulation, exp.train.stop_at = accumulation, stop
    if not evaluate:
        exp.eval.every = 0
    return train(exp, str(folder))


@pytest.fixture(scope="module")
def whole(bucket, tmp_path_factory) -> Callable[[str], Path]:
    """Returns the folder of an undisturbed run with such features, on local data."""

    @functools.cache
    def trained(features: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PAIRS_DATA", str(bucket))
            result = run(folder, features)
        assert result.step == pairs.STEPS and np.isfinite(result.last_eval["loss"])
        assert len(set(losses(folder))) == pairs.STEPS and len(losses(folder, "eval")) == 3
        return folder

    return trained


def assert_same_end(*folders: Path) -> None:
    first, second = (stored_state(folder, pairs.STEPS) for folder in folders)
    assert first == second


@pytest.mark.parametrize(
    "features",
    [
        *groups(lambda group: group in ALONE),
        *(pytest.param(f, marks=SOAK) for f in pairs.FEATURES if f not in pairs.TOGETHER),
    ],
)
def test_with_resuming_accumulation_and_evaluation(data, whole, features, tmp_path):
    """Stopped half-way and resumed, a run ends on the same bits, whether it evaluates or not; in
    two microbatches a step its losses are the same, and those of evaluation."""
    undisturbed = whole(features)
    run(tmp_path / "parts", features, evaluate=False, stop=pairs.HALF)
    run(tmp_path / "parts", features, evaluate=False)
    assert_same_end(tmp_path / "parts", undisturbed)
    run(tmp_path / "two", features, accumulation=2)
    for kind in ("train", "eval"):
        np.testing.assert_allclose(
            losses(tmp_path / "two", kind), losses(undisturbed, kind), rtol=tolerance(features)
        )


@pytest.fixture(scope="module")
def storage(bucket, tmp_path_factory):
    server = Emulator(bucket, tmp_path_factory.mktemp("log") / "moto.log")
    server.start()
    yield server
    server.kill()


@pytest.mark.multiprocess
@pytest.mark.parametrize("features", groups(lambda group: group not in FAST))
def test_with_remote_data(storage, whole, features, tmp_path, monkeypatch):
    """Rows from a bucket train the same bits as rows from a folder; evaluation reads it too."""
    undisturbed = whole(features)
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PAIRS_DATA", "s3://bucket")
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path / "cache"))
    run(tmp_path / "remote", features, stop=pairs.HALF)
    run(tmp_path / "remote", features)
    assert_same_end(tmp_path / "remote", undisturbed)
    assert losses(tmp_path / "remote", "eval")[-1] == losses(undisturbed, "eval")[-1]


_TWO = """
import sys
from sharding.runtime import start_runtime
start_runtime()
from tests.trainer import pairs
from trainer.loop import train

for features in sys.argv[2:]:
    for stop in (pairs.HALF, 0):
        exp = pairs.get_config(features)
        exp.train.stop_at = stop
        train(exp, f"{sys.argv[1]}/{features}")
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "together",
    [FAST[-1:], pytest.param([g for g in pairs.TOGETHER if g not in FAST[-1:]], marks=SOAK)],
    ids=["one", "the others"],
)
def test_with_two_processes(data, whole, together, tmp_path):
    """Two processes, stopped half-way and resumed, have the losses of one."""
    run_processes(_TWO, 2, 4, [tmp_path, *together], timeout=400)
    for features in together:
        found, expected = (losses(folder) for folder in (tmp_path / features, whole(features)))
        np.testing.assert_allclose(found, expected, rtol=tolerance(features))
        ends = (losses(folder, "eval")[-1] for folder in (tmp_path / features, whole(features)))
        np.testing.assert_allclose(*ends, rtol=tolerance(features))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "features",
    [
        "buckets, bfloat16",
        *(pytest.param(f, marks=SOAK) for f in pairs.TOGETHER if "buckets" not in f),
    ],
)
def test_under_a_supervisor(own_cache, data, whole, features, tmp_path):
    """A trainer that is killed is followed by another, and the run ends on the same bits."""
    env = environment(8)
    command = [
        sys.executable, "-m", "trainer.commands.main", "launch", f"--config={CONFIG}:{features}",
        f"--workdir={tmp_path / 'run'}", "--config.checkpoint.snapshot_every=1",
    ]  # fmt: skip
    job = subprocess.Popen(command, env=env, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    try:
        at_step(tmp_path / "run", job, pairs.HALF)
        os.kill(trainers(job)[0], signal.SIGKILL)
        error = ended(job)
    finally:
        job.kill()
        job.communicate()
    assert job.returncode == 0, error
    assert [incident["kind"] for incident in incidents(tmp_path / "run")] == ["crash", "recovered"]
    assert_same_end(tmp_path / "run", whole(features))


def test_the_documented_table_names_every_feature():
    text = (ROOT / "docs/pairs.md").read_text()
    rows = [line.split("|")[1].strip().strip("`") for line in text.splitlines() if "|" in line]
    assert set(pairs.FEATURES) <= set(rows)
    assert set(itertools.chain(*pairs.TOGETHER.values())) == set(pairs.FEATURES)
