"""Runs of MaxText, made by maxtext_runs.py, against the logits that MaxText computes from them."""

import json
import tarfile

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.convert.native import NativeTensors
from checkpoint.convert.orbax_trees import read_orbax
from configs.from_run import get_config
from models.decoder import forward, logits
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from tests.checkpoint.convert.maxtext_runs import ARCHIVE, SIZES, STEPS
from trainer.commands.main import main
from trainer.restore import first_state
from trainer.state import init_state, make_layout

SCALING = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=8192)  # fmt: skip
TIED = dict(tie_word_embeddings=True)
CONFIGS = {
    "llama": ("llama", dict(hidden_act="silu", rope_theta=10_000.0)),
    "llama31": ("llama", dict(hidden_act="silu", rope_theta=500_000.0, rope_scaling=SCALING)),
    "qwen3": ("qwen3", dict(hidden_act="silu", rope_theta=1e6, **TIED)),
    "gemma": ("gemma", dict(hidden_act="gelu_pytorch_tanh", rope_theta=10_000.0,
                            rms_norm_eps=1e-6, **TIED)),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maxtext")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for name, (model_type, fields) in CONFIGS.items():
        config = {
            "model_type": model_type, "vocab_size": SIZES["vocab_size"],
            "hidden_size": SIZES["base_emb_dim"], "intermediate_size": SIZES["base_mlp_dim"],
            "num_hidden_layers": SIZES["base_num_decoder_layers"],
            "num_attention_heads": SIZES["base_num_query_heads"],
            "num_key_value_heads": SIZES["base_num_kv_heads"], "head_dim": SIZES["head_dim"],
            "max_position_embeddings": SIZES["max_target_length"], "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, **fields,
        }  # fmt: skip
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def converted(name, runs, tmp_path, *options) -> int:
    return main(["convert", f"orbax:{runs / name}", f"torus:{tmp_path}/start", "--family=maxtext",
                 f"--like={runs / name}", *options])  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "llama31"])
def test_logits_are_those_of_maxtext(name, runs, tmp_path):
    assert converted(name, runs, tmp_path, "--with-optimizer") == 0
    exp = get_config(f"{tmp_path}/start")
    exp.model.dtype, exp.model.remat = "float32", "none"
    mesh = make_mesh(exp.mesh, jax.devices()[:1])
    expected = np.load(runs / name / "expected.npz")
    tokens_BT = expected["tokens"]
    B, T = tokens_BT.shape
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    with jax.set_mesh(mesh):
        layout = make_layout(exp, mesh)
        state = first_state(init_state(exp, layout), exp, layout)

        @jax.jit
        def run(params, *rows):
            return logits(params, forward(params, *rows, exp.model)[0], exp.model)

        rows = (tokens_BT, positions_BT, np.ones_like(tokens_BT))
        rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(BATCH, SEQ)))
        found_BTV = np.asarray(run(state.params, *rows))
    assert np.abs(expected["logits"]).max() > 0.1
    assert np.abs(found_BTV - expected["logits"]).max() < 1e-4


def test_moments_are_those_of_maxtext_bit_for_bit(runs, tmp_path):
    assert converted("llama", runs, tmp_path, "--with-optimizer") == 0
    found, source = NativeTensors(tmp_path / "start/checkpoints", 0, ""), read_orbax(runs / "llama")
    assert int(found.read("optimizer/count", (), 0, 1)) == source.step == STEPS
    for part in ("params", "mu", "nu"):
        tensors = source.parts[part]
        theirs = {name: tensors.read(name, (), 0, shape[0] if shape else 1)
                  for name, (_, shape) in tensors.facts.items()}  # fmt: skip
        prefix = part if part == "params" else f"optimizer/{part}"
        for name, end in (
            ("layers/attention/wk", "key.kernel"),
            ("layers/mlp/down", "wo.kernel"),
            ("layers/attention/wo", "out.kernel"),
            ("layers/mlp_norm/scale", "post_self_attention_layer_norm.scale"),
        ):
            (array,) = (a for n, a in theirs.items() if n.endswith(end))
            ours = found.read(f"{prefix}/{name}", (), 0, array.shape[1])
            assert ours.tobytes() == np.moveaxis(array, 1, 0).tobytes() and array.any()


@pytest.mark.parametrize("name", ["qwen3", "gemma"])
def test_what_maxtext_does_not_cover_is_refused(name, runs, tmp_path, capsys):
    assert converted(name, runs, tmp_path) == 3
    assert f"model_type {name!r} with tied embeddings is not covered" in capsys.readouterr().err


def test_another_block_of_maxtext_is_refused(runs, tmp_path, capsys):
    (runs / "gemma/config.json").write_text((runs / "llama/config.json").read_text())
    assert converted("gemma", runs, tmp_path) == 3
    assert "21 tensors are needed, the source holds 14" in capsys.readouterr().err
