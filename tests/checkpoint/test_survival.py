"""Real processes: two of one job, killed ones, full disks and damaged files."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint import steps
from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager
from checkpoint.storage import load_step
from tests.checkpoint.two_processes import SHAPES
from tests.processes import ROOT, run_processes

HERE = Path(__file__).parent


def abstract_of(shapes):
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        for name, shape in shapes.items()
    }


@pytest.mark.multiprocess
def test_one_process_to_two_and_back(tmp_path):
    shapes = {name: shape for name, (shape, _) in SHAPES.items()}
    state = {
        name: jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)
        for name, shape in shapes.items()
    }
    with CheckpointManager(tmp_path / "one", CheckpointConfig(every=1)) as manager:
        manager.save(1, state, {"from": "one process"})
    results = run_processes(
        HERE / "two_processes.py", 2, 4, [tmp_path / "one", tmp_path / "two"], timeout=180
    )
    for result in results:
        assert "an array of this process alone: x" in result.stdout
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"6", "12", "12.damaged"}
    restored, meta = load_step(tmp_path / "two", 6, abstract_of(shapes))
    assert meta == {"step": 6}
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old + 6), restored, state)


@pytest.mark.multiprocess
def test_two_processes_agree_on_the_step_when_one_sees_an_old_listing(tmp_path):
    """Otherwise shards of two steps are mixed without a word, or one waits for the other."""
    array = jnp.full((8,), 1.0)
    with CheckpointManager(tmp_path / "other", CheckpointConfig()) as manager:
        manager.save(20, {"w": array}, {"step": 20}, force=True)
    results = run_processes(HERE / "stale_listing.py", 2, 1, [tmp_path], timeout=300)
    first, second = (
        dict(line.split(" | ") for line in result.stdout.splitlines() if " | " in line)
        for result in results
    )
    expected = {"late": "step 20 sum 160", "load": "sum 160", "none": "{'step': 20}"}
    for told in (first, second):
        assert {name: told[name] for name in expected} == expected
        assert told["never"].startswith("NotVisibleError: process 1 does not see step 20")
        assert "UsageError" in told["absent"] and "no step 15" in told["absent"]
        assert told["deleted"] == "True"
        assert "read different contents of step 20" in told["other"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("rounds", [2, pytest.param(10, marks=pytest.mark.soak)])  # of 2 kills
def test_killed_at_any_moment(tmp_path, rounds):
    shapes = {"w": (1024, 1024), "v": (1024,)}
    abstract = abstract_of(shapes)
    abstract["b"] = {"v": abstract.pop("v")}
    chance = random.Random(rounds)
    newest = {tmp_path / name: 0 for name in "ab"}
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            victims = {folder: start_victim(folder, stack) for folder in newest}
            last = {
                folder: kill(victim, folder, chance.uniform(0.02, 0.5))
                for folder, victim in victims.items()
            }
        for folder, started in last.items():
            complete = steps.complete_steps(folder)
            # The step before the one whose save had begun was awaited, so it must be there.
            assert complete[-1] in (started, started - 1), (complete, started)
            assert newest[folder] < complete[-1]
            newest[folder] = complete[-1]
            for step in complete:
                state, meta = load_step(folder, step, abstract)
                assert meta == {"step": step}
                assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(state))
    for folder in newest:
        with CheckpointManager(folder, CheckpointConfig()):
            pass
        assert steps.interrupted_saves(folder) == []


def start_victim(folder, stack):
    with Path(f"{folder}.err").open("w") as errors:
        victim = subprocess.Popen(
            [sys.executable, str(HERE / "killed.py"), str(folder)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=worker_environment(),
        )
    stack.enter_context(victim)
    stack.callback(victim.kill)
    return victim


def kill(victim, folder, seconds):
    """Kills a process some time after its first commit; returns the last step it began to save."""
    begun = victim.stdout.readline() + victim.stdout.readline()
    time.sleep(seconds)
    victim.kill()
    begun += victim.stdout.read()
    assert victim.wait() == -signal.SIGKILL, Path(f"{folder}.err").read_text()[-2000:]
    return int(begun.split()[-1])


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    result = subprocess.run(
        [sys.executable, str(HERE / "faults.py"), str(tmp_path_factory.mktemp("faults"))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=180,
        check=False,
        env=worker_environment(),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def worker_environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


def test_full_disk(faults):
    found = faults["disk"]
    for moment, step in (("poll", 2), ("next save", 2), ("close", 4)):
        assert f"saving step {step} to " in found[moment] and "File too large" in found[moment]
    assert found["steps"] == [1] and found["left"] == ["1"]
    assert found["afterwards"] == [1, 5]


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "emptied",
        "deleted",
        "state",
        "state/manifest.ocdbt",
        "state/_METADATA",
        "meta/data.json",
        "manifest/data.json",
    ],
)
def test_damage_names_the_step(faults, kind):
    assert "cannot read step 2 in " in faults["damage"][kind]
    assert len(faults["damage"][kind]) < 600
