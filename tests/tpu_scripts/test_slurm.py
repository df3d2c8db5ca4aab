"""slurm.sbatch on a real SLURM: what is cancelled ends, all else is saved and goes on."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.tpu_scripts.slurm import Slurm, install, running, wait_for
from tests.trainer.recovery.runs import SLOW, incidents
from torus import module_command
from trainer.metrics import read_metrics

pytestmark = [pytest.mark.soak, pytest.mark.multiprocess, pytest.mark.timeout(1800)]
KILL_WAIT = 60  # seconds from scancel's SIGTERM to SIGKILL


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if missing := install():
        pytest.skip(missing)
    with running(tmp_path_factory.mktemp("slurm"), KILL_WAIT) as cluster:
        yield cluster


class Job:
    """A run of the tiny config on both nodes, ten steps a second."""

    def __init__(self, slurm: Slurm, run: Path, *sbatch: str, launch: tuple[str, ...] = ()) -> None:
        self.slurm, self.run = slurm, run
        self.number = slurm.submit(
            "--nodes=2", *sbatch, str(ROOT / "tpu_scripts/slurm.sbatch"), SLOW,
            f"--workdir={run}", "--config.train.steps=4000", "--config.checkpoint.every=1000",
            *launch, cwd=ROOT, TORUS_BACKOFF="1", SLOW="step=0.1", PYTHONPATH=str(ROOT),
            XLA_FLAGS="", TORUS_COMMAND=" ".join(module_command("trainer.commands.main")),
        )  # fmt: skip

    @property
    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.run, "train")), default=0)

    def resumed(self) -> list[int]:
        """The steps that trainers went on from, after a stop or a fault."""
        events = read_metrics(self.run, "event")
        return [record["step"] for record in events if record["event"] == "resumed"]

    def at_step(self, step: int) -> None:
        wait_for(lambda: self.step >= step or self.slurm.ended(self.number))
        assert self.step >= step, self.slurm.log(self.number)

    def goes_on(self, after: int) -> None:
        """Waits until the run has resumed, after this step at the earliest, and trained on."""
        wait_for(lambda: self.resumed() or self.slurm.ended(self.number))
        log = self.slurm.log(self.number)
        assert self.resumed() and self.resumed()[-1] >= after, log
        self.at_step(self.resumed()[-1] + 10)

    def facts(self) -> dict[str, str]:
        return self.slurm.facts(self.number)

    def signal(self, *arguments: str) -> None:
        self.slurm.ask("scancel", *arguments, self.number)

    def end(self) -> dict[str, str]:
        """Waits for the end and returns what SLURM says of the job."""
        wait_for(lambda: self.slurm.ended(self.number))
        return self.facts()


@pytest.fixture
def start(slurm, tmp_path, own_cache):
    jobs = []

    def submit(*arguments: str, **more) -> Job:
        jobs.append(Job(slurm, tmp_path / "run", *arguments, **more))
        return jobs[-1]

    yield submit
    for job in jobs:
        slurm.ask("scontrol", "update", f"JobId={job.number}", "Requeue=0")
        job.signal("--signal=KILL", "--full")
        job.signal()
        wait_for(lambda: not slurm.ask("squeue", "-h"))


def stops(run: Path) -> list[dict]:
    return [line for line in incidents(run) if line["kind"] == "stopped"]


def test_what_is_cancelled_is_saved_and_ends(start):
    job = start()
    job.at_step(20)
    job.signal()
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), facts
    for stopped in stops(job.run):
        assert stopped["cause"] == "SIGTERM" and stopped["checkpoint"] >= 20
        assert "lost_steps" not in stopped, stopped
    assert stops(job.run)


def test_sigterm_saves_and_queues_again_and_sigint_saves_and_ends(start):
    job = start()
    job.at_step(20)
    job.signal("--signal=TERM")
    job.goes_on(20)
    assert job.facts()["Restarts"] == "1"
    step = job.step
    job.signal("--signal=INT")
    assert job.end()["Restarts"] == "1"
    assert [line["cause"] for line in stops(job.run)[-2:]] == ["SIGINT"] * 2
    assert stops(job.run)[-1]["checkpoint"] >= step
    assert not any("lost_steps" in line for line in stops(job.run))


def test_the_end_of_the_time_saves_and_queues_again(start, slurm):
    job = start()
    job.at_step(20)
    hours, minutes, _ = map(int, job.facts()["RunTime"].split(":"))
    limit = f"TimeLimit={60 * hours + minutes + 2}"  # less than two minutes from now
    slurm.ask("scontrol", "update", f"JobId={job.number}", limit)
    wait_for(lambda: job.facts()["Restarts"] == "1")
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    job.goes_on(20)
    assert not any("lost_steps" in line for line in stops(job.run))


def test_what_is_preempted_is_saved_and_goes_on_afterwards(start, slurm):
    job = start()
    job.at_step(20)
    slurm.submit("--partition=high", "--nodes=2", "--wrap=sleep 1", cwd=ROOT)
    job.goes_on(20)
    assert job.facts()["Restarts"] == "1" and not any("lost_steps" in s for s in stops(job.run))


@pytest.mark.parametrize("kind", ["trainers", "launchers"])
def test_what_is_killed_is_started_again_in_the_job(start, slurm, kind):
    job = start(launch=("--lease", "5"))
    job.at_step(20)
    os.kill(slurm.tasks(job.number)[1][kind][0], signal.SIGKILL)
    job.goes_on(1)
    assert job.facts()["Restarts"] == "0"
    assert ("started again" in slurm.log(job.number)) == (kind == "launchers")


def kill_task(slurm: Slurm, job: Job, number: int) -> None:
    task = slurm.tasks(job.number)[number]
    for pid in task["shells"] + task["launchers"]:
        os.kill(pid, signal.SIGKILL)


def test_a_killed_task_queues_the_job_again(start, slurm):
    job = start(launch=("--lease=5", "--patience=10", "--config.checkpoint.every=10"))
    job.at_step(20)
    kill_task(slurm, job, 0)
    job.goes_on(10)
    assert job.facts()["Restarts"] == "1"


def test_a_lost_node_queues_the_job_again(start, slurm):
    job = start(launch=("--lease=5", "--patience=10", "--config.checkpoint.every=10"))
    job.at_step(20)
    lost = [pid for pids in slurm.tasks(job.number)[1].values() for pid in pids]
    slurm.ask("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    for pid in lost:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        wait_for(lambda: job.facts()["Restarts"] == "1")
        assert "queued again" in slurm.log(job.number)
    finally:
        slurm.ask("scontrol", "update", "NodeName=n2", "State=RESUME")
    job.goes_on(10)


def test_with_another_mesh_the_others_go_on_and_the_job_completes(start, slurm):
    job = start(
        launch=("--lease", "5", "--mesh=2", "--mesh=1", "--config.train.stop_at=120",
                "--config.checkpoint.every=20")
    )  # fmt: skip
    job.at_step(40)
    kill_task(slurm, job, 0)
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), slurm.log(job.number)
    assert job.step == 120
