"""Supervised runs of the tiny config, for the tests of `torus launch`."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import BESIDE, ROOT, environment
from torus import module_command
from trainer.metrics import read_metrics
from trainer.recovery.progress import Progress, ProgressPage

TINY, STEPS = ROOT / "tests/tiny.py", 24
SLOW = f"--config={ROOT}/tests/trainer/recovery/slow.py"
_KEEPER = "trainer.recovery.keeper"


def command(workdir: Path, *arguments: str) -> list[str]:
    return [
        *module_command("trainer.commands.main"), "launch", f"--config={TINY}",
        f"--workdir={workdir}", f"--config.train.steps={STEPS}", "--config.checkpoint.every=4",
        "--config.checkpoint.snapshot_every=1",
        *arguments,
    ]  # fmt: skip


def launch(workdir: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(workdir, *arguments), env=environment(**variables), cwd=BESIDE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def trainers(supervisor: subprocess.Popen) -> list[int]:
    """Returns the process ids of the trainers, in order of rank, and then of their successors."""
    return [pid for pid, command in _children(supervisor) if _KEEPER not in command]


def keeper(supervisor: subprocess.Popen) -> int:
    """Returns the process id of the keeper."""
    return next(pid for pid, command in _children(supervisor) if _KEEPER in command)


def _children(supervisor: subprocess.Popen) -> list[tuple[int, str]]:
    path = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
    return [(int(p), Path(f"/proc/{p}/cmdline").read_text()) for p in path.read_text().split()]


def at_step(workdir: Path, supervisor: subprocess.Popen, step: int) -> None:
    while supervisor.poll() is None:
        if any(record["step"] >= step for record in read_metrics(workdir, "train")):
            return
        time.sleep(0.01)
    pytest.fail(supervisor.communicate()[1])


def ended(supervisor: subprocess.Popen, timeout: float = 240) -> str:
    """Waits for the end and returns what was said; one that hangs fails with all stacks."""
    try:
        return supervisor.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        for pid in trainers(supervisor):
            os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        supervisor.kill()
        pytest.fail(supervisor.communicate()[1])


def incidents(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "incidents.jsonl").read_text().splitlines()]


def in_phase(temporary: Path, supervisor: subprocess.Popen, phase: str) -> Progress:
    """Waits for the first trainer to be in `phase`; `temporary` is the supervisor's TMPDIR."""
    while supervisor.poll() is None:
        for page in temporary.glob("torus-launch-*/0.0.progress"):
            found = ProgressPage(page).read()
            if found.phase == phase and found.since:
                return found
        time.sleep(0.01)
    pytest.fail(supervisor.communicate()[1])
