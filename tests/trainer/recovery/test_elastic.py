"""Hosts come and go while real processes train; two hosts share this machine."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.trainer.recovery.runs import SLOW, STEPS, at_step, incidents, launch, trainers
from trainer.metrics import read_metrics

pytestmark = pytest.mark.multiprocess


ELASTIC = ("--mesh", "2", "--mesh", "1", "--lease", "5", SLOW)


def host(number: int) -> dict[str, str]:
    return {
        "JAX_PROCESS_ID": str(number), "JAX_NUM_PROCESSES": "2",
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "SLOW": "data=0.25",
    }  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    """Of the last time that each step was done."""
    return {record["step"]: record["loss"] for record in read_metrics(run, "train")}


def resized(run: Path, count: int) -> dict:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = incidents(run) if (run / "incidents.jsonl").exists() else []
        found = [incident for incident in found if incident["kind"] == "resized"]
        if len(found) == count:
            return found[-1]
        time.sleep(0.05)
    pytest.fail(f"not resized {count} times")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    job = launch(run, "--processes", "2")
    _, error = job.communicate(timeout=240)
    assert job.returncode == 0, error
    return losses(run)


@pytest.mark.soak
def test_the_leading_host_goes_and_comes_back(supervised, undisturbed):
    """Two hosts, one, two: the run ends near the undisturbed one, and equals it up to the loss."""
    (run, first), (_, second) = (supervised(*ELASTIC, **host(n)) for n in (0, 1))
    at_step(run, second, 5)
    first.kill()
    shrunk = resized(run, 1)
    assert (shrunk["hosts"], shrunk["lost"]) == (1, [0])
    _, again = supervised(*ELASTIC, **host(0))
    grown = resized(run, 2)
    assert (grown["hosts"], grown["new"]) == (2, [0])
    _, error = second.communicate(timeout=240)
    assert second.returncode == 0, error
    assert again.wait(60) == 0
    found = losses(run)
    assert [found[step] for step in range(1, 5)] == [undisturbed[step] for step in range(1, 5)]
    # Sums over devices are taken in another order: float32, 24 steps at a rate of 1e-2.
    assert found == pytest.approx(undisturbed, rel=1e-3)
    assert max(found) == STEPS


@pytest.mark.soak
def test_a_frozen_host_is_given_up_and_does_no_harm_when_it_wakes(supervised, undisturbed):
    (run, first), (_, second) = (supervised(*ELASTIC, **host(n)) for n in (0, 1))
    at_step(run, second, 5)
    frozen = [first.pid, *trainers(first)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    assert resized(run, 1)["lost"] == [0]
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    assert resized(run, 2)["new"] == [0]
    for job in (first, second):
        _, error = job.communicate(timeout=240)
        assert job.returncode == 0, error
    assert losses(run) == pytest.approx(undisturbed, rel=1e-3)


@pytest.mark.soak
def test_a_host_that_is_preempted_leaves_saved_and_the_other_goes_on(supervised, undisturbed):
    (run, first), (_, second) = (supervised(*ELASTIC, **host(n)) for n in (0, 1))
    at_step(run, first, 5)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 76
    _, error = first.communicate(timeout=240)
    assert first.returncode == 0, error
    assert [i["kind"] for i in incidents(run)] == ["stopped", "resized"]  # and no step was lost
    assert losses(run) == pytest.approx(undisturbed, rel=1e-3)
