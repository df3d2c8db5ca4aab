"""Signals and long waits in every phase of a trainer."""

import signal
import time

import pytest

from checkpoint.steps import complete_steps
from tests.trainer.recovery.runs import SLOW, STEPS, in_phase, incidents, launch
from tests.trainer.test_resume import stored_state

pytestmark = pytest.mark.multiprocess

EVAL = "--config.eval.every=8"
PHASES = ("start", "restore", "data", "step", "eval", "save", "compile")


@pytest.mark.soak
@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_any_phase_loses_nothing(supervised, calm, tmp_path, phase):
    """What was trained is saved, and the same command ends on the bits of a calm run."""
    run, job = supervised(
        SLOW, EVAL, "--grace", "30", SLOW=f"{phase}=2*1", TMPDIR=str(tmp_path),
    )  # fmt: skip
    at = in_phase(tmp_path, job, phase)
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate(timeout=120)
    assert job.returncode == 76, error
    saved = max(complete_steps(run / "checkpoints"), default=0)
    assert saved >= at.step
    again = launch(run, EVAL)
    _, error = again.communicate(timeout=240)
    assert again.returncode == 0, error
    assert stored_state(run, STEPS) == calm(1)


def test_a_second_ctrl_c_does_not_wait(supervised, tmp_path):
    """SIGTERM may be repeated by a scheduler; only a person presses Ctrl-C twice."""
    run, job = supervised(SLOW, SLOW="compile=600", TMPDIR=str(tmp_path))
    in_phase(tmp_path, job, "compile")
    job.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert job.poll() is None
    began = time.monotonic()
    job.send_signal(signal.SIGINT)
    assert job.wait(30) == 130 and time.monotonic() - began < 5
    assert not complete_steps(run / "checkpoints")


@pytest.mark.soak
def test_sigusr2_saves_for_another_size(supervised, tmp_path):
    run, job = supervised(SLOW, SLOW="data=0.5", TMPDIR=str(tmp_path))
    in_phase(tmp_path, job, "step")
    job.send_signal(signal.SIGUSR2)
    assert job.wait(60) == 78
    assert complete_steps(run / "checkpoints")


@pytest.mark.soak
def test_slow_phases_are_no_hangs(supervised, tmp_path):
    """Start, restore, compile, first batch and evaluation, each longer than a step may take."""
    slow = "start=4 restore=4 compile=4*1 eval=4*1 data=4*2"
    run, job = supervised(SLOW, EVAL, "--limit", "step=3", SLOW=slow, TMPDIR=str(tmp_path))
    _, error = job.communicate(timeout=240)
    assert job.returncode == 0, error
    assert not (run / "incidents.jsonl").exists()


@pytest.mark.soak
def test_a_folder_that_cannot_be_written_ends_with_its_own_status(supervised, tmp_path):
    run, job = supervised(SLOW, "--patience", "1", SLOW="data=0.2", TMPDIR=str(tmp_path))
    in_phase(tmp_path, job, "step")
    run.rename(tmp_path / "moved")
    run.write_text("not a folder")
    _, error = job.communicate(timeout=120)
    assert job.returncode == 73, error
    assert "cannot be written" in error
    run.unlink()
    (tmp_path / "moved").rename(run)
    kinds = (
        [incident["kind"] for incident in incidents(run)]
        if (run / "incidents.jsonl").exists()
        else []
    )
    assert kinds == []  # they could not be written either
