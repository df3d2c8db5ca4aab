"""The rules of health from numbers alone, and the schedules of faults."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import UsageError
from tests.processes import ROOT
from trainer.recovery.cadence import hours_between_failures, steps_between_saves
from trainer.recovery.chaos import Fault, parse
from trainer.recovery.health import HealthConfig, Rewinds, Watch


def healthy(watch: Watch, first: int, count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        watch.judge(step, 3.0 + 0.05 * rng.normal(), math.exp(0.2 * rng.normal()), False)
        for step in range(first, first + count)
    ]


def test_a_spike_is_told_from_noise():
    watch = Watch(HealthConfig())
    assert not any(healthy(watch, 1, 300))
    assert watch.judge(301, 3.0, 30.0, False) == "spike"
    assert watch.judge(302, 4.0, 1.0, False) == "spike"
    assert watch.judge(303, math.nan, 1.0, True) == "non-finite"
    assert watch.judge(304, 3.0, 1.0, True) == "spike"  # the step itself left it out
    assert watch.judge(305, 2.0, 0.1, False) == ""  # lower is no spike
    assert not watch.sustained


def test_without_enough_of_the_past_nothing_is_a_spike():
    watch = Watch(HealthConfig(window=64))
    assert not any(healthy(watch, 1, 20))
    assert watch.judge(21, 100.0, 100.0, False) == ""
    assert Watch(HealthConfig(window=0)).limits(5) == (math.inf, math.inf)


def test_spikes_do_not_become_usual():
    watch = Watch(HealthConfig(window=32, sustained=4))
    healthy(watch, 1, 64)
    verdicts = [watch.judge(step, 9.0, 50.0, False) for step in range(65, 165)]
    assert set(verdicts) == {"spike"} and watch.sustained


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 200), st.integers(0, 10**6))
def test_a_watch_that_was_stored_judges_alike(stop, seed):
    config = HealthConfig(window=16, sustained=3)
    rng = np.random.default_rng(seed)
    steps = [(s, float(rng.lognormal()), float(rng.lognormal()), False) for s in range(1, 250)]
    whole, first = Watch(config), Watch(config)
    verdicts = [(whole.limits(step[0] + 1), whole.judge(*step), whole.sustained) for step in steps]
    found = [(first.limits(s[0] + 1), first.judge(*s), first.sustained) for s in steps[:stop]]
    second = Watch(config, json.loads(json.dumps(first.state())))
    found += [(second.limits(s[0] + 1), second.judge(*s), second.sustained) for s in steps[stop:]]
    assert found == verdicts


def test_limits_of_a_step_do_not_know_the_step_before():
    """It is started before that one's numbers are on the host."""
    config = HealthConfig(window=8)
    watch, late = Watch(config), Watch(config)
    healthy(watch, 1, 20)
    healthy(late, 1, 19)
    assert watch.limits(21) == late.limits(21) == late.limits(22)


def test_a_step_is_good_after_healthy_ones():
    watch = Watch(HealthConfig(good_after=10))
    healthy(watch, 1, 9)
    assert watch.good == -1
    healthy(watch, 10, 5)
    assert watch.good == 4
    watch.judge(15, math.inf, 1.0, True)
    healthy(watch, 16, 9)
    assert watch.good == 4
    healthy(watch, 25, 1)
    assert watch.good == 15


def test_a_rewind_says_where_the_data_goes_on(tmp_path):
    assert Rewinds.read(tmp_path) == Rewinds()
    assert Rewinds().row_after({}, 80) == 80 and not Rewinds().gave_up(10, {})
    Rewinds(2, 2, to=10, row=300).write(tmp_path)
    past = Rewinds.read(tmp_path)
    assert past.row_after({"rewinds": 1}, 80) == 300  # a checkpoint from before it
    assert past.row_after({"rewinds": 2}, 320) == 320  # one that was written since
    assert past.gave_up(11, {"rewinds": 1}) and past.gave_up(12, {})
    assert not past.gave_up(10, {}) and not past.gave_up(11, {"rewinds": 2})


@pytest.mark.parametrize("name", ["window", "factor", "sustained", "good_after", "rewinds"])
def test_settings_that_make_no_sense(name):
    with pytest.raises(UsageError, match=rf"config.health.{name} = -1(\.0)?: at least"):
        HealthConfig(**{name: -1}).validate()


def test_schedules_are_read():
    assert parse("", 100) == []
    assert parse("nan@12, spike@20x3,kill@15/rank1,stuck@18/save,error@4xinf", 100) == [
        Fault("nan", 12), Fault("spike", 20, 3), Fault("kill", 15, 1, 1),
        Fault("stuck", 18, 1, None, "save"), Fault("error", 4, math.inf),
    ]  # fmt: skip
    assert parse("nan@?7", 100) == parse("nan@?7", 100) != parse("nan@?8", 100)
    assert 1 <= parse("nan@?7", 5)[0].step <= 5


@pytest.mark.parametrize("schedule", ["nam@3", "nan", "nan@x", "kill@3/lunch", "kill@3/rank"])
def test_what_is_no_schedule(schedule):
    with pytest.raises(UsageError, match="is not KIND@STEP"):
        parse(schedule, 10)


def test_a_process_is_ended_once_in_a_run(tmp_path):
    code = (
        "import sys; from trainer.recovery.chaos import Chaos; "
        "from trainer.recovery.progress import ProgressPage; "
        "page = Chaos('kill@3/rank0/save', 9, sys.argv[1]).page(ProgressPage(None)); "
        "page.enter('save', 2); page.enter('step', 3); print('here', flush=True); "
        "page.enter('save'); print('there')"
    )
    for status, said in ((-9, "here\n"), (0, "here\nthere\n")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
        )
        assert (done.returncode, done.stdout) == (status, said), done.stderr


def test_the_cadence_follows_costs_and_failures():
    assert hours_between_failures(16_384) == pytest.approx(54 * 24 / 419)
    assert hours_between_failures(8, failures=9, hours=100) < 0.2 * hours_between_failures(8)
    # sqrt(2 · 2 s · 3600 s) = 120 s of steps of 0.5 s
    assert steps_between_saves(2.0, 0.5, 1.0) == 240
    assert steps_between_saves(1e-9, 100.0, 1e-3) == 1


@given(st.floats(1e-3, 100), st.floats(1e-3, 100), st.floats(1e-2, 1e4))
def test_no_other_interval_loses_less(save, step, hours):
    """Young's expected loss: a save each interval, and half an interval each failure."""

    def loss(steps: int) -> float:
        return save / (steps * step) + steps * step / (2 * 3600 * hours)

    best = steps_between_saves(save, step, hours)
    assert loss(best) <= min(loss(best + 1), loss(max(1, best // 2)), loss(best * 2)) * 1.06
