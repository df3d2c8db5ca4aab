"""Zeros are stored: models as they are initialised convert, verify, load and train."""

import dataclasses

import jax
import numpy as np
import pytest

from checkpoint.config import CheckpointConfig
from checkpoint.convert.families import FAMILIES, parameter_shapes
from checkpoint.convert.native import NativeTensors, create_step
from checkpoint.fingerprint import rows_sums
from checkpoint.manager import CheckpointManager
from checkpoint.manifest import read_step, write_record
from checkpoint.steps import CheckpointError
from checkpoint.storage import load_step
from checkpoint.tree import unflatten
from configs.from_run import get_config
from models.config import ModelConfig
from models.presets import PRESETS
from tests.checkpoint.convert.folders import (
    FAMILY_OF,
    random_tensors,
    read_folder,
    same,
    write_folder,
)
from trainer.commands.main import main
from trainer.config import Experiment
from trainer.loop import train
from trainer.restore import restore_params
from trainer.run import write_experiment

SMALL = ModelConfig(vocab=259, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48,
                    max_length=64)  # fmt: skip
SIZES = ("vocab", "layers", "width", "heads", "head_dim", "mlp", "max_length")
OTHERS = {  # families of which no preset is shipped
    "qwen2": dict(qkv_bias=True),
    "gemma": dict(norm="rmsnorm_plus_one", activation="geglu", tie_embeddings=True,
                  scale_embeddings=True),
    "phi3": {},
    "gpt_neox": dict(norm="layernorm", qkv_bias=True, out_bias=True, kv_heads=4,
                     activation="gelu_exact", parallel_residual=True),
}  # fmt: skip
READ = sorted(set(FAMILIES) - {"mixtral"})  # which has a table and no model yet


def model_of(model_type: str) -> ModelConfig:
    """Returns a model of a family, with sizes that train on the built-in dataset."""
    if model_type in OTHERS:
        return dataclasses.replace(SMALL, **OTHERS[model_type])
    preset = next(preset for preset, name in FAMILY_OF.items() if name == model_type)
    model = PRESETS[preset]()
    sizes = {name: getattr(SMALL, name) for name in SIZES}
    kv_heads = 4 if model.kv_heads == model.heads else 2
    return dataclasses.replace(model, **sizes, kv_heads=kv_heads, attention_scale=0.0)


def converted(model_type: str, tmp_path, tensors_of):
    """Returns the run made of a folder with the tensors that `tensors_of` makes of random ones."""
    family, model = FAMILIES[model_type], model_of(model_type)
    tensors = {n: tensors_of(n, x) for n, x in random_tensors(family, model).items()}
    write_folder(tmp_path / "hf", family.write(model), tensors)
    assert main(["convert", str(tmp_path / "hf"), f"torus:{tmp_path}/start"]) == 0
    return tmp_path / "start", tensors


def experiment_from(start):
    exp = get_config(str(start))
    exp.model = dataclasses.replace(exp.model, dtype="float32", remat="none")
    exp.data.seq_len, exp.train.batch_size, exp.train.steps = 16, 8, 1
    exp.optimizer.warmup_steps = exp.eval.every = 0
    exp.log.tensorboard = False
    return exp


@pytest.mark.parametrize("model_type", READ)
def test_a_model_of_zeros_goes_there_and_back_and_is_started_from(model_type, tmp_path, capsys):
    start, tensors = converted(model_type, tmp_path, lambda _, x: np.zeros_like(x))
    assert main(["verify", str(start)]) == 0
    assert main(["convert", str(start), f"hf:{tmp_path}/out"]) == 0
    assert same(read_folder(tmp_path / "out"), tensors)
    params, _ = restore_params(str(start), experiment_from(start), 0)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(params))


def like_transformers(name: str, x: np.ndarray) -> np.ndarray:
    """Returns weights as they are initialised: normal, biases zero, norms one, Gemma's zero."""
    if x.ndim > 1:
        return np.random.default_rng(x.size).normal(0, 0.02, x.shape).astype(x.dtype)
    ones = name.endswith("ln_1.weight") or name.endswith(("ln_2.weight", "ln_f.weight"))
    return np.full_like(x, float(ones))


@pytest.mark.parametrize(
    "model_type",
    [
        name if name == "gemma3_text" else pytest.param(name, marks=pytest.mark.soak)
        for name in READ
    ],
)
def test_a_model_as_it_is_initialised_trains(model_type, tmp_path):
    start, _ = converted(model_type, tmp_path, like_transformers)
    assert main(["verify", str(start)]) == 0
    assert train(experiment_from(start), f"{tmp_path}/run").step == 1


