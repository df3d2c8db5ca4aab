"""Scores of processes from their times alone."""

from trainer.recovery.stragglers import Scores, worst


def test_the_slowest_is_named_against_the_others_and_its_own_past():
    scores = Scores()
    for _ in range(20):
        found = scores.update([[1.0, 5.0], [1.1, 5.0], [0.9, 5.2], [1.0, 5.0]])
    assert found["dispatch"] == [2, 1.04, 1.0]
    slow = scores.update([[1.0, 5.0], [1.1, 5.0], [0.9, 5.2], [6.0, 5.0]])
    assert slow["data"] == [3, 5.71, 6.0]  # the median of the four is 1.05


def test_times_too_short_to_matter_give_no_ratio():
    assert Scores().update([[0.001, 1.0], [0.05, 1.0]])["data"][1] < 1


def test_the_report_names_who_is_slow_again_and_again():
    records = [{"slowest": {"data": [3, 2.4, 1.0], "dispatch": [1, 1.2, 1.0]}}] * 17
    records += [{"slowest": {"data": [0, 1.3, 1.0], "dispatch": [2, 1.1, 1.0]}}] * 3 + [{}]
    assert worst(records) == "process 3 in data: 2.4 times the median, 17 of 20 records"
    assert worst([{}]) is None
