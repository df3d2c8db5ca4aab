"""Runs with faults in them, in this process: what is recorded, what is left out, where they end."""

import json
import math

import jax
import numpy as np
import pytest

from checkpoint.steps import complete_steps, good_steps
from sharding.config import MeshConfig
from tests.tiny import get_config
from tests.trainer.test_resume import stored_state
from trainer.loop import train
from trainer.metrics import read_metrics
from trainer.recovery.health import Unhealthy


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    """One compilation cache for this module; the dataset is written once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield
        jax.config.update("jax_compilation_cache_dir", before)


def experiment(**health):
    exp = get_config()
    exp.mesh = MeshConfig(data=4, fsdp=2)
    exp.train.steps = 60
    exp.health.window, exp.health.sustained, exp.health.good_after = 16, 4, 6
    for name, value in health.items():
        setattr(exp.health, name, value)
    return exp


def events(run, *names) -> list[dict]:
    return [e for e in read_metrics(run, "event") if e["event"] in names]


def test_a_bad_batch_is_recorded_and_the_run_goes_on(tmp_path):
    exp = experiment(chaos="nan@30,spike@45", skip_spikes=True)
    assert train(exp, str(tmp_path)).step == 60
    nan, spike = events(tmp_path, "non-finite", "spike", "rewind")
    assert (nan["event"], nan["step"], nan["update"]) == ("non-finite", 30, "left out")
    assert (spike["event"], spike["step"], spike["update"]) == ("spike", 45, "left out")
    skipped = {r["step"] for r in read_metrics(tmp_path, "train") if r["skipped_steps"]}
    assert skipped == {30, 45}
    good = good_steps(tmp_path / "checkpoints")
    assert good and max(good) <= 54


def test_a_spike_is_kept_unless_asked(tmp_path):
    train(experiment(chaos="spike@45"), str(tmp_path))
    (spike,) = events(tmp_path, "non-finite", "spike", "rewind")
    assert (spike["event"], spike["step"], spike["update"]) == ("spike", 45, "kept")
    assert not any(r["skipped_steps"] for r in read_metrics(tmp_path, "train"))


@pytest.mark.parametrize("stop", [29, 30, 31, 32])
def test_a_resumed_run_decides_as_if_it_had_not_stopped(tmp_path, whole, stop):
    """Also where it stops right before, at and after a step that is left out."""
    exp = experiment(chaos="spike@31x2", skip_spikes=True)
    exp.train.stop_at = stop
    train(exp, str(tmp_path))
    exp.train.stop_at = 0
    train(exp, str(tmp_path))
    assert stored_state(tmp_path, 60) == whole
    assert {e["step"] for e in events(tmp_path, "spike")} == {31, 32}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(experiment(chaos="spike@31x2", skip_spikes=True), str(folder))
    return stored_state(folder, 60)


def test_a_sustained_spike_rewinds_past_its_data(tmp_path):
    """Killed after it or not, the run ends on the same bits: those without the data window."""
    exp = experiment(chaos="nan@33x20")
    train(exp, str(tmp_path / "a"))
    (rewind,) = events(tmp_path / "a", "rewind")
    assert rewind["step"] == 36 and rewind["to"] % 4 == 0 and rewind["to"] <= 27
    assert rewind["row"] == 36 * 8
    again = events(tmp_path / "a", "rewind", "non-finite")
    # 17 of the bad batches lie behind the first rewind's row: every rewind skips four or more.
    assert len(again) >= 5
    assert complete_steps(tmp_path / "a/checkpoints")[-1] == 60
    meta = json.loads((tmp_path / "a/checkpoints/60/meta/data.json").read_text())
    assert meta["data"]["next_row"] > 60 * 8 and meta["rewinds"] == len(
        events(tmp_path / "a", "rewind")
    )
    exp.train.stop_at = 42
    train(exp, str(tmp_path / "b"))
    exp.train.stop_at = 0
    train(exp, str(tmp_path / "b"))
    assert stored_state(tmp_path / "b", 60) == stored_state(tmp_path / "a", 60)


def test_when_all_rewinds_are_spent_the_run_ends_with_71(tmp_path):
    exp = experiment(chaos="nan@33x1000", rewinds=2)
    with pytest.raises(Unhealthy, match="all 2 rewinds are spent") as caught:
        train(exp, str(tmp_path))
    assert caught.value.status == 71
    assert len(events(tmp_path, "rewind")) == 2
    with pytest.raises(Unhealthy):  # started again it remembers
        train(exp, str(tmp_path))
    assert len(events(tmp_path, "rewind")) == 2


def test_a_flipped_bit_in_one_replica_is_found_and_named(tmp_path):
    exp = experiment(chaos="flip@14", compare_every=5)
    with pytest.raises(Unhealthy, match="other bits than the replicas hold") as caught:
        train(exp, str(tmp_path))
    assert caught.value.status == 77 and "device 7 of process 0" in str(caught.value)
    (found,) = events(tmp_path, "corruption")
    assert found["step"] == 15
    exp.health.chaos = ""
    train(exp, str(tmp_path))  # elsewhere it goes on from what the replicas agreed on
    calm = experiment(compare_every=5)
    train(calm, str(tmp_path / "calm"))
    assert stored_state(tmp_path, 60) == stored_state(tmp_path / "calm", 60)


def test_of_two_replicas_it_cannot_be_told(tmp_path):
    exp = experiment(chaos="flip@3", compare_every=3)
    exp.mesh = MeshConfig(data=2, fsdp=4)
    with pytest.raises(Unhealthy, match="which is wrong cannot be told"):
        train(exp, str(tmp_path))


def test_a_step_done_twice_gives_the_same_bits_unless_a_device_lies(tmp_path, monkeypatch):
    exp = experiment(replay_every=4)
    exp.train.stop_at = 8
    train(exp, str(tmp_path / "a"))
    assert not events(tmp_path / "a", "corruption")
    from trainer import guard

    def lying_copy(state):
        copy = jax.tree.map(jax.numpy.copy, state)
        return copy.replace(params=jax.tree.map(lambda p: p * (1 + 1e-6), copy.params))

    monkeypatch.setattr(guard, "_copy", lying_copy)
    with pytest.raises(Unhealthy, match="the same step, done twice, gave other bits"):
        train(exp, str(tmp_path / "b"))


def test_the_cadence_is_chosen_and_changes_no_bits(tmp_path):
    exp = experiment()
    exp.checkpoint.every = -1
    train(exp, str(tmp_path / "auto"))
    (cadence,) = events(tmp_path / "auto", "cadence")
    assert cadence["step"] == 20 and cadence["every"] > 1
    assert cadence["hours_between_failures"] == pytest.approx(50_672 / 8, rel=1e-3)
    exp.checkpoint.every = 0
    train(exp, str(tmp_path / "none"))
    assert stored_state(tmp_path / "auto", 60) == stored_state(tmp_path / "none", 60)


def test_reads_that_fail_are_tried_again(tmp_path):
    exp = experiment(chaos="error@12x2")
    exp.train.stop_at = 16
    assert train(exp, str(tmp_path / "a")).step == 16
    exp.health.chaos = "error@12xinf"
    with pytest.raises(ConnectionError, match="the read of step 12 fails"):
        train(exp, str(tmp_path / "b"))


def test_without_faults_nothing_is_found(tmp_path):
    """2,000 judged steps of noise are in test_health; here are those of a model that learns."""
    exp = experiment(compare_every=7)
    train(exp, str(tmp_path))
    assert not events(tmp_path, "spike", "non-finite", "rewind", "corruption")
    losses = [r["loss"] for r in read_metrics(tmp_path, "train")]
    assert losses[-1] < losses[0] and not any(map(math.isnan, losses))
    assert np.isfinite(losses).all()
