"""What is refused, in which words, and that nothing is written then; overrides; JSON; resuming."""

import copy
import dataclasses
import json
import os
import pickle
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
    "fraction for int": (
        [TINY, "--config.train.batch_size=2.5"],
        r"train.batch_size = 2.5 is not of type int",
    ),
    "wrong bool": (
        [TINY, "--config.data.shuffle=no"],
        r"'no' is not of type bool; write true or false",
    ),
    "NaN": ([TINY, "--config.optimizer.peak_lr=nan"], r"optimizer.peak_lr = nan is not finite"),
    "infinity": ([TINY, "--config.train.z_loss=1e999"], r"train.z_loss = inf is not finite"),
    "negative rate": ([TINY, "--config.optimizer.peak_lr=-1"], r"peak_lr = -1.0: at least 0"),
    "negative seed": ([TINY, "--config.train.seed=-1"], r"train.seed = -1: at least 0"),
    "large seed": ([TINY, "--config.train.seed=4294967296"], r"must be below 4294967296"),
    "beta": ([TINY, "--config.optimizer.b2=1"], r"b2 = 1.0: must be below 1"),
    "huge": ([TINY, f"--config.train.steps={10**30}"], r"train.steps = 1e?0+ is above 2"),
    "rope": ([TINY, "--config.model.rope.theta=0"], r"rope.theta = 0.0: must be above 0"),
    "pattern": ([TINY, "--config.model.pattern=()"], r"pattern is empty"),
    "tuple": ([TINY, "--config.data.buckets=8,x"], r"config.data.buckets.* is not of type int"),
    "no text for a tuple": ([TINY, "--config.data.buckets=a b"], r"a b as tuple"),
    "value missing": ([TINY, "--config.train.steps"], r"train.steps needs a value"),
    "leaf as group": ([TINY, "--config.train.steps.x=3"], r"train.steps, which is a value"),
    "steps below warm-up": (
        [TINY, "--config.train.steps=3"],
        r"exceeds config.train.steps = 3; .*stop_at = 3",
    ),
    "config with an argument": (["--config=quickstart:5"], r"takes no argument, got '5'"),
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


FILES = {  # the line that a config file has more
    "exp.optimizer.lr = 3e-4": r"no field 'lr' in config.optimizer .*did you mean `peak_lr`",
    "exp.train.step = 3": r"no field 'step' in config.train .*did you mean `steps`",
    "exp.model.layrs = 3": r"no field 'layrs' in config.model .*did you mean `layers`",
    "exp.model.rope.tetha = 3": r"no field 'tetha' in config.model.rope .*mean `theta`",
    "exp.data.remote.worker = 3": r"no field 'worker' in config.data.remote .*mean `workers`",
    "exp.data.collate.knd = 'fim'": r"no field 'knd' in config.data.collate .*mean `kind`",
    "exp.mesh.tensors = 2": r"no field 'tensors' in config.mesh .*mean `tensor`",
    "exp.eval.evry = 2": r"no field 'evry' in config.eval .*mean `every`",
    "exp.checkpoint.keep = 2": r"no field 'keep' in config.checkpoint .*",
    "exp.log.tensorbord = False": r"no field 'tensorbord' in config.log .*mean `tensorboard`",
    "exp.health.windw = 2": r"no field 'windw' in config.health .*mean `window`",
    "exp.modle = 3": r"no field 'modle' in config .*mean `model`",
    "exp = Experiment(nam='x')": r"no field 'nam' in config .*mean `name`",
    "exp.model = ModelConfig(layrs=3)": r"no field 'layrs' in config.model .*mean `layers`",
    "exp.model = replace(exp.model, layrs=3)": r"no field 'layrs' in config.model .*mean `layers`",
    "exp.optimizer.peak_lr = 'high'": r"config.optimizer.peak_lr = 'high' is not of type float",
    "exp.optimizer.peak_lr = None": r"config.optimizer.peak_lr = None is not of type float",
    "exp.optimizer.peak_lr = float('nan')": r"config.optimizer.peak_lr = nan is not finite",
    "exp.model.layers = 2.5": r"config.model.layers = 2.5 is not of type int",
    "exp.model.layers = True": r"config.model.layers = True is not of type int",
    "exp.model.layers = 10**5000": r"config.model.layers = an integer of 16,610 bits is above",
    "exp.data.shuffle = 1": r"config.data.shuffle = 1 is not of type bool",
    "exp.model.pattern = 'local'": r"config.model.pattern = 'local' is not of type tuple\[str",
    "exp.data.buckets = [8, 'x']": r"config.data.buckets = 'x' is not of type int",
    "exp.model = ModelConfig": r"config.model = <class .*ModelConfig'> is not of type ModelConfig",
}


