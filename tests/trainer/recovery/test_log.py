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
