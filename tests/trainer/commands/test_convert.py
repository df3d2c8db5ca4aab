"""`torus convert`: what a checkpoint names is looked up in a table, never run as a file."""

import json

import pytest

from checkpoint.convert.families import FAMILIES
from checkpoint.manifest import read_manifest, read_meta, write_record
from sharding.errors import UsageError
from tests.checkpoint.convert.folders import random_folder
from trainer.commands.main import main
from trainer.config import load_shipped

TABLE = """
from pathlib import Path
Path({mark!r}).write_text("run")
from checkpoint.convert.families import FAMILIES as _ALL
FAMILY = _ALL["llama"]
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A Python file that leaves a mark when it is run; returns both paths."""
    monkeypatch.chdir(tmp_path)
    mark, path = tmp_path / "mark", tmp_path / "evil.py"
    path.write_text(TABLE.format(mark=str(mark)))
    return path, mark


@pytest.fixture
def folder(tmp_path):
    return random_folder(tmp_path / "hf", "llama3.2-1b")


@pytest.mark.parametrize("spelled", ["evil.py", "{path}", "./evil.py"])
def test_the_model_type_of_a_config_is_never_run(folder, table, tmp_path, capsys, spelled):
    path, mark = table
    config = json.loads((folder / "config.json").read_text())
    name = spelled.format(path=path)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))
    for more in ([], ["--family", "maxtext"]):
        assert main(["convert", str(folder), str(tmp_path / "out"), *more]) == 3
        assert "no table for model_type" in capsys.readouterr().err
    assert main(["inspect", str(folder)]) == 0
    assert not mark.exists()


@pytest.mark.parametrize("recorded", ["evil.py", ["evil.py"], {"family": "evil.py"}])
def test_the_family_that_a_step_records_is_never_run(folder, table, tmp_path, capsys, recorded):
    _, mark = table
    assert main(["convert", str(folder), str(tmp_path / "run")]) == 0
    meta = read_meta(tmp_path / "run/checkpoints", 0)
    assert meta["source"]["family"] == "llama"
    meta["source"]["family"] = recorded
    with_meta(tmp_path / "run/checkpoints", meta)
    assert main(["convert", str(tmp_path / "run"), f"hf:{tmp_path / 'out'}"]) == 3
    assert not mark.exists()
    # Named by the user, a table is run and used.
    assert main(["convert", str(folder), str(tmp_path / "own"), "--family", "evil.py"]) == 0
    assert mark.exists()


@pytest.mark.parametrize("source", [7, ["a"], {"config": []}, {"format": 1}, {"optimizer": "x"}])
def test_a_record_of_the_source_in_another_form_is_refused(folder, tmp_path, capsys, source):
    assert main(["convert", str(folder), str(tmp_path / "run")]) == 0
    with_meta(tmp_path / "run/checkpoints", {"source": source})
    assert main(["convert", str(tmp_path / "run"), f"hf:{tmp_path / 'out'}"]) == 3
    assert main(["inspect", str(tmp_path / "run")]) == 3
    assert "record of its source" in capsys.readouterr().err


def with_meta(folder, meta) -> None:
    """Replaces the meta of step 0 as somebody would who wants it to be believed."""
    arrays = json.loads((folder / "0/integrity/data.json").read_text())["arrays"]
    (folder / "0/meta/data.json").write_text(json.dumps(meta))
    write_record(folder, 0, arrays)
    read_manifest(folder, 0)


def test_a_stored_plan_names_a_shipped_config_and_no_file(table):
    _, mark = table
    for name in ("evil.py", "evil", str(mark.with_name("evil.py")), "../configs/quickstart.py"):
        with pytest.raises(UsageError, match=r"no config .* is shipped"):
            load_shipped(name)
    mark.with_name("quickstart").write_text("raise SystemExit('run')")
    assert load_shipped("quickstart").name == "quickstart"
    assert not mark.exists()


def test_the_names_in_the_table_are_no_paths():
    assert all(name.isidentifier() for name in FAMILIES)
