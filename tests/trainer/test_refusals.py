"""What is refused is refused before anything is written, and a resumed run is left as it was."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.processes import ROOT
from tests.tiny import get_config
from trainer import lock
from trainer.commands.main import main
from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import ByteTokenizer
from trainer.lock import RunLock
from trainer.loop import train

TINY = f"--config={ROOT}/tests/tiny.py"


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder by name, and of folders."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def refused(capsys, folder: Path, *overrides: str, command: str = "train") -> str:
    """Runs a command that must be refused; returns the line that says why."""
    capsys.readouterr()
    assert main([command, TINY, f"--workdir={folder}", *overrides]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("torus: error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    experiment = get_config()
    experiment.train.stop_at = 4
    train(experiment, str(folder))
    return folder


@pytest.mark.parametrize("command", ["train", "launch"])
def test_a_second_job_in_the_folder_of_a_run_is_refused(trained, capsys, monkeypatch, command):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    before = contents(trained)
    with RunLock(trained):
        line = refused(capsys, trained, command=command)
        held = contents(trained)
    assert "is in use by process" in line and "choose another --workdir" in line
    assert held.pop(lock.LOCK) and held == before == contents(trained)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory) -> Path:
    """A small dataset of letters; training documents hold 1 and 2, for instruction masks."""
    folder = tmp_path_factory.mktemp("data") / "set"
    random = np.random.default_rng(0)
    with DatasetWriter(folder, ByteTokenizer()) as writer:
        for split, count in (("train", 200), ("val", 20)):
            for _ in range(count):
                document = random.integers(97, 123, 60)
                document[:1] = ByteTokenizer.BOS
                if split == "train":
                    document[20], document[40] = 1, 2
                writer.add(split, document, 59)
    return folder


NEW = {  # what is refused: overrides, and what the line says
    "less data than a batch": (["train.batch_size=4096"], "less than one batch of 4096"),
    "a negative seed": (["train.seed=-1"], "config.train.seed = -1: at least 0"),
    "a seed too large": ([f"train.seed={2**32}"], f"below {2**32}"),
    "a rate that is none": (["optimizer.peak_lr=nan"], "optimizer.peak_lr = nan is not finite"),
    "an infinite factor": (["health.factor=inf"], "config.health.factor = inf is not finite"),
    "a stop beyond the end": (["train.stop_at=21"], "stop_at = 21 lies beyond config.train.steps"),
    "too short for the warm-up": (["train.steps=3"], "set config.train.stop_at = 3"),
    "no token with loss": (
        ["data.collate.kind=instruction", "data.collate.begin=(5,)", "data.collate.end=(6,)"],
        r"no token carries loss in 64 rows of the split train",
    ),
    "no token with loss held out": (
        ["data.collate.kind=instruction", "data.collate.begin=(1,)", "data.collate.end=(2,)",
         "eval.every=5"],
        "no token carries loss in 64 rows of the split val",
    ),
    "a mesh that does not fit": (["mesh.fsdp=16", "train.batch_size=16"], "config.mesh"),
    "weights of other shapes": (["train.init_from={odd}"], "holds `params/"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEW)
def test_a_new_run_that_is_refused_leaves_nothing(name, trained, other_data, tmp_path, capsys):
    odd = tmp_path / "odd"  # says that its model is ours, and holds arrays of another
    shutil.copytree(trained, odd)
    overrides, text = NEW[name]
    if name == "weights of other shapes":
        facts = json.loads((odd / "experiment.json").read_text())
        facts["model"]["mlp"] = 128
        (odd / "experiment.json").write_text(json.dumps(facts))
        overrides = [*overrides, "model.mlp=128"]
    flags = [f"--config.{text.format(odd=odd)}" for text in (f"data.path={other_data}", *overrides)]
    assert text in refused(capsys, tmp_path / "new" / "run", *flags)
    assert not (tmp_path / "new").exists()


RESUMED = {
    "other data": ["data.path={data}"],
    "another rate": ["optimizer.peak_lr=0.5"],
    "longer": ["train.steps=40"],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_that_is_refused_changes_nothing(name, trained, other_data, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # an interrupted save
    before = contents(run)
    line = refused(capsys, run, *(f"--config.{o.format(data=other_data)}" for o in RESUMED[name]))
    assert contents(run) == before
    if name == "other data":
        assert "--config.data.allow_change=True" in line
    if name == "longer":
        assert f"a new --workdir and --config.train.init_from={run}" in line


def test_a_resume_with_other_data_leaves_damaged_steps_where_they_are(
    trained, other_data, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = run / "checkpoints" / "4"
    shutil.copytree(newest, run / "checkpoints" / "6")  # its files say that they are step 4
    before = contents(run)
    refused(capsys, run, f"--config.data.path={other_data}")
    assert contents(run) == before
