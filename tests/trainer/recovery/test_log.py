"""What a supervisor says, and how often."""

import json
import time

from trainer.recovery.log import Log


def test_what_is_waited_for_is_said_now_and_then(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = Log(str(tmp_path))
    for second in range(100, 200):
        now[0] = float(second)
        log.remind(f"waiting, {second}")
        if second == 150:
            log.say("something else")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "launch: waiting, 100", "launch: waiting, 125", "launch: waiting, 150",
        "launch: something else", "launch: waiting, 175",
    ]  # fmt: skip


def test_incidents_are_lines_without_what_is_not_known(tmp_path, capsys):
    log = Log(str(tmp_path / "run"))
    log.record("hang", 3, rank=None, step=7)
    assert not (tmp_path / "run").exists()  # nothing is made before a run is
    (tmp_path / "run").mkdir()
    log.record("hang", 3, rank=None, step=7)
    (line,) = (tmp_path / "run/incidents.jsonl").read_text().splitlines()
    facts = json.loads(line)
    assert facts.pop("time") > 0 and facts == {"generation": 3, "kind": "hang", "step": 7}
    assert capsys.readouterr().err.splitlines() == ["launch: hang  step 7"] * 2


def test_a_new_supervisor_learns_of_the_fault_that_the_run_has_not_recovered_from(tmp_path):
    log, began = Log(str(tmp_path)), time.monotonic()
    assert log.open_fault() is None
    log.record("crash", 1, step=3)
    log.record("recovered", 2, step=4)
    log.record("resized", 2, hosts=2)
    assert log.open_fault() is None
    log.record("host lost", 3, step=8)
    log.record("hang", 4, step=6)
    when, step = Log(str(tmp_path)).open_fault()
    assert step == 8 and began - 0.1 <= when <= time.monotonic()
    log.record("crash", 5, step=7, exit=1)
    assert log.open_fault() is None
