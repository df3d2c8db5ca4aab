"""Runs with faults in them, in this process: what is recorded, what is left out, where they end."""

import json
import signal

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.steps import good_steps
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from tests.tiny import get_config
from tests.trainer.test_resume import stored_state
from trainer import guard
from trainer.data import loader
from trainer.data.dataset import open_training
from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import ByteTokenizer
from trainer.loop import train
from trainer.metrics import read_metrics
from trainer.recovery.chaos import Chaos
from trainer.recovery.health import Unhealthy
from trainer.recovery.progress import ProgressPage

SOAK = pytest.mark.soak


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
    exp.train.steps, exp.checkpoint.every = 40, 8
    exp.health.window, exp.health.sustained, exp.health.good_after = 16, 4, 6
    for name, value in health.items():
        setattr(exp.health, name, value)
    return exp


def disturbed():
    """Two kinds of unhealthy steps, which are left out; some steps are done twice."""
    return experiment(chaos="nan@25,spike@31x2", skip_spikes=True, replay_every=15, compare_every=7)


def events(run, *names) -> list[dict]:
    return [e for e in read_metrics(run, "event") if e["event"] in names]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(disturbed(), str(folder)).step == 40
    return folder


def test_bad_batches_are_recorded_and_the_run_goes_on(whole):
    found = events(whole, "non-finite", "spike", "rewind", "corruption")
    assert [(e["event"], e["step"], e["update"]) for e in found] == [
        ("non-finite", 25, "left out"), ("spike", 31, "left out"), ("spike", 32, "left out"),
    ]  # fmt: skip
    skipped = {r["step"] for r in read_metrics(whole, "train") if r["skipped_steps"]}
    assert skipped == {25, 31, 32}
    assert max(good_steps(whole / "checkpoints")) == 32  # six healthy steps followed it


@pytest.mark.parametrize("stop", [31, *(pytest.param(s, marks=SOAK) for s in (24, 25, 30, 32, 33))])
def test_a_resumed_run_decides_as_if_it_had_not_stopped(tmp_path, whole, stop):
    """Also where it stops right before, at and after a step that is left out."""
    exp = disturbed()
    exp.train.stop_at = stop
    train(exp, str(tmp_path))
    exp.train.stop_at = 0
    train(exp, str(tmp_path))
    assert stored_state(tmp_path, 40) == stored_state(whole, 40)
    assert {e["step"] for e in events(tmp_path, "spike")} == {31, 32}


@pytest.mark.soak
def test_a_spike_is_kept_unless_asked(tmp_path):
    train(experiment(chaos="spike@33"), str(tmp_path))
    (spike,) = events(tmp_path, "non-finite", "spike", "rewind")
    assert (spike["event"], spike["step"], spike["update"]) == ("spike", 33, "kept")
    assert not any(r["skipped_steps"] for r in read_metrics(tmp_path, "train"))


def sustained():
    return experiment(chaos="nan@20x10")


def test_sustained_trouble_rewinds_past_its_data(tmp_path):
    train(sustained(), str(tmp_path))
    first, second = events(tmp_path, "rewind")
    # Four of the batches 20 to 29 bring it back each time; the last two do not.
    assert (first["step"], first["to"], first["row"]) == (23, 8, 23 * 8)
    assert (second["step"], second["to"], second["row"]) == (12, 8, 27 * 8)
    assert [e["step"] for e in events(tmp_path, "non-finite")][-2:] == [9, 10]
    meta = json.loads((tmp_path / "checkpoints/40/meta/data.json").read_text())
    assert (meta["data"]["next_row"], meta["rewinds"]) == ((27 + 40 - 8) * 8, 2)
    assert [r["step"] for r in read_metrics(tmp_path, "train")] == list(range(1, 41))


@pytest.mark.soak
@pytest.mark.parametrize("stop", [8, 16, 22, 30])
def test_a_run_stopped_between_rewinds_ends_on_the_same_bits(tmp_path, stop):
    """At 10 the stop would leave a newer good step, which the rewind rightly goes back to."""
    train(sustained(), str(tmp_path / "a"))
    exp = sustained()
    exp.train.stop_at = stop
    train(exp, str(tmp_path / "b"))
    train(sustained(), str(tmp_path / "b"))
    assert stored_state(tmp_path / "b", 40) == stored_state(tmp_path / "a", 40)


@pytest.mark.parametrize("budget", [0, pytest.param(2, marks=SOAK)])
def test_when_all_rewinds_are_spent_the_run_ends_with_71(tmp_path, budget):
    exp = experiment(chaos="nan@10x1000", rewinds=budget)
    for _ in range(2):  # started again it remembers
        with pytest.raises(Unhealthy, match=f"all {budget} rewinds are spent") as caught:
            train(exp, str(tmp_path))
        assert caught.value.status == 71
    assert len(events(tmp_path, "rewind")) == budget


def test_nothing_but_nan_is_no_success_without_a_window_either(tmp_path):
    exp = experiment(chaos="nan@1x1000", window=0, rewinds=0)
    with pytest.raises(Unhealthy, match="step 4: 4 of the last 8 steps were unhealthy") as caught:
        train(exp, str(tmp_path / "long"))
    assert caught.value.status == 71
    exp.train.stop_at = 3  # too short to be sure that it is sustained
    with pytest.raises(Unhealthy, match="all 3 updates were left out: nothing was learned"):
        train(exp, str(tmp_path / "short"))
    assert not events(tmp_path / "short", "finished", "stopped")


