"""`torus inspect` and `torus diff` on runs, steps, folders and files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.convert.folders import random_folder, random_tensors, tiny, write_folder
from trainer.commands.diff import compare
from trainer.commands.main import main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def places(tmp_path):
    """A Hugging Face folder, and the run converted from it."""
    folder = random_folder(tmp_path / "hf", "gemma2-2b", "bfloat16")
    assert main(["convert", str(folder), f"torus:{tmp_path}/start"]) == 0
    return folder, tmp_path / "start"


def test_inspect_lists_a_folder_and_a_file(places, capsys):
    folder, _ = places
    for path in (folder, folder / "model.safetensors"):
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert "model.layers.1.mlp.down_proj.weight" in out and "bfloat16" in out
    capsys.readouterr()
    assert main(["inspect", f"hf:{folder}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model_type"] == "gemma2" and facts["files"] == 1
    assert facts["arrays"]["model.norm.weight"] == {"shape": [20], "dtype": "bfloat16"}


def test_inspect_lists_a_run_its_steps_and_one_step(places, capsys):
    _, run = places
    for path in (run, run / "checkpoints", run / "checkpoints/0"):
        capsys.readouterr()
        assert main(["inspect", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["format"] == "torus" and facts["step"] == 0 and facts["steps"] == [0]
        assert facts["converted"] == "from hf gemma2"
        assert facts["arrays"]["params/layers/mlp/up"]["shape"] == [2, 20, 10]
    assert main(["inspect", str(run)]) == 0
    assert "params/layers/mlp/up" in capsys.readouterr().out


def test_inspect_needs_no_jax(places):
    code = (
        "import sys; from trainer.commands.main import main; status = main(sys.argv[1:]); "
        "sys.exit(str({'jax', 'orbax', 'models.decoder'} & set(sys.modules)) "
        "if status or {'jax', 'orbax', 'models.decoder'} & set(sys.modules) else 0)"
    )
    for path in places:
        command = [sys.executable, "-c", code, "inspect", str(path)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_what_is_no_checkpoint_is_refused(command, tmp_path, capsys):
    more = [str(tmp_path)] if command == "diff" else []
    assert main([command, str(tmp_path / "absent"), *more]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([command, str(tmp_path), *more]) == 2
    assert "neither a run or step of ours nor of another known format" in capsys.readouterr().err
    assert main([command, f"dpc:{tmp_path}", *more]) == 2
    assert "no format 'dpc'; known: hf, torus, torch, dcp" in capsys.readouterr().err


def test_diff_of_equal_checkpoints(places, capsys):
    for place in places:
        capsys.readouterr()
        assert main(["diff", str(place), str(place)]) == 0
        assert "arrays equal in every bit" in capsys.readouterr().out
    folder, run = places
    assert main(["diff", str(folder), str(run)]) == 2
    assert "convert one of them first" in capsys.readouterr().err


def test_diff_of_steps_of_one_run(places, capsys):
    """Two steps that differ are compared in tests/test_docs.py."""
    folder, run = places
    assert main(["diff", str(run), "--steps", "0:0"]) == 0
    assert "arrays equal in every bit" in capsys.readouterr().out
    for arguments, message in (
        ([str(run), "--steps", "0:5"], "step 5"),
        ([str(run), "--steps", "0"], "two step numbers, as 350:700"),
        ([str(run), str(run), "--steps", "0:0"], "give two checkpoints, or one run"),
        ([str(run)], "give two checkpoints, or one run"),
        ([str(folder), "--steps", "0:0"], "--steps is of a run of ours"),
    ):
        assert main(["diff", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_diff_names_what_differs(tmp_path, capsys):
    family, model = tiny("llama3.2-1b")
    tensors = {n: np.ones_like(a) for n, a in random_tensors(family, model).items()}
    a = write_folder(tmp_path / "a", family.write(model), tensors)
    changed = dict(tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    changed[name] = changed[name].copy()
    changed[name][3, 4] += np.float32(2**-22)  # two units in the last place of 1
    changed[name][7, 0] = 3.0
    changed["extra"] = changed.pop("model.norm.weight")
    changed["model.embed_tokens.weight"] = np.ones((5, 3), np.float32)
    b = write_folder(tmp_path / "b", family.write(model), changed)
    assert main(["diff", str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["only in A"] == ["model.norm.weight"] and found["only in B"] == ["extra"]
    assert list(found["other shape or dtype"]) == ["model.embed_tokens.weight"]
    differs = found["other values"].pop(name)
    assert not found["other values"]
    assert differs["differing"] == 2 and differs["first"] == [3, 4] and differs["abs"] == 2.0
    assert differs["relative"] == pytest.approx(2 / 3) and differs["ulp"] == 3 << 22
    assert main(["diff", str(a), str(b)]) == 1
    assert f"{name}: 2 elements, abs 2," in capsys.readouterr().out


class One:
    def __init__(self, array):
        self.array = array

    def read(self, name, lead, start, stop):
        return self.array[start:stop]


@pytest.mark.parametrize(
    ("a", "b", "ulp", "relative"),
    [
        (1.0, np.nextafter(np.float32(1), 2, dtype=np.float32), 1, 2.0**-23),
        (0.0, -0.0, 0, 0.0),
        (1e-45, -1e-45, 2, 2.0),
        (1.0, float("nan"), None, float("inf")),
    ],
)
def test_distances(a, b, ulp, relative):
    left, right = (np.float32([0.5, x]) for x in (a, b))
    found = compare(One(left), One(right), "x", left.dtype, left.shape, lambda nbytes: None)
    assert found["first"] == [1] and found["differing"] == 1
    assert found["relative"] == pytest.approx(relative)
    assert ulp is None or found["ulp"] == ulp
