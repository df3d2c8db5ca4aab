"""Runs of DeepSpeed, made by deepspeed_runs.py, against what DeepSpeed itself reads from them."""

import os
import pickle
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.convert.deepspeed import read_ucp, read_zero
from checkpoint.convert.moves import PREFIXES
from checkpoint.convert.native import NativeTensors
from checkpoint.convert.torchfiles import read_torch
from tests.checkpoint.convert.deepspeed_runs import ARCHIVE, BETAS, EPS, LR, RUNS, STEPS
from tests.checkpoint.convert.foreign import arrays, next_step, plain, refused, unpack, write
from tests.checkpoint.convert.test_pickles import Calls, archive
from trainer.commands.main import main

KEYS = {"fp32": "params", "exp_avg": "mu", "exp_avg_sq": "nu"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return unpack(ARCHIVE, tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture
def run(runs, tmp_path):
    """Returns a function that copies a run, to be broken."""

    def copy(name):
        shutil.copytree(runs / name, tmp_path / name)
        return tmp_path / name

    return copy


def theirs(folder) -> dict[str, np.ndarray]:
    """Returns part/name → array of a universal checkpoint that DeepSpeed made, file by file."""
    found = {}
    for path in sorted(folder.glob(f"global_step{STEPS}_universal/zero/*/*.pt")):
        if path.stem in KEYS:
            value = read_torch(path)
            tensor = value["param"] if isinstance(value, dict) else value
            found[f"{KEYS[path.stem]}/{path.parent.name}"] = tensor.read()
    return found


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a
    )


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_moments_are_those_that_deepspeed_reads(name, runs):
    want = theirs(runs / name)
    assert len(want) == 3 * 21
    for source in (read_zero(runs / name), read_ucp(runs / name)):
        assert equal(arrays(source), want)
        assert source.step == STEPS
        assert (source.optimizer["betas"], source.optimizer["eps"]) == (BETAS, EPS)
        assert source.facts["mu/model.embed_tokens.weight"] == (np.dtype("float32"), (19, 8))


def counting_itself(version: str):
    """Returns a change of a rank's states to those of DeepSpeed's own optimizers.

    Both count by a Python integer in the state of a tensor; FusedAdam keeps a `step` of 0 in the
    parameter group beside it, and up to version 0.6.3 had that count alone.
    """

    def change(state):
        inner = state.get("base_optimizer_state") or state["optimizer_state_dict"]
        for entry in inner["state"].values():
            entry["step"] = int(entry["step"])
            if version == "FusedAdam, early":
                del entry["step"]
        for group in inner["param_groups"]:
            for name in ("maximize", "foreach", "capturable", "differentiable", "fused",
                         "decoupled_weight_decay"):  # fmt: skip
                group.pop(name, None)
            group |= {"bias_correction": True}
            if version != "CPUAdam":
                group["step"] = STEPS if version == "FusedAdam, early" else 0

    return change


@pytest.mark.parametrize("name", ["zero2_world2", "zero3_world3"])
@pytest.mark.parametrize("version", ["FusedAdam", "FusedAdam, early", "CPUAdam"])
def test_optimizers_of_deepspeed_count_steps_by_an_integer(version, name, run):
    folder = run(name)
    want = arrays(read_zero(folder))
    for rank in range(RUNS[name][1]):
        change_states(folder, counting_itself(version), rank)
    found = read_zero(folder)
    assert found.step == STEPS and type(found.step) is int
    assert equal(arrays(found), want)
    assert (found.optimizer["betas"], found.optimizer["eps"]) == (BETAS, EPS)


def test_integers_as_steps_of_a_universal_checkpoint(run):
    folder = run("zero1_world2")
    for path in folder.glob("*_universal/zero/*/step.pt"):
        write(path, STEPS)
    assert read_ucp(folder).step == STEPS


@pytest.mark.parametrize("name", ["zero1_world3", "zero3_world2"])
def test_to_torus_and_back_bit_for_bit(name, runs, tmp_path, capsys):
    command = ["convert", str(runs / name), f"torus:{tmp_path}/start", "--with-optimizer"]
    assert main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "start").exists()
    assert main(command) == 0
    assert "moments of Adam: step 3, lr 0.01, betas (0.9, 0.95)" in capsys.readouterr().out
    assert main(["convert", f"{tmp_path}/start", f"ucp:{tmp_path}/ucp"]) == 0
    assert main(["convert", f"{tmp_path}/start", f"dcp:{tmp_path}/dcp", "--with-optimizer"]) == 0
    assert main(["diff", f"ucp:{runs / name}", f"{tmp_path}/ucp"]) == 0
    assert main(["diff", str(runs / name), f"{tmp_path}/ucp"]) == 0
    for back in ("ucp", "dcp"):
        capsys.readouterr()
        again = f"{tmp_path}/from_{back}"
        assert main(["convert", f"{tmp_path}/{back}", f"torus:{again}", "--with-optimizer"]) == 0
        assert main(["diff", f"{tmp_path}/start", again]) == 0
        assert "37 arrays equal in every bit" in capsys.readouterr().out


