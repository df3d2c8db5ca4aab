"""Mutated checkpoints of every format are read or end in our errors: no crash, hang or flood."""

import json
import subprocess
import sys

import pytest

from tests.checkpoint.convert import fuzz


def fuzzed(folder, first: int, count: int) -> dict:
    command = [sys.executable, "-m", fuzz.__name__, str(folder), str(first), str(count)]
    limit = 60 + count / 5
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    case = (folder / "case").read_text() if (folder / "case").exists() else "none"
    assert done.returncode == 0, f"status {done.returncode} at case {case}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


def test_300_mutated_files(tmp_path):
    found = fuzzed(tmp_path, 0, 300)
    assert sum(found["ends"].values()) == 300
    names = {end.partition(":")[0] for end in found["ends"]}
    assert {
        "config",
        "dcp",
        "hf",
        "megatron_dist",
        "megatron_legacy",
        "msgpack",
        "orbax_ocdbt",
        "torch",
        "ucp",
        "zero3_world3",
    } <= names


@pytest.mark.soak
def test_10_000_mutated_files(tmp_path):
    found = fuzzed(tmp_path, 300, 10_000)
    refused = sum(n for end, n in found["ends"].items() if end.endswith("refused"))
    assert 2_000 < refused < 10_000
