"""Text from files reaches a terminal escaped, through whatever prints it."""

import io
import json
import logging
import sys

import numpy as np
import pytest

from checkpoint.convert.safetensors import Tensors, create
from tests.checkpoint.convert.folders import random_folder
from trainer.commands.main import main
from trainer.commands.progress import progress
from trainer.console import Console
from trainer.terminal import bare, escaped_streams, one_line, printable

HOSTILE = "a\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202eb\x7f"


def harmless(text: str) -> bool:
    return not set(text) & set("\x1b\x07\r\x9b\u202e\x7f\x00")


def test_what_is_escaped():
    assert printable(HOSTILE).startswith("a\\u001b[2J") and harmless(printable(HOSTILE))
    assert printable("tab\tline\nÄ→日本 🙂") == "tab\tline\nÄ→日本 🙂"
    assert one_line("a\nb\tc\ud800") == "a\\nb\\tc\\ud800"
    assert json.loads(printable(json.dumps({HOSTILE: 1}))) == {HOSTILE: 1}


def test_streams_are_escaped_once_and_given_back(capsys):
    before = sys.stdout, sys.stderr
    with escaped_streams(), escaped_streams():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        sys.stdout.writelines([HOSTILE])
        assert (bare(sys.stdout), bare(sys.stderr)) == before
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert harmless(out + err) and "\\\\" not in out and out.count("owned") == 2


def test_loggers_write_to_the_escaped_stream(capsys):
    logger = logging.Logger("of this test")
    with escaped_streams():
        logger.addHandler(logging.StreamHandler())
        logger.error("cannot read %s", HOSTILE)
    assert harmless(found := capsys.readouterr().err) and "owned" in found


@pytest.mark.parametrize("live", [False, True])
def test_an_event_of_a_run_cannot_steer_the_terminal(live):
    stream = io.StringIO()
    with Console(10, stream, live=live) as console:
        console.show({"kind": "event", "step": 1, "event": "damaged", "text": HOSTILE + "\nstep"})
    assert harmless(stream.getvalue()) and stream.getvalue().count("\n") == 1


def test_names_of_tensors_are_escaped_by_every_command_that_prints_them(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        name = HOSTILE + folder + "\nline"
        files = Tensors(create(tmp_path / folder / "model.safetensors",
                               [(name, np.dtype("float32"), (1,))]), 2)  # fmt: skip
        files.put(name, (), np.zeros(1, np.float32))
        files.close()
    assert main(["inspect", f"hf:{tmp_path / 'a'}"]) == 0
    assert main(["diff", f"hf:{tmp_path / 'a'}", f"hf:{tmp_path / 'b'}"]) == 1
    out, err = capsys.readouterr()
    assert harmless(out + err) and "owned" in out and "\nline" not in out


def test_what_is_wrong_with_a_config_is_told_escaped(tmp_path, capsys):
    folder = random_folder(tmp_path / "hf", "llama3.2-1b")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"model_type": HOSTILE}, {HOSTILE: 1}, {"hidden_act": HOSTILE}):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert main(["convert", str(folder), str(tmp_path / "out")]) == 3
        assert harmless(err := capsys.readouterr().err) and "owned" in err


@pytest.mark.parametrize("in_bytes", [False, True])
def test_the_words_beside_a_bar_are_no_format_and_no_markup(in_bytes, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with progress("runs/{task.id}[bold]\x07", 10, in_bytes=in_bytes) as advance:
        advance(10)
    assert "runs/{task.id}[bold]\\u0007" in stream.getvalue()
