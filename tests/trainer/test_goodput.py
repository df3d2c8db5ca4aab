"""The accounts of a run, from records made by hand: every second is where it belongs."""

import json

import pytest

from trainer.goodput import failures, measure
from trainer.report import facts, load_run, render_html

STEP = 0.5  # seconds


def record(kind: str, step: int, time: float, **more) -> dict:
    return {"kind": kind, "step": step, "time": time, **more}


def trained(first: int, last: int, time: float, **more) -> list[dict]:
    """Train records of steps that end at `time`, `time` + STEP, …; the first has no rates."""
    return [
        record("train", step, time + STEP * n, loss=1.0, **({"step_ms": 500.0} | more if n else {}))
        for n, step in enumerate(range(first, last + 1))
    ]


def write(folder, records, incidents=()):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if incidents:
        (folder / "incidents.jsonl").write_text("".join(json.dumps(i) + "\n" for i in incidents))


def test_an_undisturbed_run(tmp_path):
    records = [
        record("event", 0, 100.0, event="start", steps=10),
        *trained(1, 10, 103.0, data_wait_ms=20.0),  # 2.5 s of compilation
        record("event", 10, 108.5, event="checkpoint", seconds=0.75),
        record("eval", 10, 109.5, loss=1.0, seconds=1.25),
        record("event", 10, 109.5, event="finished"),
    ]
    write(tmp_path, records)
    found = measure(tmp_path)
    assert found.wall == pytest.approx(9.5) and found.good == pytest.approx(5.0)
    assert found.share == pytest.approx(5 / 9.5)
    assert found.bad == pytest.approx(
        {"detect": 0, "restart": 0, "compile": 2.5, "rework": 0, "data wait": 0.18, "save": 0.75,
         "eval": 1.25}
    )  # fmt: skip
    assert (found.faults, found.lost_steps, found.detect, found.recover) == (0, 0, None, None)


def test_a_crash_costs_detection_restart_compilation_and_steps_done_twice(tmp_path):
    records = [
        record("event", 0, 0.0, event="start"),
        *trained(1, 20, 2.0),  # ends at 11.5
        record("event", 12, 14.5, event="resumed"),
        *trained(13, 30, 16.0),  # ends at 24.5
    ]
    crash = {"time": 12.25, "ending": 0.5, "kind": "crash", "rank": 1, "step": 20}
    recovered = {"time": 16.1, "kind": "recovered", "seconds": 4.25, "lost_steps": 8}
    write(tmp_path, records, [crash, recovered])
    found = measure(tmp_path)
    assert found.bad["detect"] == pytest.approx(0.25)
    assert found.bad["restart"] == pytest.approx(2.75)
    assert found.bad["compile"] == pytest.approx(1.5 + 1.0)
    assert found.bad["rework"] == pytest.approx(8 * STEP)
    assert (found.faults, found.lost_steps) == (1, 8)
    assert found.detect == pytest.approx(0.25) and found.recover == pytest.approx(4.25)
    # Every second of the wall time is good or has a cause, for a run that does nothing else.
    assert found.good + sum(found.bad.values()) == pytest.approx(found.wall)
    assert failures(tmp_path) == (1, pytest.approx((11.5 + 10.0) / 3600))
    page = render_html(load_run(tmp_path), b"", now=25.0)
    assert "Timeline" in page and page.count("<i title=") == len(found.spans)
    rows = dict(facts(load_run(tmp_path), now=25.0))
    assert rows["Faults"] == "1, 8 steps lost, found after 0.2 s, over after 4.2 s"
    assert rows["Lost to"].startswith("rework 4.0 s, restart 2.8 s")


def test_time_that_a_run_was_stopped_is_nobodys(tmp_path):
    records = [
        record("event", 0, 0.0, event="start"),
        *trained(1, 10, 1.0),
        record("event", 10, 6.0, event="stopped", by="SIGTERM"),
        record("event", 10, 1006.0, event="resumed"),
        *trained(11, 20, 1007.0),
    ]
    write(tmp_path, records)
    found = measure(tmp_path)
    assert found.wall == pytest.approx(11.5) and found.faults == 0
    assert failures(tmp_path) == (0, pytest.approx((6.0 + 5.5) / 3600))  # and no time without any
    assert [span.kind for span in found.spans if span.end - span.begin > 100] == ["stopped"]


def test_a_rewind_is_a_fault_that_loses_steps(tmp_path):
    records = [
        record("event", 0, 0.0, event="start"),
        *trained(1, 20, 1.0),
        record("event", 20, 10.6, event="rewind", to=8, lost_steps=12, row=160),
        record("event", 8, 11.6, event="resumed"),
        *trained(9, 20, 13.0),
    ]
    write(tmp_path, records)
    found = measure(tmp_path)
    assert (found.faults, found.lost_steps, found.bad["restart"]) == (1, 12, pytest.approx(1.0))


def test_nothing_to_account_for(tmp_path):
    assert measure(tmp_path) is None
    write(tmp_path, [record("event", 0, 0.0, event="start"), *trained(1, 1, 1.0)])
    assert measure(tmp_path) is None
