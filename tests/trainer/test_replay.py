"""`torus replay`: a run's steps done again, and two runs that part."""

import json
import shutil

import jax
import pytest

from sharding.config import MeshConfig
from sharding.errors import UsageError
from tests.tiny import get_config
from trainer.commands import replay
from trainer.loop import train


def trained(folder, **settings):
    exp = get_config()
    exp.mesh, exp.train.steps = MeshConfig(data=4, fsdp=2), 14
    exp.log.fingerprint_every, exp.health.window, exp.health.skip_spikes = 3, 8, True
    for path, value in settings.items():
        part, _, leaf = path.partition("__")
        setattr(getattr(exp, part), leaf, value)
    train(exp, str(folder))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
        yield trained(tmp_path_factory.mktemp("runs") / "a")
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_sound_run_replays_bit_for_bit(run, capsys):
    assert replay.main([str(run), "--steps", "5:14"]) == 0
    out = capsys.readouterr().out
    assert "steps 5 to 14 done again, from checkpoint 4; compared after step 5:\n" in out
    assert "  loss and gradient norm are equal at 9 steps: 6-14\n" in out
    assert "  all arrays are equal in every bit at 5 steps: 6, 8-9, 12, 14\n" in out
    assert replay.main([str(run), "--steps", "6:7"]) == 0
    out = capsys.readouterr().out
    assert "  loss and gradient norm are equal at 1 step: 7\n" in out
    assert "arrays were not compared: no fingerprints of these steps were recorded" in out


def test_a_step_that_went_wrong_is_named(run, tmp_path, capsys):
    """One bit in one replica: the run went on with it, its repeat does not have it."""
    hurt = trained(tmp_path / "hurt", health__chaos="flip@10", health__compare_every=0)
    chaos = json.loads((hurt / "experiment.json").read_text())
    chaos["health"]["chaos"] = ""
    (hurt / "experiment.json").write_text(json.dumps(chaos))
    assert replay.main([str(hurt), "--steps", "8:14"]) == 1
    assert "differs from its repeat first at step 1" in capsys.readouterr().out
    assert replay.main([str(run), "--against", str(hurt)]) == 1
    out = capsys.readouterr().out
    assert "equal until step" in out and f"{hurt} differs from its repeat" in out
    assert f"{run} differs" not in out and "done again they part" not in out


@pytest.mark.soak
def test_two_experiments_part_where_they_do(run, tmp_path, capsys):
    other = trained(tmp_path / "other", optimizer__clip_norm=0.0, train__stop_at=4)
    assert replay.main([str(run), "--against", str(other)]) == 1
    out = capsys.readouterr().out
    assert "done again they part at step" in out
    assert "config.optimizer.clip_norm: 1.0 → 0.0" in out
    assert "differs from its repeat" not in out


def test_a_run_against_itself(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    assert replay.main([str(run), "--against", str(tmp_path / "copy")]) == 0
    out = capsys.readouterr().out
    assert "the records of both runs up to step 14:\n" in out
    assert "equal at 14 steps: 1-14\n" in out and "bit at 7 steps: 3-4, 6, 8-9, 12, 14" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "9"], "two steps A:B"),
        (["--steps", "9:3"], "A before B"),
        ([], "give --steps A:B or --against"),
        (["--steps", "90:99"], "recorded nothing of steps 90:99"),
    ],
)
def test_mistakes(run, arguments, message):
    with pytest.raises(UsageError, match=message):
        replay.main([str(run), *arguments])


def test_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="is not a run"):
        replay.main([str(tmp_path), "--steps", "1:2"])
