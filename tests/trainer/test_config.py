"""What is refused, in which words, and that nothing is written then; overrides; JSON; resuming."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from models.presets import PRESETS
from sharding.errors import UsageError
from trainer.commands.main import main
from trainer.config import Experiment, differences, from_dict, leaves, parse_flags, to_json
from trainer.run import write_experiment

TINY = f"--config={Path(__file__).parent.parent / 'tiny.py'}"


REFUSED_EARLY = {  # before JAX starts
    "no config": ([], r"--config=FILE is missing"),
    "unknown config": (["--config=quickstrt"], r"no config file 'quickstrt'.*`quickstart`"),
    "unknown field": (
        [TINY, "--config.model.layer=3"],
        r"no field 'layer' in config.model.*mean `layers`",
    ),
    "unknown group": ([TINY, "--config.modle.layers=3"], r"no field 'modle'.*mean `model`"),
    "group as value": ([TINY, "--config.model=3"], r"config.model is a group of fields"),
    "wrong type": ([TINY, "--config.model.layers=abc"], r"'abc' is not of type int"),
    "fraction for int": ([TINY, "--config.train.batch_size=2.5"], r"'2.5' is not of type int"),
    "wrong bool": ([TINY, "--config.data.shuffle=maybe"], r"'maybe' is not of type bool"),
    "wrong choice": (
        [TINY, "--config.model.norm=rmsnrm"],
        r"'rmsnrm': choose rmsnorm.*mean `rmsnorm`",
    ),
    "remat name": ([TINY, "--config.model.remat=gate,upp"], r"'upp'.*rotated_qk.*mean `up`"),
    "heads over tensor": (
        [TINY, "--config.mesh.tensor=3", "--config.model.padded=0"],
        r"no field 'padded'",
    ),
    "heads not divisible": (
        [TINY, "--config.mesh.tensor=3"],
        r"model.heads = 4 does not divide over .*tensor = 3",
    ),
    "parallel": (
        [TINY, "--config.model.parallel_residual", "--config.model.norm_placement=post"],
        r"parallel_residual needs norm_placement = 'pre', not 'post'",
    ),
    "kv heads": ([TINY, "--config.model.kv_heads=3"], r"kv_heads = 3 does not divide heads = 4"),
    "batch not divisible": (
        [TINY, "--config.mesh.fsdp=3"],
        r"batch_size = 8 .*1 × 3 devices; the next multiple is 9",
    ),
    "accumulation": ([TINY, "--config.train.accumulation=3"], r"batch_size = 8 .*accumulation = 3"),
    "sequence too long": (
        [TINY, "--config.data.seq_len=128"],
        r"seq_len = 128 is longer .*max_length = 64",
    ),
    "two free axes": ([TINY, "--config.mesh.data=-1"], r"only one axis may be -1"),
    "zero stage": ([TINY, "--config.mesh.zero=4"], r"zero = 4: choose 1, 2 or 3"),
    "unknown flag": ([TINY, "--wrkdir=x"], r"unknown flag --wrkdir.*mean `workdir`"),
    "stray argument": ([TINY, "stray"], r"unexpected argument 'stray'"),
    "no workdir": ([TINY], r"--workdir=FOLDER is missing"),
}


@pytest.mark.parametrize("name", REFUSED_EARLY)
def test_refused_in_one_line_before_anything_is_written(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, pattern = REFUSED_EARLY[name]
    if name != "no workdir":
        arguments = [*arguments, "--workdir=run"]
    refused(arguments, pattern, capsys)
    assert not list(tmp_path.iterdir())


def refused(arguments: list[str], pattern: str, capsys) -> None:
    import re

    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert re.search(pattern, captured.err), captured.err


def test_mesh_that_does_not_match_the_devices(tmp_path, capsys):
    arguments = [TINY, "--config.mesh.fsdp=4", f"--workdir={tmp_path / 'run'}"]
    refused(arguments, r"fsdp 4 .* needs 4 devices, there are 8", capsys)
    assert not (tmp_path / "run").exists()


def test_vocabulary_smaller_than_the_datasets(tmp_path, capsys):
    arguments = [TINY, "--config.model.vocab=100", f"--workdir={tmp_path / 'run'}"]
    refused(arguments, r"tokenizer has 259 ids .*, the model's vocabulary has 100", capsys)
    assert not (tmp_path / "run").exists()


def test_damaged_dataset_file(tmp_path, capsys):
    from trainer.data.corpus import build

    build(tmp_path / "data")
    shard = sorted((tmp_path / "data").glob("*.bin"))[0]
    os.truncate(shard, shard.stat().st_size - 2)
    arguments = [TINY, f"--config.data.path={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}"]
    refused(arguments, rf"{shard.name} has [\d,]+ bytes, manifest says", capsys)
    assert not (tmp_path / "run").exists()


def test_workdir_of_another_experiment_names_the_fields(tmp_path, capsys):
    write_experiment(str(tmp_path / "run"), parse_flags([TINY])[0])
    before = (tmp_path / "run/experiment.json").read_bytes()
    arguments = [TINY, "--config.model.layers=3", "--config.train.seed=1", "--config.log.every=7"]
    refused(
        [*arguments, f"--workdir={tmp_path / 'run'}"],
        r"holds another experiment: config.model.layers: 2 → 3; config.train.seed: 0 → 1 —",
        capsys,
    )
    assert (tmp_path / "run/experiment.json").read_bytes() == before


def test_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused([TINY, f"--workdir={tmp_path}/file/run"], r"--workdir=.* cannot be written", capsys)


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_checkpoints_without_a_complete_step(command, tmp_path, capsys):
    write_experiment(str(tmp_path), parse_flags([TINY])[0])
    (tmp_path / "checkpoints/3.orbax-checkpoint-tmp").mkdir(parents=True)
    extra = ["--prompt=x"] if command == "sample" else []
    assert main([command, str(tmp_path), *extra]) == 2
    error = capsys.readouterr().err
    assert "no complete step in" in error and "3.orbax-checkpoint-tmp (interrupted save)" in error


def test_overrides_reach_every_kind_of_leaf():
    experiment, flags = parse_flags(
        [TINY, "--config.model.pattern=('local', 'global')", "--config.model.window=16",
         "--config.model.rope.theta=5e5", "--config.data.shuffle=False",
         "--config.optimizer.peak_lr=1", "--workdir=x"],
        workdir="folder",
    )  # fmt: skip
    assert experiment.model.pattern == ("local", "global")
    assert experiment.model.rope.theta == 5e5
    assert experiment.data.shuffle is False
    assert experiment.optimizer.peak_lr == 1.0
    assert flags == {"workdir": "x"}


def test_json_round_trip():
    experiment = Experiment(model=PRESETS["gemma3-1b"]())
    assert from_dict(json.loads(to_json(experiment))) == experiment


def test_json_with_an_unknown_field_is_refused():
    with pytest.raises(UsageError, match=r"no field 'lyers'; did you mean `layers`"):
        from_dict({"model": {"lyers": 3}})


def test_every_leaf_is_either_identity_or_free():
    old, new = Experiment(), Experiment()
    changed = set()
    for path, value in leaves(old):
        owner, _, name = path.rpartition(".")
        target = new
        for part in filter(None, owner.split(".")):
            target = getattr(target, part)
        setattr(target, name, "changed")
        changed.update(differences(old, new))
        setattr(target, name, value)
    fields = {line.split(":")[0].removeprefix("config.") for line in changed}
    assert {"model.layers", "data.seed", "optimizer.peak_lr", "train.steps"} <= fields
    assert not fields & {"mesh.fsdp", "log.every", "train.stop_at", "model.remat", "model.dtype"}
    assert dataclasses.asdict(old) == dataclasses.asdict(new)
