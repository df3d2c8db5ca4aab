"""What survives in memory: keepers, trainers and whole hosts are killed, the end is bit-equal."""

import os
import random
import signal
import time

import pytest

from tests.trainer.recovery.runs import STEPS, at_step, incidents, keeper, trainers
from tests.trainer.recovery.test_hosts import host
from tests.trainer.test_resume import stored_state

pytestmark = pytest.mark.multiprocess
NO_DISK = "--config.checkpoint.every=0"


def found(run, kind: str) -> list[dict]:
    return [incident for incident in incidents(run) if incident["kind"] == kind]


def test_a_run_goes_on_without_its_keeper_and_another_takes_over(supervised, calm):
    run, job = supervised(NO_DISK)
    at_step(run, job, 3)
    trainer = trainers(job)[0]
    os.kill(trainer, signal.SIGSTOP)  # its steps take less than a keeper needs to start
    os.kill(keeper(job), signal.SIGKILL)
    time.sleep(1)
    os.kill(trainer, signal.SIGCONT)
    _, error = job.communicate(timeout=240)
    assert job.returncode == 0, error
    assert [i["kind"] for i in incidents(run)] == ["keeper lost"]
    assert stored_state(run, STEPS) == calm(1)


@pytest.mark.parametrize(
    ("mesh", "source"),
    [("fsdp", "parity"), ("data", "peer")],
)
@pytest.mark.soak
def test_a_lost_host_comes_back_from_the_other(supervised, calm, mesh, source):
    """The second host goes with all its memory; nothing is on disk."""
    flags = [NO_DISK, f"--config.mesh.{mesh}=2", *(["--config.mesh.fsdp=1"] * (mesh == "data"))]
    (run, first), (_, second) = supervised(*flags, **host(0)), supervised(*flags, **host(1))
    at_step(run, first, 8)
    second.kill()
    _, again = supervised(*flags, **host(1))
    _, error = first.communicate(timeout=240)
    assert first.returncode == 0, error
    assert again.wait(120) == 0
    (recovered,) = found(run, "recovered")
    assert recovered["source"] == source and recovered["restored"] > 0
    if mesh == "fsdp":
        assert stored_state(run, STEPS) == calm(2)


@pytest.mark.soak
def test_two_of_three_hosts_lost_fall_back_to_disk(supervised, calm):
    hosts = [{**host(number), "JAX_NUM_PROCESSES": "3"} for number in range(3)]
    flags = ["--config.train.batch_size=12", "--config.model.width=48"]
    (run, first), *others = [supervised(*flags, **facts) for facts in hosts]
    at_step(run, first, 9)
    for _, job in others:
        job.kill()
    others = [supervised(*flags, **facts)[1] for facts in hosts[1:]]
    _, error = first.communicate(timeout=240)
    assert first.returncode == 0, error
    assert [job.wait(120) for job in others] == [0, 0]
    (recovered,) = found(run, "recovered")
    assert recovered["source"] == "disk" and recovered["restored"] >= 4


@pytest.mark.soak
def test_killed_at_any_moment_of_a_snapshot(supervised, calm):
    """Ten kills at chance moments, many of them while a snapshot is being written."""
    run, job = supervised(NO_DISK, "--tries", "50")
    draw = random.Random(0)
    for step in range(2, STEPS - 2, 2):
        at_step(run, job, step)
        time.sleep(0.02 * draw.random())
        for trainer in trainers(job):
            os.kill(trainer, signal.SIGKILL)
    _, error = job.communicate(timeout=240)
    assert job.returncode == 0, error
    assert {i["source"] for i in found(run, "recovered")} <= {"memory", "new"}
    assert stored_state(run, STEPS) == calm(1)
