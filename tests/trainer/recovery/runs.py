"""Supervised runs of the tiny config, for the tests of `torus launch`."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT, environment
from trainer.metrics import read_metrics

TINY, STEPS = ROOT / "tests/tiny.py", 24


def launch(workdir: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "trainer.commands.main", "launch", f"--config={TINY}",
        f"--workdir={workdir}", f"--config.train.steps={STEPS}", "--config.checkpoint.every=4",
        *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=environment(**variables), cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def trainers(supervisor: subprocess.Popen) -> list[int]:
    """Returns the process ids of the trainers, in order of rank."""
    return [
        int(pid)
        for pid in Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
        .read_text()
        .split()
    ]


def at_step(workdir: Path, supervisor: subprocess.Popen, step: int) -> None:
    while supervisor.poll() is None:
        if any(record["step"] >= step for record in read_metrics(workdir, "train")):
            return
        time.sleep(0.01)
    pytest.fail(supervisor.communicate()[1])


def incidents(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "incidents.jsonl").read_text().splitlines()]
