"""Runs that are supervised, and the states that undisturbed ones end with."""

import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trainer.recovery.runs import STEPS, ended, launch
from tests.trainer.test_resume import stored_state


@pytest.fixture(scope="module")
def calm(own_cache, tmp_path_factory) -> Callable[[int], dict]:
    """Returns the last state of an undisturbed run in so many processes."""

    @functools.cache
    def state(processes: int) -> dict:
        folder = tmp_path_factory.mktemp("calm") / "run"
        job = launch(folder, "--processes", str(processes))
        error = ended(job)
        assert job.returncode == 0, error
        assert not (folder / "incidents.jsonl").exists()
        return stored_state(folder, STEPS)

    return state


@pytest.fixture
def supervised(own_cache, tmp_path) -> Iterator[Callable[..., tuple[Path, subprocess.Popen]]]:
    """Starts a run; whatever is left of it at the end is killed."""
    jobs = []

    def start(*arguments: str, **variables: str) -> tuple[Path, subprocess.Popen]:
        jobs.append(launch(tmp_path / "run", *arguments, **variables))
        return tmp_path / "run", jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.communicate()