def test_what_is_left_behind_is_told(runs, tmp_path, capsys):
    assert main(["convert", str(runs / "zero1_world2"), f"torus:{tmp_path}/start"]) == 0
    assert "left behind: 42 values (mu/" in capsys.readouterr().out
    facts = NativeTensors(tmp_path / "start/checkpoints", 0, "").facts
    assert {name.split("/")[0] for name in facts} == {"params"}
    assert main(["convert", f"{tmp_path}/start", f"ucp:{tmp_path}/ucp"]) == 3
    assert "holds no moments and count of Adam" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["zero2_world2", "zero3_world3"])
def test_the_next_step_is_theirs(name, runs, tmp_path):
    command = ["convert", str(runs / name), f"torus:{tmp_path}/start", "--with-optimizer"]
    assert main(command) == 0
    expected = np.load(runs / name / "expected.npz")
    exp, state, found_BTV, after, metrics = next_step(tmp_path / "start", LR, expected["batch"])
    assert (exp.optimizer.b1, exp.optimizer.b2, exp.optimizer.eps) == (*BETAS, EPS)
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
    assert [int(count) for count in counts] == [STEPS] and int(state.step) == 0
    assert np.abs(found_BTV - expected["logits"]).max() < 1e-4
    assert float(metrics["learning_rate"]) == pytest.approx(LR)
    embedding = np.asarray(after.params["embedding"])[: exp.model.vocab]
    moved = np.abs(embedding - np.asarray(state.params["embedding"])[: exp.model.vocab]).max()
    assert moved > 1e-3  # the step is no small one
    assert np.abs(embedding - expected["model.embed_tokens.weight"]).max() < 1e-6
    layers = after.params["layers"]
    for index in range(exp.model.layers):
        prefix = f"model.layers.{index}."
        for ours, name in (
            (layers["mlp"]["up"][index].T, "mlp.up_proj.weight"),
            (layers["mlp"]["down"][index].T, "mlp.down_proj.weight"),
            (layers["mlp_norm"]["scale"][index], "post_attention_layernorm.weight"),
            (layers["attention"]["wq"][index].reshape(8, 8).T, "self_attn.q_proj.weight"),
            (layers["attention"]["wo"][index].reshape(8, 8).T, "self_attn.o_proj.weight"),
        ):
            error = float(jnp.abs(jnp.asarray(np.asarray(ours)) - expected[prefix + name]).max())
            assert error < 1e-6, name


def test_moments_of_a_padded_vocabulary_are_zeros_there(runs, tmp_path):
    command = ["convert", str(runs / "zero2_world2"), f"torus:{tmp_path}/start"]
    assert main([*command, "--with-optimizer"]) == 0
    for prefix in PREFIXES.values():
        tensors = NativeTensors(tmp_path / "start/checkpoints", 0, prefix)
        rows = tensors.facts["embedding"][1][0]
        assert rows > 19 and not tensors.read("embedding", (), 19, rows).any()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["zero1_world3", "zero3_world3"])
def test_a_rank_that_is_missing(name, run, tmp_path, capsys):
    folder = run(name)
    next(folder.glob("*/*rank_1_mp_rank_00_optim_states.pt")).unlink()
    assert "ranks [0, 2], not of 3" in refused(folder, tmp_path, capsys, 3)


