"""A conversion that is killed, fails or is interrupted leaves nothing that looks like a result."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from checkpoint.convert import engine
from tests.checkpoint.convert.folders import (
    random_folder,
    random_tensors,
    read_folder,
    same,
    tiny,
    write_folder,
)
from trainer.commands.main import main

ROOT = Path(__file__).parents[3]


@pytest.mark.multiprocess
@pytest.mark.parametrize("to", ["torus", "hf"])
def test_sigkill_leaves_no_half_result_and_the_same_command_then_succeeds(to, tmp_path):
    family, model = tiny("qwen3-8b")
    model = dataclasses.replace(model, vocab=20_000, width=256)
    tensors = random_tensors(family, model)
    folder = write_folder(tmp_path / "hf", family.write(model), tensors)
    source, target = folder, tmp_path / "start"
    if to == "hf":
        assert main(["convert", str(folder), f"torus:{tmp_path}/run"]) == 0
        source, target = tmp_path / "run", tmp_path / "out"
    # A reader that stops in the middle, so that the kill surely comes while tensors are written.
    code = (
        "import time, sys; from checkpoint.convert import engine; real = engine.build; seen = []\n"
        "def slow(*a):\n    seen.append(1)\n    if len(seen) == 6: time.sleep(60)\n"
        "    return real(*a)\n"
        "engine.build = slow; from trainer.commands.main import main; main(sys.argv[1:])"
    )
    command = ["convert", str(source), f"{to}:{target}"]
    process = subprocess.Popen([sys.executable, "-c", code, *command], cwd=ROOT)
    staging = target.with_name(target.name + engine.STAGING)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        written = sum(p.stat().st_blocks for p in staging.rglob("*") if p.is_file())
        if written * 512 > 20_000_000:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert written * 512 > 20_000_000
    assert staging.exists() and not target.exists()
    assert main(command) == 0
    assert not staging.exists() and target.is_dir()
    if to == "hf":
        assert same(read_folder(target), tensors)


class Fails:
    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing(error, tmp_path, monkeypatch):
    folder = random_folder(tmp_path / "hf", "olmo2-7b")
    monkeypatch.setattr("checkpoint.convert.native.NativeTensors.put", Fails(error))
    with pytest.raises(type(error)):
        from trainer.commands import convert

        convert.main([str(folder), f"torus:{tmp_path}/start"])
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_what_is_stored_wrongly_is_noticed(tmp_path, monkeypatch):
    from checkpoint.convert.native import NativeTensors

    folder = random_folder(tmp_path / "hf", "olmo2-7b")
    put = NativeTensors.put

    def wrong(self, name, lead, array, start=0):
        if name.endswith("layers/mlp/up"):
            array = array.copy()
            array.reshape(-1).view(np.uint8)[5] ^= 1
        put(self, name, lead, array, start)

    monkeypatch.setattr(NativeTensors, "put", wrong)
    assert main(["convert", str(folder), f"torus:{tmp_path}/start"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_two_at_once_and_a_target_that_exists(tmp_path, capsys):
    folder = random_folder(tmp_path / "hf", "olmo2-7b")
    target = tmp_path / "start"
    with engine.staged(target):
        assert main(["convert", str(folder), f"torus:{target}"]) == 2
        assert "being written by another conversion" in capsys.readouterr().err
    assert target.is_dir() and not any(target.iterdir())
    assert main(["convert", str(folder), f"torus:{target}"]) == 0  # an empty folder is no loss
    assert main(["convert", str(folder), f"torus:{target}"]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["convert", str(folder), f"torus:{tmp_path}/file/start"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_flipped_bit_in_converted_weights_is_refused(tmp_path, capsys):
    family, model = tiny("qwen3-8b")
    model = dataclasses.replace(model, vocab=20_000, width=256)
    folder = write_folder(tmp_path / "hf", family.write(model), random_tensors(family, model))
    main(["convert", str(folder), f"torus:{tmp_path}/start"])
    data = max((tmp_path / "start/checkpoints/0/state/d").iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    capsys.readouterr()
    assert main(["convert", f"{tmp_path}/start", f"{tmp_path}/out"]) == 1
    assert "are not the bits that were saved" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
