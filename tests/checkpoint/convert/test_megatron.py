"""Runs of megatron-core, made by megatron_runs.py, against what it reads and computes itself."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest

from checkpoint.convert import moves
from checkpoint.convert.engine import Renamed
from checkpoint.convert.formats import open_place
from checkpoint.convert.mapping import build
from checkpoint.convert.megatron import CLASSES, ONLY, adapted, read_args, read_megatron
from checkpoint.convert.sources import Source
from checkpoint.convert.torchfiles import read_torch
from sharding.errors import MismatchError
from tests.checkpoint.convert.foreign import Params, arrays, next_step, refused, unpack, write
from tests.checkpoint.convert.megatron_runs import ARCHIVE, BASE, BETAS, EPS, LLAMA, LR, RUNS, STEPS
from tests.checkpoint.convert.test_pickles import Calls, archive
from trainer.commands.main import main

TAG = f"iter_{STEPS:07d}"
FILE = "model_optim_rng.pt"
STATES = {"exp_avg": "mu", "exp_avg_sq": "nu", "fp32_param": "masters", "param": "masters"}
LAYERED = {"self_attention.linear_qkv.layer_norm_": "input_layernorm.",
           "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return unpack(ARCHIVE, tmp_path_factory.mktemp("megatron"))


@pytest.fixture
def run(runs, tmp_path):
    """Returns a function that copies one layout of a run, to be broken."""

    def copy(name, layout):
        shutil.copytree(runs / name / layout, tmp_path / name / layout)
        return tmp_path / name / layout

    return copy


def theirs(folder, when="before") -> dict[str, np.ndarray]:
    """Returns part/name → array as megatron-core loaded them, each layer by itself."""
    found = {}
    expected = np.load(folder / "expected.npz")
    for key in (key for key in expected.files if key.startswith(f"{when}/")):
        array, name, part = expected[key], key.removeprefix(f"{when}/"), "params"
        if state := re.fullmatch(r"optimizer\.state\.(\w+)\.(.+)", name):
            part, name = STATES[state[1]], state[2]
        stacked = name.startswith("decoder.layers.")
        for index, layer in enumerate(array) if stacked else [(0, array)]:
            single = name.replace("decoder.layers.", f"decoder.layers.{index}.")
            for before, after in LAYERED.items():
                single = single.replace(before, after)
            found[f"{part}/{single}"] = layer
    masters = [name for name in found if name.startswith("masters/")]
    for name in masters:
        found[name.replace("masters/", "params/")] = found.pop(name)
    return found


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


def inverse(source: Source, family, model) -> dict[str, np.ndarray]:
    """Returns part/name → array of theirs, made from arrays of ours by the table."""
    return {
        f"{move.part}/{element.name}": build(
            element, Renamed(move.tensors, move.plan.names), np.dtype(np.float32)
        )
        for move in moves.to_theirs(source, family, model, None)
        for element in move.plan.elements
    }


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("layout", ["dist", "legacy"])
@pytest.mark.parametrize("name", RUNS)
def test_tensors_are_those_that_megatron_reads(name, layout, runs):
    source, want = read_megatron(runs / name / layout), theirs(runs / name)
    assert open_place(str(runs / name / layout))[0] == "megatron"
    assert open_place(str(runs / name / layout / TAG))[0] == "megatron"
    if name == "qwen" and layout == "legacy":  # the distributed optimizer has a file of its own
        want = {key: array for key, array in want.items() if key.startswith("params/")}
    assert_equal(arrays(source), want)
    if len(source.parts) == 3:
        assert source.step == STEPS
        assert (source.optimizer["betas"], source.optimizer["eps"]) == (BETAS, EPS)
    else:
        assert name == "neox" or layout == "legacy"


@pytest.mark.parametrize("place", ["llama/dist", "gpt2/legacy", "bfloat16/legacy"])
def test_to_torus_and_back_bit_for_bit(place, runs, tmp_path, capsys):
    command = ["convert", str(runs / place), f"torus:{tmp_path}/start", "--with-optimizer"]
    assert main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "start").exists()
    assert main(command) == 0
    assert "moments of Adam: step 3, lr 0.01, betas (0.9, 0.95)" in capsys.readouterr().out
    source = read_megatron(runs / place)
    family, model = adapted(read_args(source.described), source)
    ours = moves.native_source(tmp_path / "start/checkpoints", 0, optimizer=True)
    assert ours.step == STEPS
    assert_equal(inverse(ours, family, model), arrays(source))
    if "gpt2" not in place:  # whose heads are wider than Hugging Face's may be
        assert main(["convert", f"{tmp_path}/start", f"hf:{tmp_path}/hf"]) == 0
        config = json.loads((tmp_path / "hf/config.json").read_text())
        assert (config["model_type"], config["vocab_size"]) == ("llama", 32)


def test_without_arguments_a_config_is_needed(run, tmp_path, capsys):
    folder = run("llama", "dist")
    arguments = ["convert", str(folder), f"torus:{tmp_path}/one"]
    assert main(arguments) == 0
    assert main(["convert", f"{tmp_path}/one", f"hf:{tmp_path}/hf"]) == 0
    common = read_torch(folder / TAG / "common.pt", CLASSES)
    del common["args"]
    write(folder / TAG / "common.pt", common)
    assert main([*arguments[:2], f"torus:{tmp_path}/two"]) == 2
    assert "name a folder that has one with --like" in capsys.readouterr().err
    assert main([*arguments[:2], f"torus:{tmp_path}/two", f"--like={tmp_path}/hf"]) == 0
    assert main(["diff", f"{tmp_path}/one", f"{tmp_path}/two"]) == 0


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    "place",
    ["llama/dist", "neox/legacy", pytest.param("qwen/dist", marks=pytest.mark.soak),
     pytest.param("gpt2/legacy", marks=pytest.mark.soak)],
)  # fmt: skip
def test_logits_and_the_next_step_are_theirs(place, runs, tmp_path):
    folder = runs / place.split("/")[0]
    with_optimizer = [] if "neox" in place else ["--with-optimizer"]
    assert main(["convert", str(runs / place), f"torus:{tmp_path}/start", *with_optimizer]) == 0
    expected = np.load(folder / "expected.npz")
    found = next_step(tmp_path / "start", LR, expected["tokens"], train=bool(with_optimizer))
    assert np.abs(expected["logits"]).max() > 0.1
    assert np.abs(found.logits_BTV - expected["logits"]).max() < 1e-4
    if not with_optimizer:
        return
    optimizer = found.exp.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (*BETAS, EPS)
    before, after = Params(found.before.params), Params(found.after.params)
    source = read_megatron(runs / place)
    family, model = adapted(read_args(source.described), source)
    want, was = theirs(folder, "after"), inverse(Source({"params": before}), family, model)
    for name, array in inverse(Source({"params": after}), family, model).items():
        assert np.abs(array - was[name]).max() > 1e-3, name  # the step is no small one
        error = np.abs(array - want[name])
        if name.endswith("linear_qkv.bias") and model.position == "learned":
            # A bias of keys changes no softmax: its gradient is rounding, which Adam scales up.
            error = np.delete(error.reshape(model.kv_heads, -1, model.head_dim), -2, axis=1)
        assert error.max() < 1e-6, name


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ONLY)
def test_arguments_that_change_the_computation(name):
    args = BASE | LLAMA
    read_args(args | {name: ONLY[name]})
    with pytest.raises(MismatchError, match=rf"^args of the checkpoint: {name} = \d"):
        read_args(args | {name: 7})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(normalization="L2Norm"), "normalization = 'L2Norm' is not supported; known: Layer"),
        (dict(position_embedding_type="yarn"), "position_embedding_type = 'yarn' is not supported"),
        (dict(add_bias_linear=True), "swiglu = True with biases is not supported"),
        (dict(normalization="LayerNorm", qk_layernorm=True), "qk_layernorm = True with biases"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(num_query_groups=3), "kv_heads = 3 does not divide heads = 4"),
    ],
)
def test_arguments_that_no_model_of_ours_has(changes, message):
    with pytest.raises(MismatchError, match=message):
        read_args(BASE | LLAMA | changes)


def test_moments_that_a_file_does_not_hold(runs, tmp_path, capsys):
    error = refused(runs / "qwen/legacy", tmp_path, capsys, 3, "--with-optimizer")
    assert "holds no moments and step of Adam" in error


def test_a_rank_that_is_missing(run, tmp_path, capsys):
    folder = run("llama", "legacy")
    shutil.rmtree(folder / TAG / "mp_rank_01")
    error = refused(folder, tmp_path, capsys, 3)
    assert "there are files of 1 tensor parallel ranks, not of all" in error
    folder = run("neox", "legacy")
    shutil.rmtree(folder / TAG / "mp_rank_00_000")
    assert "1 files of 1 × 2 ranks" in refused(folder, tmp_path, capsys, 3)


CHANGES = {
    "an old order": (lambda s: s.update(checkpoint_version=2.0), 3, "version 2.0 is not read"),
    "virtual stages": (lambda s: s.update(model0=s.pop("model")), 3, "stages .* are not read"),
    "another norm": (lambda s: s["model"].update(
        {"decoder.final_layernorm.weight": np.zeros(8, np.float32)}), 3,
        "`decoder.final_layernorm.weight` differs between tensor parallel ranks"),
    "another step": (lambda s: s["optimizer"]["state"][0].update(
        step=np.array(4, np.float32)), 3, r"at steps \[3, 4\]"),
    "a moment of another shape": (lambda s: s["optimizer"]["state"][0].update(
        exp_avg=np.zeros((4, 4), np.float32)), 3, r"`mu/embedding.* has shape \[4, 4\]"),
    "no moment": (lambda s: s["optimizer"]["state"].pop(3), 4, "KeyError: 3"),
    "no arguments": (lambda s: s.pop("args"), 4, "KeyError: 'args'"),
    "a tensor left over": (lambda s: s["model"].update(
        {"decoder.layers.0.mlp.router.weight": np.zeros((2, 8), np.float32)}), 3,
        "groups are not those with and without weight decay"),
    "a tensor that is missing": (lambda s: [s.update(optimizer={"param_groups": [{"step": 3}]}),
        s["model"].pop("output_layer.weight")], 3, "ranks of stage 0 hold other tensors"),
    "another iteration": (lambda s: s.update(iteration=4), 3, "its ranks are at several steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_contradict_each_other(name, run, tmp_path, capsys):
    change, status, message = CHANGES[name]
    folder = run("llama", "legacy")
    path = folder / TAG / "mp_rank_00" / FILE
    state = read_torch(path, CLASSES)
    change(state)
    write(path, state)
    assert re.search(message, refused(folder, tmp_path, capsys, status))


def test_places_outside_of_the_folder(run, tmp_path, capsys):
    folder = run("llama", "legacy")
    pointer = folder / "latest_checkpointed_iteration.txt"
    for text, status, message in (
        ("../llama", 4, "outside of its own"), ("..", 4, "outside of its own"),
        ("7", 3, "names iter_0000007, which is not there"), ("release", 3, "names release, which"),
    ):  # fmt: skip
        pointer.write_text(text)
        assert message in refused(folder, tmp_path, capsys, status)
    pointer.write_text(str(STEPS))
    shutil.move(folder / TAG / "mp_rank_01", tmp_path / "elsewhere")
    (folder / TAG / "mp_rank_01").symlink_to(tmp_path / "elsewhere")
    assert "link out of its folder" in refused(folder, tmp_path, capsys, 4)


@pytest.mark.parametrize("file", [f"legacy/{TAG}/mp_rank_01/{FILE}", f"dist/{TAG}/common.pt"])
def test_a_pickle_that_calls(file, run, tmp_path, capsys):
    layout, _, rest = file.partition("/")
    folder = run("llama", layout)
    (folder / rest).write_bytes(archive(pickle.dumps(Calls(os.system, "touch ran"), 2)))
    assert "names `posix.system`" in refused(folder, tmp_path, capsys, 4)