def test_a_signal_during_a_rewind_stops_the_run(tmp_path, monkeypatch):
    go_back = guard.Guard._go_back

    def signalled(self, *arguments):
        go_back(self, *arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(guard.Guard, "_go_back", signalled)
    result = train(sustained(), str(tmp_path))
    assert (result.step, result.stopped_by) == (8, "SIGTERM")
    assert events(tmp_path, "stopped")[-1]["step"] == 8 and not events(tmp_path, "finished")


def test_whatever_compiles_is_in_phase_compile(tmp_path, monkeypatch):
    """The limit of a step is learned from steps: a compilation in one would be taken for a hang."""
    with DatasetWriter(tmp_path / "data", ByteTokenizer()) as writer:
        for split in ("train", "val"):
            for length in (*[12] * 9, 30) * 60:
                document = np.arange(length) % 200
                document[:1] = ByteTokenizer.BOS
                writer.add(split, document, length - 1)
    exp = experiment(compare_every=5)
    exp.data.path, exp.data.buckets, exp.eval.batches = str(tmp_path / "data"), (16,), 1
    exp.train.steps, exp.checkpoint.every = 8, 4
    exp.eval.every, exp.log.fingerprint_every = 3, 7
    entered, steps, compiled = [], {}, []
    enter, step = ProgressPage.enter, guard.Guard.step

    def spy(page, phase, number=None):
        enter(page, phase, number)
        entered.append(phase)

    def spied(self, train_step, state, batch):
        before = train_step._cache_size()
        result = step(self, train_step, state, batch)
        steps[self._step] = entered[-1]
        compiled.extend([self._step] if train_step._cache_size() > before else [])
        return result

    monkeypatch.setattr(ProgressPage, "enter", spy)
    monkeypatch.setattr(guard.Guard, "step", spied)
    train(exp, str(tmp_path / "run"))
    assert len(compiled) == 2 and compiled[1] > 2  # both row lengths, the second one later
    first = {1, 2, *compiled, 5, 7}  # and the first comparison and the first fingerprints
    assert {n for n, phase in steps.items() if phase == "compile"} == first, steps
    for phase, times in (("eval", 3), ("save", 3)):
        places = [n for n, name in enumerate(entered) if name == phase]
        assert len(places) == times
        assert [entered[n - 1] == "compile" for n in places] == [True, False, False], entered


def test_a_flipped_bit_in_one_replica_is_found_and_named(tmp_path):
    exp = experiment(chaos="flip@5", compare_every=2)
    exp.checkpoint.every = exp.train.stop_at = 4
    train(exp, str(tmp_path))
    exp.train.stop_at = 10
    with pytest.raises(Unhealthy, match="other bits than the replicas hold") as caught:
        train(exp, str(tmp_path))
    assert caught.value.status == 77 and "device 7 of process 0" in str(caught.value)
    corruption, rewind = events(tmp_path, "corruption", "rewind")
    assert corruption["step"] == 6 and (rewind["to"], rewind["row"]) == (4, 32)


@pytest.mark.soak
def test_after_a_corruption_the_run_goes_on_from_what_was_agreed_on(tmp_path):
    exp = experiment(chaos="flip@14", compare_every=5)
    exp.checkpoint.every = 4
    with pytest.raises(Unhealthy):
        train(exp, str(tmp_path / "a"))
    exp.health.chaos = ""
    train(exp, str(tmp_path / "a"))
    train(exp, str(tmp_path / "b"))
    assert stored_state(tmp_path / "a", 40) == stored_state(tmp_path / "b", 40)


def test_a_step_done_twice_with_other_bits_ends_the_run(tmp_path, monkeypatch):
    exp = experiment(replay_every=3)
    exp.train.stop_at = 4

    @jax.jit
    def lying_copy(state):
        params = jax.tree.map(lambda p: p * (1 + 1e-6), state.params)
        return jax.tree.map(jax.numpy.copy, state.replace(params=params))

    monkeypatch.setattr(guard, "_copy", lying_copy)
    with pytest.raises(Unhealthy, match="the same step, done twice, gave other bits"):
        train(exp, str(tmp_path))


@pytest.mark.soak
def test_the_cadence_is_chosen_and_changes_no_bits(tmp_path):
    exp = experiment()
    exp.checkpoint.every = -1
    train(exp, str(tmp_path / "auto"))
    cadence = events(tmp_path / "auto", "cadence")[0]
    assert cadence["step"] == 20 and cadence["every"] > 1
    assert cadence["hours_between_failures"] == pytest.approx(50_672 / 8, rel=1e-3)
    exp.checkpoint.every = 0
    train(exp, str(tmp_path / "none"))
    assert stored_state(tmp_path / "auto", 40) == stored_state(tmp_path / "none", 40)


def test_reads_that_fail_are_tried_again(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "_PAUSES", (0.001, 0.001))
    exp = get_config()
    mesh = make_mesh(MeshConfig())
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def batches(schedule: str) -> list[str]:
        data = Chaos(schedule, 10, str(tmp_path)).data(open_training(exp.data, 8))
        with loader.Loader(data, 8, rows) as found:
            return [loader.batch_digest(next(found)) for _ in range(4)]

    calm = batches("")
    assert batches("error@3x2") == calm
    assert batches("spike@3")[:2] == calm[:2] != batches("spike@3")[1:3]
    with pytest.raises(ConnectionError, match="the read of step 3 fails"):
        batches("error@3xinf")
