"""What a supervisor says, and how often."""

import json
import time
from types import SimpleNamespace

from tests.trainer.recovery.runs import incidents
from trainer.recovery.log import Log
from trainer.recovery.progress import Progress
from trainer.recovery.supervisor import Options, Supervisor


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


def test_a_record_that_cannot_be_read_ends_no_supervisor(tmp_path):
    (tmp_path / "incidents.jsonl").symlink_to("incidents.jsonl")
    assert Log(str(tmp_path)).open_fault() is None


def test_a_leader_that_came_back_tells_once_what_the_fault_cost(tmp_path):
    """It was not there when the fault was judged, perhaps after it had started."""
    supervisor = Supervisor(Options([], str(tmp_path), host=0, hosts=2))
    supervisor._hosts = SimpleNamespace(generation=1, leads=True)
    Log(str(tmp_path)).record("host lost", 1, step=8, hosts=[0])
    for step in (5, 6, 7):
        supervisor._recovered(Progress("step", step, 0.0, step, start=5, source="parity"))
    _, recovered = incidents(tmp_path)
    assert (recovered["kind"], recovered["step"], recovered["restored"]) == ("recovered", 6, 5)
    assert recovered["lost_steps"] == 3 and 0 <= recovered["seconds"] < 60