def change_states(folder, change, rank=0) -> None:
    """Rewrites the optimizer states of a rank with plain values after `change`."""
    path = next(folder.glob(f"*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    state = read_torch(path, frozenset({
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address"}))  # fmt: skip
    state = plain(state)
    change(state["optimizer_state_dict"])
    write(path, state)


def short(state):
    state["single_partition_of_fp32_groups"][0] = np.zeros(5, np.float32)


CHANGES = {
    "another step": (lambda s: s["base_optimizer_state"]["state"][0].update(
        step=np.array(4, np.float32)), 3, r"its ranks are at steps \[3, 4\]"),
    "a step that is none": (lambda s: s["base_optimizer_state"]["state"][0].update(step=2.5), 4,
                            r"2.5 is not a number of steps"),
    "many steps": (lambda s: s["base_optimizer_state"]["state"][0].update(
        step=np.zeros(9, np.float32)), 4, "is not a number of steps"),
    "a short buffer": (short, 4, "ends inside"),
    "no moments": (lambda s: s["base_optimizer_state"]["state"].clear(), 4, "is not a run of ZeRO"),
    "no groups": (lambda s: s.pop("base_optimizer_state"), 4, "KeyError: 'base_optimizer_state'"),
    "a matrix for a buffer": (lambda s: s["single_partition_of_fp32_groups"].__setitem__(
        0, np.zeros((4, 4), np.float32)), 4, "is not flat"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_states_that_contradict_each_other(name, run, tmp_path, capsys):
    change, status, message = CHANGES[name]
    folder = run("zero1_world2")
    change_states(folder, change)
    assert re.search(message, refused(folder, tmp_path, capsys, status))


def test_places_outside_of_the_folder(run, tmp_path, capsys):
    folder = run("zero1_world2")
    for name in ("../zero1_world2", "/etc", "..", ""):
        (folder / "latest").write_text(name)
        assert "outside of its own" in refused(folder, tmp_path, capsys, 4)
    (folder / "latest").write_text("absent")
    assert "which is not there" in refused(folder, tmp_path, capsys, 3)
    tag = folder / f"global_step{STEPS}"
    shutil.move(tag, tmp_path / "elsewhere")
    tag.symlink_to(tmp_path / "elsewhere")
    (folder / "latest").write_text(tag.name)
    assert "link out of its folder" in refused(folder, tmp_path, capsys, 4)


def test_a_universal_checkpoint_that_leads_outside(run, tmp_path, capsys):
    folder = run("zero3_world2")
    place = folder / f"global_step{STEPS}_universal/zero/model.norm.weight"
    shutil.move(place, tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    error = refused(f"ucp:{folder}", tmp_path, capsys, 4, "--with-optimizer")
    assert "link out of its folder" in error
    place.unlink()
    zero = place.parent
    zero.rename(tmp_path / "zero")
    zero.symlink_to(tmp_path / "zero")
    assert "link out of its folder" in refused(f"ucp:{folder}", tmp_path, capsys, 4)
    zero.unlink()
    (tmp_path / "zero").rename(zero)
    assert "tensors are needed" in refused(f"ucp:{folder}", tmp_path, capsys, 3)


@pytest.mark.parametrize("place", [
    "zero1_world2/global_step3/mp_rank_00_model_states.pt",
    "zero3_world2/global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "ucp:zero2_world2/global_step3_universal/zero/lm_head.weight/fp32.pt",
    "ucp:zero2_world2/global_step3_universal/zero/optimizer_state.pt",
])  # fmt: skip
def test_a_pickle_that_calls(place, run, tmp_path, capsys):
    kind, path = place.split(":") if ":" in place else ("zero", place)
    folder = run(path.split("/")[0])
    evil = pickle.dumps(Calls(os.system, f"touch {tmp_path}/ran"), 2)
    (tmp_path / path).write_bytes(archive(evil))
    error = refused(f"{kind}:{folder}", tmp_path, capsys, 4)
    assert "names `posix.system`" in error
