"""A conversion that is killed, fails or is interrupted leaves nothing that looks like a result."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from checkpoint.convert import engine
from checkpoint.convert.torchfiles import write_torch
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


def written_bytes(folder: Path) -> int:
    """Returns the bytes of all files that have room on the disk, whatever their size."""
    total = 0
    with contextlib.suppress(FileNotFoundError):  # renamed or deleted meanwhile
        for path in folder.rglob("*"):
            total += 512 * path.stat().st_blocks if path.is_file() else 0
    return total


def prepared(to: str, tmp_path: Path, vocab: int, width: int):
    """Returns what is to be converted, a Hugging Face folder or a run, and its tensors."""
    family, model = tiny("qwen3-8b")
    model = dataclasses.replace(model, vocab=vocab, width=width)
    tensors = random_tensors(family, model)
    source = write_folder(tmp_path / "hf", family.write(model), tensors)
    if to == "hf":
        assert main(["convert", str(source), f"torus:{tmp_path}/run"]) == 0
        source = tmp_path / "run"
    return source, tensors


@pytest.mark.multiprocess
@pytest.mark.parametrize("to", ["torus", "hf"])
def test_sigkill_leaves_no_half_result_and_the_same_command_then_succeeds(to, tmp_path):
    source, tensors = prepared(to, tmp_path, vocab=20_000, width=256)
    target = tmp_path / "target"
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
        if (written := written_bytes(staging)) > 20_000_000:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert written > 20_000_000
    assert staging.exists() and not target.exists()
    assert main(command) == 0
    assert not staging.exists() and target.is_dir()
    if to == "hf":
        assert same(read_folder(target), tensors)


@pytest.mark.multiprocess
@pytest.mark.soak
@pytest.mark.parametrize("to", ["torus", "hf"])
def test_sigkill_at_ten_random_moments(to, tmp_path):
    """When some share of the bytes is written: each time there is nothing, or all of it."""
    source, tensors = prepared(to, tmp_path, vocab=60_000, width=512)
    target = tmp_path / "target"
    staging = target.with_name(target.name + engine.STAGING)
    code = "import sys; from trainer.commands.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "convert", str(source), f"{to}:{target}"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    total, chance, cut = written_bytes(target), random.Random(20), 0
    for _ in range(10):
        shutil.rmtree(target, ignore_errors=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        wanted = chance.uniform(0, total)
        while written_bytes(staging) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        cut += process.wait() == -signal.SIGKILL and not target.exists()
        if target.exists():
            assert not staging.exists()
            assert to == "hf" or main(["verify", str(target)]) == 0
            assert to == "torus" or same(read_folder(target), tensors)
    assert cut >= 5
    shutil.rmtree(target, ignore_errors=True)
    assert main(["convert", str(source), f"{to}:{target}"]) == 0
    if to == "hf":
        assert same(read_folder(target), tensors)


@pytest.mark.multiprocess
@pytest.mark.parametrize("to", ["torus", "hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(to, tmp_path):
    """Files may not grow beyond a limit: what a full disk looks like to the writer."""
    folder = random_folder(tmp_path / "hf", "olmo2-7b")
    source = folder
    if to == "hf":
        assert main(["convert", str(folder), f"torus:{tmp_path}/run"]) == 0
        source = tmp_path / "run"
    largest = 4096 if to == "torus" else folder.joinpath("model.safetensors").stat().st_size // 2
    code = (
        "import resource, sys; from trainer.commands.main import main\n"
        "from checkpoint.convert import engine; real = engine.build\n"
        "def full(*a):\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {largest})); return real(*a)\n"
        "engine.build = full; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", str(source), f"{to}:{tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("torus: error")]
    assert done.returncode == 1 and len(told) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"converting to {tmp_path}/out failed" in told[0] and "File too large" in told[0]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", ["hf", "torch", "torus"])
def test_a_source_that_goes_away(kind, tmp_path, monkeypatch, capsys):
    """Files that are open are read to their end; of others the first that is missed is told."""
    folder = random_folder(tmp_path / "hf", "olmo2-7b")
    place, to = folder, "torus"
    if kind == "torus":
        assert main(["convert", str(folder), f"torus:{tmp_path}/run"]) == 0
        place, to = tmp_path / "run", "hf"
    if kind == "torch":
        place = tmp_path / "torch"
        place.mkdir()
        shutil.copy(folder / "config.json", place)
        with (place / "pytorch_model.bin").open("wb") as file:
            write_torch(file, read_folder(folder))
    real, seen = engine.build, []

    def build(*arguments):
        seen.append(1)
        if len(seen) == 3:
            shutil.rmtree(place)
        return real(*arguments)

    monkeypatch.setattr(engine, "build", build)
    capsys.readouterr()
    status = main(["convert", f"{kind}:{place}", f"{to}:{tmp_path}/out"])
    told = capsys.readouterr().err.splitlines()
    if kind == "hf":
        assert status == 0 and not told
        assert main(["verify", f"{tmp_path}/out"]) == 0
        return
    assert status == 1 and len(told) == 1, told
    assert not list(tmp_path.glob("out*"))


class Fails:
    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"), [(OSError("No space left on device"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_failure_in_the_middle_leaves_nothing(error, status, tmp_path, monkeypatch):
    folder = random_folder(tmp_path / "hf", "olmo2-7b")
    monkeypatch.setattr("checkpoint.convert.native.NativeTensors.put", Fails(error))
    assert main(["convert", str(folder), f"torus:{tmp_path}/start"]) == status
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
    for place in (f"{tmp_path}/file/start", "/proc/start"):  # a file, and what nobody may write
        assert main(["convert", str(folder), f"torus:{place}"]) == 2
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
