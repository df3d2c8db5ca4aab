"""What is refused is refused before anything is written, and a resumed run is left as it was."""

import hashlib
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.tiny import get_config
from trainer import lock
from trainer.commands.main import main
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
