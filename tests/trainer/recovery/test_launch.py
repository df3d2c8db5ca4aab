"""`torus launch` and real processes: faults are injected, and the run ends on the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.trainer.test_resume import stored_state
from trainer.metrics import read_metrics

TINY, STEPS = ROOT / "tests/tiny.py", 24
pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    """One compilation cache for this module's processes; the dataset is written once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def launch(workdir: Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "trainer.commands.main", "launch", f"--config={TINY}",
        f"--workdir={workdir}", f"--config.train.steps={STEPS}", "--config.checkpoint.every=4",
        *arguments,
    ]  # fmt: skip
    flags = "--xla_force_host_platform_device_count=1"
    environment = {
        **os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
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


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> dict[int, dict]:
    """The last state of undisturbed runs in one process and in two."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("calm") / "run"
        job = launch(folder, "--processes", str(processes))
        _, error = job.communicate(timeout=240)
        assert job.returncode == 0, error
        assert not (folder / "incidents.jsonl").exists()
        found[processes] = stored_state(folder, STEPS)
    return found


@pytest.fixture
def supervised(tmp_path) -> Iterator[Callable[..., tuple[Path, subprocess.Popen]]]:
    """Starts a run; whatever is left of it at the end is killed."""
    jobs = []

    def start(*arguments: str) -> tuple[Path, subprocess.Popen]:
        jobs.append(launch(tmp_path / "run", *arguments))
        return tmp_path / "run", jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.communicate()


@pytest.mark.parametrize(
    ("processes", "victim"), [(1, 0), (2, 1), pytest.param(2, 0, marks=pytest.mark.soak)]
)
def test_a_killed_trainer_is_followed_by_another(supervised, calm, processes, victim):
    run, job = supervised("--processes", str(processes))
    at_step(run, job, 6)
    os.kill(trainers(job)[victim], signal.SIGKILL)
    _, error = job.communicate(timeout=240)
    assert job.returncode == 0, error
    crash, recovered = incidents(run)
    assert (crash["kind"], crash["rank"], crash["cause"]) == ("crash", victim, "killed by SIGKILL")
    assert (
        recovered["kind"] == "recovered" and recovered["lost_steps"] <= STEPS - crash["checkpoint"]
    )
    assert recovered["generation"] == 1 and "lost_steps" in error
    assert stored_state(run, STEPS) == calm[processes]


def test_a_frozen_trainer_is_found_and_replaced(supervised, calm):
    run, job = supervised("--processes", "2", "--limit", "step=6", "--limit", "data=6")
    at_step(run, job, 5)
    os.kill(trainers(job)[1], signal.SIGSTOP)
    _, error = job.communicate(timeout=240)
    assert job.returncode == 0, error
    hang = incidents(run)[0]
    assert (hang["kind"], hang["cause"]) == ("hang", "hung")
    assert "most recent call first" in error  # the stacks of the one that was waiting
    assert stored_state(run, STEPS) == calm[2]


def test_sigterm_saves_and_the_same_command_goes_on(supervised, calm):
    run, job = supervised()
    at_step(run, job, 3)
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate(timeout=120)
    assert job.returncode == 76, error
    assert [i["kind"] for i in incidents(run)] == ["stopped"]
    again = launch(run)
    _, error = again.communicate(timeout=240)
    assert again.returncode == 0, error
    assert stored_state(run, STEPS) == calm[1]


def test_a_crash_loop_ends(supervised):
    run, job = supervised("--tries", "2", "--limit", "start=0.2")
    _, error = job.communicate(timeout=120)
    assert job.returncode == 70
    assert [i["kind"] for i in incidents(run)] if run.exists() else "giving up" in error


def test_trainers_do_not_outlive_their_supervisor(supervised):
    run, job = supervised()
    at_step(run, job, 2)
    (trainer,) = trainers(job)
    job.kill()
    job.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{trainer}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{trainer}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return  # dead; whoever adopted it has not looked yet
        time.sleep(0.01)
    assert not Path(f"/proc/{trainer}").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "stop=3"], "choose start, data, restore, compile, step, eval, save, end"),
        (["--limit", "step=soon"], "--limit step=soon: seconds, more than 0"),
        (["--processes", "0"], "at least 1"),
        (["--config.train.batch_sise=3"], "batch_size"),
    ],
)
def test_mistakes_are_told_before_anything_starts(supervised, arguments, message):
    run, job = supervised(*arguments)
    _, error = job.communicate(timeout=120)
    assert job.returncode == 2 and message in error and len(error.splitlines()) == 1
    assert not run.exists()
