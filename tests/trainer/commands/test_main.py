"""The shell of `torus`: quick help, one-line errors, exit statuses."""

import importlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sharding.errors import UsageError
from trainer.commands import COMMANDS
from trainer.commands import main as shell

ROOT = Path(__file__).parents[3]


def _torus(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "trainer.commands.main", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


@pytest.fixture
def command(monkeypatch):
    """Puts a command `probe` into the table and returns a function that sets what it does."""

    def set_behaviour(behaviour):
        module = SimpleNamespace(USAGE="usage: torus probe\n", main=behaviour)
        monkeypatch.setitem(sys.modules, "trainer.commands.probe", module)
        monkeypatch.setitem(COMMANDS, "probe", ("Look", "probe"))

    return set_behaviour


def test_what_failed_ends_though_a_thread_waits():
    code = (
        "import sys, threading, time; from trainer.commands.main import run; "
        "threading.Thread(target=time.sleep, args=(100,)).start(); sys.exit(run())"
    )
    command = [sys.executable, "-c", code, "no-command"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 2 and "no command `no-command`" in done.stderr


def test_help_is_quick_and_imports_no_jax():
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        result = _torus("--help")
        best = min(best, time.perf_counter() - start)
    assert result.returncode == 0 and result.stderr == ""
    assert best < 0.5, f"torus --help took {best:.2f} s at best"
    code = (
        "import sys; from trainer.commands.main import main; main(['--help']); "
        "heavy = {'jax', 'numpy', 'rich', 'matplotlib', 'tensorboardX', 'absl'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    probe = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert probe.returncode == 0, probe.stderr


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_help_names_every_command(argv, capsys):
    assert shell.main(argv) == 0
    out = capsys.readouterr().out
    for name, (group, does) in COMMANDS.items():
        assert f"{group}:" in out and f"  {name} " in out and does in out
    assert "torus train --config=" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_what_the_shell_needs(name):
    module = importlib.import_module(f"trainer.commands.{name}")
    assert module.USAGE.startswith(f"usage: torus {name}") and callable(module.main)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_every_command_is_quick(name):
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = _torus(name, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what other processes take does not count against the command.
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best = min(best, used)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: torus")
    assert best < 0.5, f"torus {name} --help took {best:.2f} s at best"


def test_help_of_a_command_two_ways(command, capsys):
    command(lambda argv: pytest.fail("must not run"))
    assert shell.main(["probe", "runs/a", "--help"]) == 0
    assert shell.main(["help", "probe"]) == 0
    assert capsys.readouterr().out == "usage: torus probe\n" * 2


def test_version(capsys):
    assert shell.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("torus 0.")
    assert shell.main(["launch", "--version"]) == 0
    assert capsys.readouterr().out.startswith("torus 0.")


def test_unknown_command(capsys):
    assert shell.main(["repport", "runs/a"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("torus: error: no command `repport`; did you mean `report`?")
    assert captured.err.count("\n") == 1


def test_arguments_and_status_pass_through(command):
    seen = []
    command(lambda argv: seen.append(argv) or 7)
    assert shell.main(["probe", "a", "--b=c"]) == 7
    assert seen == [["a", "--b=c"]]


def test_usage_error_is_one_line(command, capsys):
    def fail(argv):
        raise UsageError("config.model: no field `layer`;\n  did you mean `layers`?")

    command(fail)
    assert shell.main(["probe"]) == 2
    expected = "torus: error: config.model: no field `layer`; did you mean `layers`?\n"
    assert capsys.readouterr().err == expected


def test_interrupt(command, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    command(interrupted)
    assert shell.main(["probe"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_other_errors_keep_their_traceback(command):
    def broken(argv):
        raise RuntimeError("ours")

    command(broken)
    with pytest.raises(RuntimeError, match="ours"):
        shell.main(["probe"])


def test_process_status_and_streams():
    result = _torus("trian")
    assert result.returncode == 2 and result.stdout == ""
    assert "did you mean `train`?" in result.stderr and "Traceback" not in result.stderr


def test_reader_that_goes_away():
    read, write = os.pipe()
    os.close(read)  # as if `| head` had left already
    result = subprocess.run(
        [sys.executable, "-m", "trainer.commands.main", "--help"],
        cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=120,
    )  # fmt: skip
    os.close(write)
    assert result.returncode == 0 and result.stderr == b""
