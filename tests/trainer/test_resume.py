"""Killed, moved to other meshes and process counts, a run goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.processes import ROOT, environment, run_processes
from tests.trainer.job import run
from tests.trainer.test_step import TOLERANCE
from trainer.metrics import read_metrics

JOB = ROOT / "tests/trainer/job.py"
HALF = {"data": 2, "fsdp": 4}
pytestmark = pytest.mark.multiprocess


def jobs(processes: int, devices: int, *runs: tuple[Path, dict, dict]) -> list[dict]:
    """Results of runs one after another in a job of so many processes."""
    arguments = [json.dumps([str(folder), *rest]) for folder, *rest in runs]
    first, *_ = run_processes(JOB, processes, devices // processes, arguments, timeout=240)
    lines = [line for line in first.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict, dict]:
    """A run on data 2 × fsdp 4 at step 10, that run's result, and the undisturbed rest of it."""
    folder = tmp_path_factory.mktemp("runs")
    half = run(str(folder / "half"), HALF, **{"train.stop_at": 10})
    shutil.copytree(folder / "half", folder / "whole")
    whole = run(str(folder / "whole"), HALF, **{"train.stop_at": 20})
    return folder / "half", half, whole


def check_moved(moved: dict, half: dict, whole: dict) -> None:
    assert moved["before"] == half["after"]  # bit-equal state
    for step in map(str, range(11, 16)):
        np.testing.assert_allclose(moved["losses"][step], whole["losses"][step], rtol=TOLERANCE)


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, pytest.param({"data": 4, "fsdp": 2}, marks=pytest.mark.soak), None],
    ids=str,
)
def test_a_checkpoint_moves_to_any_mesh(trained, tmp_path, mesh):
    half_folder, half, whole = trained
    shutil.copytree(half_folder, tmp_path / "run")
    stop = {"train.stop_at": 15}
    if mesh:
        moved = run(str(tmp_path / "run"), mesh, **stop)
    else:  # one device
        (moved,) = jobs(1, 1, (tmp_path / "run", {}, stop))
    check_moved(moved, half, whole)


def test_a_checkpoint_moves_to_another_number_of_processes(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (moved,) = jobs(2, 8, (tmp_path / "run", HALF, {"train.stop_at": 15}))
    check_moved(moved, *trained[1:])


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(tmp_path):
    whole = run(str(tmp_path / "whole"), {"fsdp": 8}, **{"train.stop_at": 12})
    run(str(tmp_path / "hurt"), {"fsdp": 8}, **{"train.stop_at": 8})
    newest = tmp_path / "hurt/checkpoints/8"
    data = max((newest / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    hurt = run(str(tmp_path / "hurt"), {"fsdp": 8}, **{"train.stop_at": 12})
    assert hurt["after"] == whole["after"]
    assert (tmp_path / "hurt/checkpoints/8.damaged").is_dir()
    events = read_metrics(tmp_path / "hurt", "event")
    passed_over = [e for e in events if e["event"] == "damaged checkpoint passed over"]
    assert [event["step"] for event in passed_over] == [4]
    assert "step 8" in passed_over[0]["reason"]


def command(workdir: Path) -> list[str]:
    return [
        sys.executable, "-m", "trainer.commands.main", "train",
        f"--config={ROOT / 'tests/tiny.py'}", f"--workdir={workdir}",
    ]  # fmt: skip


def stored_state(workdir: Path, step: int) -> dict[str, str]:
    """The fingerprints of every array of a step, as they were in memory when it was saved."""
    path = workdir / "checkpoints" / str(step) / "integrity/data.json"
    return json.loads(path.read_text())["arrays"]


def last_step(workdir: Path) -> int:
    return max((r["step"] for r in read_metrics(workdir, "train")), default=0)


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.soak)])
def test_killed_runs_end_on_the_same_bits(own_cache, tmp_path, kills):
    subprocess.run(command(tmp_path / "calm"), env=environment(), check=True, cwd=ROOT)
    rng = np.random.default_rng(os.getpid())
    disturbed = tmp_path / "disturbed"
    for target in sorted(rng.choice(np.arange(1, 19), kills, replace=False)):
        process = subprocess.Popen(command(disturbed), env=environment(), cwd=ROOT)
        while last_step(disturbed) < target and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(disturbed), env=environment(), check=True, cwd=ROOT)
    assert last_step(disturbed) == 20
    assert stored_state(disturbed, 20) == stored_state(tmp_path / "calm", 20)


def test_ctrl_c_saves_and_exits_130(own_cache, tmp_path):
    process = subprocess.Popen(
        [*command(tmp_path / "run"), "--config.train.steps=5000", "--config.checkpoint.every=0"],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while last_step(tmp_path / "run") < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    stopped = read_metrics(tmp_path / "run", "event")[-1]
    assert (stopped["event"], stopped["by"]) == ("stopped", "SIGINT")
    assert (tmp_path / "run/checkpoints" / str(stopped["step"])).is_dir(), out