@pytest.fixture
def untrained(tmp_path):
    """A run of zeros that stands before its first update, its moments zeros too."""
    model = model_of("gpt2")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(model).items()}
    arrays = {f"{part}/{n}": x for part in ("params", "optimizer/mu", "optimizer/nu")
              for n, x in zeros.items()} | {"optimizer/count": np.zeros((), np.int32)}  # fmt: skip
    with CheckpointManager(tmp_path / "run/checkpoints", CheckpointConfig(every=1)) as manager:
        manager.save(0, unflatten(arrays), {}, force=True)
    write_experiment(str(tmp_path / "run"), Experiment(name="zeros", model=model))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["dcp", "ucp"])
def test_moments_and_a_count_of_zero_go_there_and_back(kind, untrained, tmp_path, capsys):
    out, again = f"{kind}:{tmp_path}/out", f"torus:{tmp_path}/again"
    assert main(["convert", str(untrained), out, "--with-optimizer"]) == 0
    assert main(["convert", out, again, "--with-optimizer"]) == 0
    assert main(["verify", again]) == 0
    capsys.readouterr()
    assert main(["diff", str(untrained), again]) == 0, capsys.readouterr().out
    third = f"{len(parameter_shapes(model_of('gpt2'))) * 3 + 1} arrays equal in every bit"
    assert third in capsys.readouterr().out


def test_a_count_of_other_bits_is_refused(untrained, tmp_path, capsys):
    """It is read alone, before everything else, and compared all the same."""
    arrays = read_step(untrained / "checkpoints", 0)[2] | {"optimizer/count": "1" * 16}
    write_record(untrained / "checkpoints", 0, arrays)
    assert main(["convert", str(untrained), f"dcp:{tmp_path}/out", "--with-optimizer"]) == 1
    assert "not the bits that were saved: optimizer/count" in capsys.readouterr().err


SHAPES = {
    "scalar": (), "vector": (5,), "one": (1,), "wide": (3, 1000, 700), "rows": (4000, 700),
    "flat": (2, 3, 0 + 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_every_chunk_is_there_whatever_it_holds(dtype, tmp_path):
    """Arrays of zeros, of several chunks and of one, come back by a restore."""
    kind = jax.numpy.dtype(dtype)
    facts = {f"a/{name}": (kind, shape) for name, shape in SHAPES.items()}
    made, sums = create_step(tmp_path, 0, facts, {}, prefix=""), {}
    for name, (_, shape) in facts.items():
        leads = [(i,) for i in range(shape[0])] if len(shape) == 3 else [()]
        for lead in leads:
            part = np.zeros(shape[len(lead) :], kind)
            made.put(name, lead, part)
            sums[name] = sums.get(name, 0) + rows_sums(part, lead, 0, shape)
    made.finish(sums)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {name: jax.ShapeDtypeStruct(s, kind, sharding=here) for name, s in SHAPES.items()}
    state, _ = load_step(tmp_path, 0, {"a": abstract})
    for name, shape in SHAPES.items():
        assert state["a"][name].shape == shape and not np.asarray(state["a"][name]).any()


def test_an_array_that_is_not_put_is_named(tmp_path):
    """What is missing is no zero: neither when the step is read here nor when Orbax reads it."""
    facts = {"a/w": (np.dtype(np.float32), (3, 4, 5)), "a/v": (np.dtype(np.float32), (3,))}
    made = create_step(tmp_path, 0, facts, {}, prefix="")
    sums = {}
    for lead in ((0,), (2,)):
        part = np.ones((4, 5), np.float32)
        made.put("a/w", lead, part)
        sums["a/w"] = sums.get("a/w", 0) + rows_sums(part, lead, 0, (3, 4, 5))
    made.put("a/v", (), np.zeros(3, np.float32))
    sums["a/v"] = rows_sums(np.zeros(3, np.float32), (), 0, (3,))
    made.finish(sums)
    with pytest.raises(CheckpointError, match="cannot read `a/w` of step 0"):
        NativeTensors(tmp_path, 0, prefix="").verify()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        n: jax.ShapeDtypeStruct(facts[f"a/{n}"][1], np.float32, sharding=here) for n in "wv"
    }
    with pytest.raises(CheckpointError, match=r"cannot read step 0 in .*: `a/w`: .*missing$"):
        load_step(tmp_path, 0, {"a": abstract})
