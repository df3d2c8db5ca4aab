"""`torus launch` on one host: faults are injected, and the run ends on the same bits."""

import contextlib
import os
import signal
import time

import pytest

from tests.trainer.recovery.runs import STEPS, at_step, incidents, keeper, launch, trainers
from tests.trainer.test_resume import stored_state
from trainer.recovery.progress import process_state

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    ("processes", "victim"),
    [(1, 0), *(pytest.param(2, rank, marks=pytest.mark.soak) for rank in (0, 1))],
)
def test_a_killed_trainer_is_followed_by_another(supervised, calm, processes, victim):
    run, job = supervised("--processes", str(processes))
    at_step(run, job, 6)
    os.kill(trainers(job)[victim], signal.SIGKILL)
    _, error = job.communicate(timeout=240)
    assert job.returncode == 0, error
    crash, recovered = incidents(run)
    assert (crash["kind"], crash["rank"], crash["cause"]) == ("crash", victim, "killed by SIGKILL")
    assert recovered["kind"] == "recovered" and recovered["restored"] >= crash["checkpoint"]
    assert recovered["source"] == "memory" or recovered["restored"] == crash["checkpoint"]
    assert recovered["generation"] == 1 and "lost_steps" in error
    assert stored_state(run, STEPS) == calm(processes)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 76), pytest.param(signal.SIGUSR2, 78, marks=pytest.mark.soak)],
)
def test_a_signal_saves_and_the_same_command_goes_on(supervised, calm, number, status):
    """As SLURM sends it: to every process of the job, and twice."""
    run, job = supervised()
    at_step(run, job, 3)
    for _ in range(2):
        for pid in (*trainers(job), keeper(job), job.pid):
            with contextlib.suppress(ProcessLookupError):  # one that waited to be a trainer
                os.kill(pid, number)
    _, error = job.communicate(timeout=120)
    assert job.returncode == status, error
    (stopped,) = incidents(run)
    assert stopped["kind"] == "stopped" and "lost_steps" not in stopped
    assert stopped["checkpoint"] >= 3 and "keeper" not in error
    again = launch(run)
    _, error = again.communicate(timeout=240)
    assert again.returncode == 0, error
    assert stored_state(run, STEPS) == calm(1)


def test_what_was_not_saved_in_time_is_told(supervised):
    run, job = supervised("--grace", "0")
    at_step(run, job, 3)
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate(timeout=120)
    assert job.returncode == 76, error
    (stopped,) = incidents(run)
    assert stopped["lost_steps"] >= 3 - max(stopped["checkpoint"], 0) > 0 and "lost_steps" in error


def test_a_crash_loop_ends(supervised):
    run, job = supervised("--tries", "2", "--limit", "start=0.2")
    _, error = job.communicate(timeout=120)
    assert job.returncode == 70
    assert [i["kind"] for i in incidents(run)] if run.exists() else "giving up" in error


def test_trainers_do_not_outlive_their_supervisor(supervised):
    run, job = supervised()
    at_step(run, job, 2)
    trainer = trainers(job)[0]
    job.kill()
    job.wait()
    deadline = time.monotonic() + 10
    # A dead one may wait for whoever adopted it.
    while process_state(trainer) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process_state(trainer) in ("", "Z")


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