@pytest.mark.parametrize("line", FILES)
def test_a_config_file_is_checked_like_the_command_line(line, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\n"
        "from models.config import ModelConfig\nfrom trainer.config import Experiment\n\n\n"
        f"def get_config():\n    exp = Experiment()\n    {line}\n    return exp\n"
    )
    refused([f"--config={path}", "--workdir=r"], rf"{path} line 8: {FILES[line]}", capsys)


def test_a_failing_import_of_a_config_keeps_its_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("import nosuchmodule\n")
    with pytest.raises(ModuleNotFoundError, match="nosuchmodule"):
        main(["train", f"--config={tmp_path / 'mine.py'}", "--workdir=r"])


def test_fields_convert_what_means_the_same():
    experiment = Experiment()
    experiment.train.steps = 1e6
    experiment.optimizer.peak_lr = 1
    experiment.model.pattern = ["local", "global"]
    experiment.data.mixture = [["a", 0.5], ["b", [[0, 1], [8, 2]]]]
    assert (experiment.train.steps, type(experiment.train.steps)) == (1_000_000, int)
    assert isinstance(experiment.optimizer.peak_lr, float)
    assert experiment.model.pattern == ("local", "global")
    assert experiment.data.mixture == (("a", 0.5), ("b", ((0, 1), (8, 2))))
    for copied in (pickle.loads(pickle.dumps(experiment)), copy.deepcopy(experiment)):
        assert copied == experiment


def test_config_and_fields_with_a_space():
    experiment, flags = parse_flags(
        ["--config", TINY.removeprefix("--config="), "--workdir", "x", "--config.mesh.data", "-1",
         "--config.mesh.fsdp", "1", "--config.train.steps=1e3", "--config.data.allow_change"],
        workdir="folder",
    )  # fmt: skip
    assert flags == {"workdir": "x"}
    assert (experiment.mesh.data, experiment.train.steps) == (-1, 1000)
    assert experiment.data.allow_change is True


def test_launch_takes_a_config_with_a_space(capsys):
    arguments = ["--tries", "2", "--config", "quickstart", "--config.mesh.zero", "4"]
    assert main(["launch", *arguments, "--workdir", "x"]) == 2
    assert "config.mesh.zero = 4: choose 1, 2 or 3" in capsys.readouterr().err


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
    refused([TINY, "--workdir=/proc/x"], r"/proc/x cannot be written: .*No such file", capsys)


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
    with pytest.raises(
        UsageError, match=r"no field 'lyers' in config.model .*; did you mean `layers`"
    ):
        from_dict({"model": {"lyers": 3}})


CHANGED = {
    bool: lambda value: not value,
    int: lambda value: value + 1,
    float: lambda value: value + 1,
    str: lambda value: value + "changed",
    tuple: lambda value: (*value, *(value[:1] or (1,))),
}


def test_every_leaf_is_either_identity_or_free():
    old, new = Experiment(), Experiment()
    changed = set()
    for path, value in leaves(old):
        owner, _, name = path.rpartition(".")
        target = new
        for part in filter(None, owner.split(".")):
            target = getattr(target, part)
        setattr(target, name, CHANGED[type(value)](value))
        changed.update(differences(old, new))
        setattr(target, name, value)
    fields = {line.split(":")[0].removeprefix("config.") for line in changed}
    assert {"model.layers", "data.seed", "optimizer.peak_lr", "train.steps"} <= fields
    assert not fields & {"mesh.fsdp", "log.every", "train.stop_at", "model.remat", "model.dtype"}
    assert dataclasses.asdict(old) == dataclasses.asdict(new)
