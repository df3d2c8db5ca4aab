"""Which folders count as steps, and what is said when the wanted one is not there."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import steps
from checkpoint.config import CheckpointConfig, validate
from sharding.errors import UsageError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name / "state").mkdir(parents=True)
        (folder / name / "state" / "_METADATA").write_text("{}")
    return folder


def test_only_whole_numbered_folders_are_steps(tmp_path):
    fill(tmp_path, "10", "9", "11.orbax-checkpoint-tmp", "007", "notes", "-3")
    (tmp_path / "12").write_text("a file")
    assert steps.complete_steps(tmp_path) == [9, 10]
    assert steps.interrupted_saves(tmp_path) == ["11.orbax-checkpoint-tmp"]
    assert steps.complete_steps(tmp_path / "absent") == steps.interrupted_saves("absent") == []


def test_pick_step(tmp_path):
    assert steps.pick_step(fill(tmp_path, "9", "10")) == 10
    assert steps.pick_step(tmp_path, 9) == 9
    with pytest.raises(UsageError, match=r"^no step 8 in .*; complete steps are 9, 10$"):
        steps.pick_step(tmp_path, 8)


@pytest.mark.parametrize("step", [None, 3])
def test_no_complete_step(tmp_path, step):
    with pytest.raises(UsageError, match=r"^no complete step in .*; found nothing$"):
        steps.pick_step(tmp_path, step)
    with pytest.raises(UsageError, match=r"^no complete step in .*; the folder does not exist$"):
        steps.pick_step(tmp_path / "absent", step)
    fill(tmp_path, "3.orbax-checkpoint-tmp")
    with pytest.raises(UsageError, match=r"found 3\.orbax-checkpoint-tmp \(interrupted save\)$"):
        steps.pick_step(tmp_path, step)


def test_long_lists_are_cut(tmp_path):
    fill(tmp_path, *(str(step) for step in range(20)))
    with pytest.raises(UsageError, match=r"are 0, 1, 2, 3, 4, 5, 6, 7 and 12 more$"):
        steps.pick_step(tmp_path, 99)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, {50}), (2, 0, {40, 50}), (9, 0, {10, 20, 30, 40, 50}), (1, 20, {20, 40, 50})],
)
def test_retention(keep_last, keep_every, kept):
    assert steps.kept_steps([10, 20, 30, 40, 50], keep_last, keep_every) == kept


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 4), st.integers(0, 6), st.integers(3, 300))
def test_the_ladder_is_short_and_reaches_far_back(every, keep_last, rungs, saves):
    have: set[int] = set()
    for step in range(every, every * (saves + 1), every):
        have.add(step)
        have = steps.kept_steps(sorted(have), keep_last, 0, rungs)
        assert len(have) <= keep_last + rungs
    ages = sorted((every * saves - step) // every for step in have)
    assert ages[:keep_last] == list(range(min(keep_last, saves)))
    if rungs and saves > (keep_last + 2) << rungs:
        assert 4 * ages[-1] >= 2**rungs


def test_deleting_hides_the_step_before_it_goes(tmp_path, monkeypatch):
    fill(tmp_path, "1", "2")
    monkeypatch.setattr(steps.shutil, "rmtree", lambda *_, **__: None)  # killed at this point
    steps.delete_step(tmp_path, 1)
    monkeypatch.undo()
    assert steps.complete_steps(tmp_path) == [2]
    assert steps.clean_interrupted(tmp_path) == ["1.orbax-checkpoint-tmp-deleted"]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_addresses_and_paths():
    assert steps.is_remote("gs://bucket/run") and not steps.is_remote("/tmp/run")
    assert str(steps.folder_path("gs://bucket/run") / "3") == "gs://bucket/run/3"
    assert steps.folder_path("run").is_absolute()


def test_cleaning_one_step_spares_the_others(tmp_path):
    names = ["1.orbax-checkpoint-tmp", "11.orbax-checkpoint-tmp"]
    fill(tmp_path, "2", *names)
    assert steps.clean_interrupted(tmp_path, 1) == names[:1]
    assert steps.clean_interrupted(tmp_path) == names[1:]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write checkpoints to .*file/run: .*Not a dir"):
        steps.make_writable(tmp_path / "file" / "run")
    with pytest.raises(UsageError, match=r"cannot write checkpoints to /proc/self: no permission"):
        steps.make_writable("/proc/self")


@pytest.mark.parametrize(
    ("field", "value"), [("every", -2), ("keep_last", 0), ("keep_every", -5), ("chunk_mib", -1)]
)
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(UsageError, match=rf"checkpoint\.{field} is {value}; it must be at least"):
        validate(CheckpointConfig(**{field: value}))


def test_neither_jax_nor_orbax_is_imported():
    modules = "checkpoint.config, checkpoint.steps, checkpoint.manifest"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
