"""What is read from elsewhere, mutated, is read or ends in our errors: no crash, hang or flood."""

import json
import subprocess
import sys

import pytest

from tests.checkpoint.convert import fuzz


def fuzzed(folder, first: int, count: int) -> dict:
    command = [sys.executable, "-m", fuzz.__name__, str(folder), str(first), str(count)]
    limit = 300 + count / 2  # of the clock, where other processes have the CPUs
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    case = (folder / "case").read_text() if (folder / "case").exists() else "none"
    assert done.returncode == 0, f"status {done.returncode} at case {case}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


def test_500_mutated_files(tmp_path):
    found = fuzzed(tmp_path, 0, 500)
    assert sum(found["ends"].values()) == 500
    names = {end.partition(":")[0].partition("_")[0] for end in found["ends"]}
    assert names >= {
        "config", "data", "dcp", "hf", "megatron", "msgpack", "orbax", "pickle", "run", "stream",
        "tokenizer", "torch", "ucp", "zero1", "zero3",
    }  # fmt: skip
    ends = {end.partition(": ")[2] for end in found["ends"]}
    assert ends == {"read", "refused"}


@pytest.mark.soak
def test_10_000_mutated_files(tmp_path):
    found = fuzzed(tmp_path, 500, 10_000)
    refused = sum(n for end, n in found["ends"].items() if end.endswith("refused"))
    assert 2_000 < refused < 10_000
