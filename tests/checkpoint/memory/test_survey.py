"""What the first process finds out when hosts were lost: real keepers, trainers that are played."""

import numpy as np
import pytest

from checkpoint.memory.restore import _pieces, _Reader, _Survey
from checkpoint.memory.slots import HEADER
from tests.trainer.recovery.test_keeper import Hosts

pytestmark = pytest.mark.multiprocess


def write(job: Hosts, step: int, parts: dict[int, list[int]]) -> None:
    """Each rank writes these quarters of an array of 4 × 25 int32, counted from `step`."""
    for rank, quarters in parts.items():
        slots, pieces = job.slots[rank], []
        slot, offset = slots.begin(step), HEADER
        for quarter in quarters:
            values = np.arange(25, dtype=np.int32) + 25 * quarter + step
            slots.put(slot, offset, memoryview(values.view(np.uint8)))
            pieces.append(["w", "int32", [25 * quarter], [25], offset, [0, quarter]])
            offset += 128
        index = {"meta": {"step": step}, "sizes": {"w": 100}, "pieces": pieces}
        slots.commit(slot, step, offset, index)
        job.report(rank, "written", step, step)


@pytest.fixture
def job(tmp_path):
    made = Hosts(tmp_path, [4096, 8192, 4096], processes=1)
    yield made
    made.close()


def lose(job: Hosts, *hosts: int) -> None:
    for host in hosts:
        job.keepers[host]._process.kill()
        job.keepers[host]._process.wait()
        job.keepers[host].ensure()


def content(job: Hosts, step: int, plan: dict) -> list[int]:
    """Reads the array as the trainer of the first host would."""
    return _Reader(job.directories[0], step).box(_pieces(plan, 0)["w"], (10,), (90,)).tolist()


def test_the_newest_step_of_all_is_found_and_a_lost_host_computed(job):
    sharded = {0: [0], 1: [1, 2], 2: [3]}
    for rank in range(3):
        job.reserve(rank)
    for _ in range(2):
        step = job.named()
        write(job, step, sharded)
        job.counted(step)
    later = job.named()
    write(job, later, {0: [0], 2: [3]})  # a trainer dies before it has written
    survey = _Survey(job.directories[0])
    assert survey.steps()[:2] == [later, step]
    assert survey.plan(later)["problem"] == "lost with hosts 1"
    plan = survey.plan(step)
    assert (plan["source"], plan["meta"]) == ("memory", {"step": step})
    assert content(job, step, plan) == list(range(10 + step, 100 + step))
    lose(job, 1)
    plan = _Survey(job.directories[0]).plan(step)
    assert plan["source"] == "parity"
    assert content(job, step, plan) == list(range(10 + step, 100 + step))
    lose(job, 1, 2)
    assert "lost with hosts 1, 2" in _Survey(job.directories[0]).plan(step)["problem"]


def test_where_others_hold_the_same_nothing_is_computed(job):
    for rank in range(3):
        job.reserve(rank)
    step = job.named()
    write(job, step, {0: [0, 1], 1: [2, 3, 0], 2: [1, 2, 3]})
    job.counted(step)
    lose(job, 1)
    plan = _Survey(job.directories[0]).plan(step)
    assert plan["source"] == "peer" and not plan["same_layout"]
    assert content(job, step, plan) == list(range(10 + step, 100 + step))
