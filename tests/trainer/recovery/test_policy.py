"""The decisions of the supervisor, from facts alone."""

import signal
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.recovery import policy
from trainer.recovery.policy import (
    Budget,
    End,
    PhaseLimits,
    first_cause,
    is_certain,
    permanent,
)
from trainer.recovery.progress import PHASES, Progress, ProgressPage


def end(rank: int, status: int | None, step: int = 5, changes: int = 50) -> End:
    return End(rank, status, Progress("step", step, 1.0, changes))


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        ([end(0, 1), end(1, -signal.SIGKILL), end(2, -signal.SIGABRT)], 1),
        ([end(0, -signal.SIGABRT), end(1, 1), end(2, 2)], 2),
        ([end(0, 1), end(1, 1)], 0),
        ([end(0, None, 7), end(1, None, 6), end(2, None, 7)], 1),
        ([end(0, None, 7, 71), end(1, None, 7, 70)], 1),
        ([end(0, None, 7), replace(end(1, None, 7), stopped=True)], 1),
    ],
)
def test_the_one_that_failed_first_is_blamed(ends, rank):
    assert first_cause(ends).rank == rank


def test_an_end_says_how_it_came():
    """The text that incidents and the report give as the cause."""
    assert end(0, None).text == "hung"
    assert end(0, -signal.SIGKILL).text == "killed by SIGKILL"
    assert end(0, 77).text == "ended with status 77"


def test_what_no_retry_cures():
    assert [permanent(end(0, s)) for s in (2, 3, 4, 1, -9, None)] == [64, 65, 65, None, None, None]


def test_tries_count_only_without_progress():
    budget = Budget(3, best=4)
    assert budget.spend(4) and budget.spend(4) and budget.pause > 0
    assert budget.spend(8) and budget.pause == 0
    assert budget.spend(8) and budget.spend(8) and not budget.spend(8)


@given(st.lists(st.integers(-1, 50), min_size=1, max_size=60), st.integers(1, 5))
def test_a_budget_ends_after_so_many_tries_in_a_row(checkpoints, tries):
    budget, best, wasted = Budget(tries), -1, 0
    for checkpoint in checkpoints:
        wasted = 0 if checkpoint > best else wasted + 1
        best = max(best, checkpoint)
        assert budget.spend(checkpoint) == (wasted < tries)
        assert 0 <= budget.pause <= 30


def test_limits_are_learned_from_enough_of_the_past():
    limits = PhaseLimits({"save": 7.0})
    assert limits.of("step") == policy._FIRST_LIMITS["step"] and limits.of("save") == 7.0
    for i in range(100):
        limits.learn(
            Progress("step", i, 2.0 * i, 2 * i + 1), Progress("step", i, 2.0 * i + 2, 2 * i + 3)
        )
    assert limits.of("step") == 40.0
    limits.learn(Progress("step", 1, 0.0, 9), Progress("step", 1, 500.0, 9))  # it did not move
    limits.learn(Progress("step", 1, 0.0, 9), Progress("eval", 1, 500.0, 10))
    assert limits.of("step") == 40.0 and limits.of("eval") == policy._FIRST_LIMITS["eval"]


@pytest.mark.parametrize("phase", ["compile", "restore"])
def test_quick_compilations_and_restores_do_not_limit_the_next_one(phase):
    """Restarts find programs in the cache and state in memory; then neither is there."""
    limits = PhaseLimits()
    for i in range(100):
        limits.learn(Progress(phase, i, 2.0 * i, i), Progress(phase, i, 2.0 * i + 0.1, i + 1))
    assert limits.of(phase) == policy._FIRST_LIMITS[phase]
    assert PhaseLimits({phase: 7.0}).of(phase) == 7.0


@pytest.mark.parametrize(
    ("data", "step"), [(0.015, 0.15), (0.025, 0.15), (0.5, 5.0), (0.03, 0.0), (0.0, 0.25)]
)
def test_limits_are_learned_however_long_the_other_phase_is(data, step):
    """Looked at every 20 ms, as the supervisor does."""
    limits, page, now, changes = PhaseLimits(), [], 1.0, 0
    for number in range(40):
        for phase, took in (("data", data), ("step", step)):
            changes += 1
            page.append(Progress(phase, number, now, changes))
            now += took
    look, before, place = 1.0, page[0], 0
    while look < now:
        while place + 1 < len(page) and page[place + 1].since <= look:
            place += 1
        limits.learn(before, page[place])
        before = page[place]
        look += 0.02
    for phase, took in (("data", data), ("step", step)):
        if took > 0.02:
            assert limits.of(phase) == pytest.approx(max(10.0, 20 * took), rel=0.2)


def test_limits_widen_after_a_hang_and_not_for_ever():
    limits = PhaseLimits({"save": 7.0})
    for i in range(20):
        limits.learn(Progress("step", i, 1.0 + i, i), Progress("data", i, 2.0 + i, i + 1))
    assert limits.of("step") == 20.0
    found = []
    for _ in range(4):
        limits.widen()
        found.append(limits.of("step"))
    assert found == [40.0, 80.0, 80.0, 80.0]
    assert limits.of("save") == 7.0 and limits.of("eval") == policy._FIRST_LIMITS["eval"]


def test_what_is_unusual():
    limits = PhaseLimits()
    assert limits.unusual("step", 30.0)  # nothing is known
    for i in range(20):
        limits.learn(
            Progress("step", i, 60.0 * i + 1, i), Progress("step", i, 60.0 * i + 61, i + 1)
        )
    assert not limits.unusual("step", 60.0) and limits.unusual("step", 500.0)


@pytest.mark.parametrize(
    ("ends", "certain"),
    [
        ([end(0, 1), end(1, -signal.SIGKILL)], True),
        ([end(0, 1), end(1, 1)], False),  # each may be the other's victim
        ([end(0, -signal.SIGABRT), end(1, 1)], False),
        ([end(1, 1)], True),
        ([end(0, None, 7), end(1, None, 7), end(2, None, 7)], False),  # all wait for each other
        ([end(0, None, 7, 71), end(1, None, 7, 70), end(2, None, 7, 70)], False),
        ([end(0, None, 7), end(1, None, 6), end(2, None, 7)], True),
        ([end(0, None, 7), replace(end(1, None, 7), stopped=True)], True),
        ([end(0, 1), end(1, None, 6)], True),
    ],
)
def test_nobody_is_blamed_where_several_are_alike(ends, certain):
    assert is_certain(ends) == certain


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=600))
def test_a_learned_limit_is_never_below_what_was_usual(seconds):
    limits, now = PhaseLimits(), 1.0
    for number, took in enumerate(seconds):
        limits.learn(Progress("step", 0, now, number), Progress("step", 0, now + took, number + 1))
        now += took
    usual = sorted(seconds[-512:])[len(seconds[-512:]) // 2]
    assert min(usual, policy._FIRST_LIMITS["step"]) <= limits.of("step")
    assert policy._LEAST <= limits.of("step") <= policy._FIRST_LIMITS["step"]


def test_a_page_is_seen_through_its_file(tmp_path):
    writer, reader = ProgressPage(tmp_path / "page"), ProgressPage(tmp_path / "page")
    assert reader.read() == Progress("start", 0, 0.0, 0)
    for number, phase in enumerate(PHASES):
        writer.enter(phase, 10 * number)
        writer.enter(phase)
        found = reader.read()
        assert (found.phase, found.step, found.changes) == (phase, 10 * number, 2 * number + 2)
    assert reader.read().since > 0
