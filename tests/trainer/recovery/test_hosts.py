"""`torus launch` with two trainers and on two hosts: one fails, and all go on together."""

import os
import signal

import pytest

from tests.trainer.recovery.runs import STEPS, at_step, incidents, trainers
from tests.trainer.test_resume import stored_state

pytestmark = pytest.mark.multiprocess


@pytest.mark.soak
def test_a_frozen_trainer_is_found_and_replaced(supervised, calm):
    limits = [f"--limit={phase}" for phase in ("step=6", "data=6", "save=15")]  # wherever it is
    run, job = supervised("--processes", "2", *limits)
    at_step(run, job, 5)
    os.kill(trainers(job)[1], signal.SIGSTOP)
    _, error = job.communicate(timeout=240)
    assert job.returncode == 0, error
    hang = incidents(run)[0]
    assert (hang["kind"], hang["cause"]) == ("hang", "hung")
    assert "most recent call first" in error  # the stacks of the one that was waiting
    assert stored_state(run, STEPS) == calm(2)


def host(number: int) -> dict[str, str]:
    return {
        "JAX_PROCESS_ID": str(number), "JAX_NUM_PROCESSES": "2",
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
    }  # fmt: skip


@pytest.mark.soak
def test_two_hosts_go_on_together(supervised, calm):
    """A trainer of the second is killed, then its supervisor: the end is that of one host's two."""
    (run, first), (_, second) = supervised(**host(0)), supervised(**host(1))
    at_step(run, first, 5)
    os.kill(trainers(second)[0], signal.SIGKILL)
    at_step(run, first, 10)
    second.kill()
    _, again = supervised(**host(1))
    _, error = first.communicate(timeout=240)
    assert first.returncode == 0, error
    assert again.wait(120) == 0
    crash, recovered, lost = incidents(run)[:3]
    assert (crash["rank"], crash["cause"], recovered["kind"]) == (
        1,
        "killed by SIGKILL",
        "recovered",
    )
    assert lost["kind"] in ("crash", "host lost")
    assert recovered["source"] in ("memory", "disk")  # no host was lost by then
    assert stored_state(run, STEPS) == calm(2)


def test_a_signal_to_one_host_stops_all_saved(supervised):
    (run, first), (_, second) = supervised(**host(0)), supervised(**host(1))
    at_step(run, first, 3)
    second.send_signal(signal.SIGTERM)
    assert [first.wait(120), second.wait(120)] == [76, 76]
    assert "stopped" in {incident["kind"] for incident in incidents(run)}


def test_without_the_other_host_it_gives_up(supervised):
    run, job = supervised("--patience", "1", **host(0))
    assert job.wait(60) == 69
    assert not (run / "experiment.json").exists()
