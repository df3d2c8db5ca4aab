"""Which Python `make` takes: the newest that runs and has a constraints file."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BROKEN = "echo 'pyenv: command not found' >&2; exit 127"  # as pyenv's shims do


def _make(folder: Path, *arguments: str, **pythons: str) -> subprocess.CompletedProcess:
    """Runs make where these Pythons are the only ones; values are versions, or shell code."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("make", "sh", "cut", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    for name, text in pythons.items():
        path = tools / name.replace("_", ".")
        path.write_text(f"#!/bin/sh\n{text if ' ' in text else f'echo {text}'}\n")
        path.chmod(0o755)
    return subprocess.run(
        [tools / "make", f"VENV={folder}/venv", *arguments], cwd=ROOT,
        env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pythons", "version"),
    [
        ({"python3_13": "3.13", "python3_12": "3.12", "python3": "3.11"}, "3.13"),
        ({"python3_13": BROKEN, "python3_12": "3.12", "python3": "3.11"}, "3.12"),
        ({"python3_11": "3.11", "python3": "3.14"}, "3.11"),
        ({"python3": "3.12"}, "3.12"),
    ],
)
def test_make_takes_the_newest_python_that_runs(pythons, version, tmp_path):
    done = _make(tmp_path, "help", **pythons)
    expected = f"Python here: {version}, with the versions of constraints/py{version}.txt"
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize("arguments", [(), ("PYTHON=python3",), ("PYTHON=nosuchpython",)])
def test_make_without_a_python_says_which_it_needs(arguments, tmp_path):
    done = _make(tmp_path, "setup", *arguments, python3_13=BROKEN, python3="3.10")
    assert done.returncode == 2
    assert "Torus needs Python 3.11, 3.12 or 3.13 with venv" in done.stderr
    assert "No rule" not in done.stderr and not (tmp_path / "venv").exists()


def test_every_supported_python_has_its_constraints():
    found = {path.stem for path in (ROOT / "constraints").glob("py*.txt")}
    assert found == {"py3.11", "py3.12", "py3.13"}
