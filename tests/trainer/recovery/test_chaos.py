"""Faults of a schedule in supervised runs: they end on the bits of a run without."""

import pytest

from tests.trainer.recovery.runs import SLOW, STEPS, incidents, launch
from tests.trainer.test_resume import stored_state
from trainer.goodput import measure
from trainer.metrics import read_metrics

pytestmark = [pytest.mark.multiprocess, pytest.mark.soak]
FAST = ("--limit", "step=4", "--limit", "data=4", "--limit", "save=4")


@pytest.mark.parametrize(
    ("processes", "schedule", "faults"),
    [
        (1, "kill@?1,kill@?2/data,kill@12/save", ["crash"] * 3),
        (2, "stop@?3/rank1,stuck@17/rank0", ["hang"] * 2),
        (2, "kill@12/rank0/save,kill@?5/rank1", ["crash"] * 2),
    ],
)
def test_processes_that_fail_at_any_step_change_no_bits(
    supervised, calm, processes, schedule, faults
):
    run, job = supervised("--processes", str(processes), *FAST, f"--config.health.chaos={schedule}")
    _, error = job.communicate(timeout=280)
    assert job.returncode == 0, error
    found = [i["kind"] for i in incidents(run) if i["kind"] != "recovered"]
    assert set(found) == set(faults) and len(found) <= len(faults)
    assert stored_state(run, STEPS) == calm(processes)
    accounts = measure(run)
    assert accounts.faults == len(found) and 0 < accounts.share < 1
    assert accounts.bad["restart"] > 0


@pytest.mark.parametrize(
    ("schedule", "settings", "status"),
    [
        ("flip@6", ["--config.mesh.data=4", "--config.health.compare_every=2"], 77),
        ("nan@5x99", ["--config.health.sustained=3", "--config.health.rewinds=1"], 71),
        ("error@5xinf", [], 70),
    ],
)
def test_what_no_restart_cures_ends_with_its_status(supervised, schedule, settings, status):
    run, job = supervised(
        f"--config.health.chaos={schedule}", *settings, "--tries", "2",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )  # fmt: skip
    _, error = job.communicate(timeout=280)
    assert job.returncode == status, error
    if status != 70:
        assert any(e["event"] in ("corruption", "rewind") for e in read_metrics(run, "event"))


def test_times_of_all_processes_are_exchanged(supervised):
    run, job = supervised("--processes", "2")
    _, error = job.communicate(timeout=280)
    assert job.returncode == 0, error
    scores = [r["slowest"] for r in read_metrics(run, "train") if r.get("slowest")]
    assert len(scores) > STEPS // 2
    assert {score["data"][0] for score in scores} <= {0, 1}


def test_two_processes_rewind_alike_killed_or_not(tmp_path):
    states = []
    for name, more in (("calm", ""), ("killed", ",kill@12/rank1,kill@20/rank0")):
        job = launch(
            tmp_path / name, "--processes", "2", f"--config.health.chaos=nan@14x6{more}",
            "--config.health.sustained=3", "--config.health.good_after=3",
        )  # fmt: skip
        _, error = job.communicate(timeout=250)
        assert job.returncode == 0, error
        rewinds = [e for e in read_metrics(tmp_path / name, "event") if e["event"] == "rewind"]
        assert {(e["step"], e["to"]) for e in rewinds} == {(16, 8), (11, 8)}
        states.append(stored_state(tmp_path / name, STEPS))
    assert states[0] == states[1]


def test_a_schedule_played_again_gives_the_same(own_cache, tmp_path):
    """The same incidents, but for their times, and the same bits at the end."""
    schedule = "kill@?13/rank1,nan@12,kill@?9/rank0/data"
    found = []
    for name in ("once", "again"):
        job = launch(
            tmp_path / name, SLOW, "--processes", "2", "--config.checkpoint.every=0",
            "--config.checkpoint.snapshot_every=6", f"--config.health.chaos={schedule}",
            SLOW="data=0.3",
        )  # fmt: skip
        _, error = job.communicate(timeout=250)
        assert job.returncode == 0, error
        told = [
            {key: i[key] for key in i.keys() - {"time", "seconds", "ending"}}
            for i in incidents(tmp_path / name)
        ]
        found.append((told, stored_state(tmp_path / name, STEPS)))
    assert found[0] == found[1]
    assert [i["kind"] for i in found[0][0]] == ["crash", "recovered"] * 2
