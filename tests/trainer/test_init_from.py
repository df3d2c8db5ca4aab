"""A run that starts from converted weights: the same numbers, on a mesh, in float32."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from checkpoint.convert.families import find_family
from configs.from_run import get_config
from models.config import ModelConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from tests.checkpoint.convert.folders import read_folder, same, shapes_of, write_folder
from trainer.commands.main import main
from trainer.loop import train
from trainer.restore import first_state, restore_params
from trainer.run import check_start, read_experiment
from trainer.state import init_state, make_layout

MODEL = ModelConfig(vocab=259, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=64,
                    max_length=64)  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """A converted folder in bfloat16, and the tensors it was made of."""
    import ml_dtypes

    family, rng = find_family("llama"), np.random.default_rng(0)
    tensors = {
        name: (0.1 * rng.standard_normal(shape) + (len(shape) == 1)).astype(ml_dtypes.bfloat16)
        for name, shape in shapes_of(family, MODEL).items()
    }
    folder = write_folder(tmp_path / "hf", family.write(MODEL), tensors)
    assert main(["convert", str(folder), f"torus:{tmp_path}/start"]) == 0
    return tmp_path / "start", tensors


def experiment_from(start, **model):
    exp = get_config(str(start))
    exp.model = dataclasses.replace(exp.model, dtype="float32", remat="none", **model)
    exp.data.seq_len = 32
    exp.train.batch_size, exp.train.steps, exp.optimizer.warmup_steps = 8, 2, 1
    exp.eval.every = 0
    exp.log.every, exp.log.tensorboard = 1, False
    exp.optimizer.peak_lr = 0.0
    return exp


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_run_starts_from_the_converted_numbers_and_goes_back(start, scan_layers, tmp_path):
    folder, tensors = start
    exp = experiment_from(folder, scan_layers=scan_layers)
    exp.optimizer.weight_decay = 0.0
    result = train(exp, f"{tmp_path}/run")  # at a rate of 0: what comes out is what went in
    assert result.step == 2
    assert read_experiment(tmp_path / "run").train.init_from == str(folder)
    command = ["convert", f"{tmp_path}/run", f"hf:{tmp_path}/out"]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    assert same(read_folder(tmp_path / "out"), tensors)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first is not None


def test_parameters_are_widened_exactly_on_any_mesh(start):
    folder, tensors = start
    exp = experiment_from(folder)
    exp.mesh.fsdp, exp.mesh.tensor = 4, 2
    mesh = make_mesh(exp.mesh)
    layout = make_layout(exp, mesh)
    with jax.set_mesh(mesh):
        before = init_state(exp, layout)
        after = first_state(before, exp, layout)
    assert after.opt_state is before.opt_state  # no moments were converted
    params = after.params
    up_LDF = params["layers"]["mlp"]["up"]
    assert up_LDF.dtype == np.float32 and len(up_LDF.sharding.device_set) == 8
    want_FD = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    assert np.array_equal(np.asarray(up_LDF)[1], want_FD.T)
    restored, _ = restore_params(str(folder), read_experiment(folder), 0)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()),
                                     restored, params))
    )  # fmt: skip


def test_another_model_is_refused_by_field(start, tmp_path):
    folder, _ = start
    exp = experiment_from(folder, norm_eps=1e-3)
    with pytest.raises(UsageError, match=r"another model: config.model.norm_eps: 1e-05 → 0.001"):
        train(exp, f"{tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_run_is_refused(start, tmp_path):
    folder, _ = start
    exp = experiment_from(folder)
    exp.train.init_from = f"{tmp_path}/absent"
    with pytest.raises(UsageError, match="absent is not a run"):
        check_start(f"{tmp_path}/run", exp)
    with pytest.raises(UsageError, match="holds weights to start from, not a run"):
        check_start(str(folder), experiment_from(folder))
    with pytest.raises(UsageError, match="name the run to start from"):
        get_config()
    check_start(f"{tmp_path}/run", experiment_from(folder))


def test_sampling_with_the_tokenizer_that_came_along(start, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    folder, _ = start
    (folder / "tokenizer").mkdir()
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    assert main(["sample", str(folder), "--prompt", "b", "--max-tokens", "4", "--greedy"]) == 0
    assert capsys.readouterr().out.startswith("b")
