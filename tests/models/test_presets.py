"""Published sizes, and every shipped model's train step traced on a mesh without memory."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.decoder import param_specs
from models.presets import LADDER, PRESETS, ladder
from models.spec import count
from sharding.config import MeshConfig
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from trainer.state import abstract_state, make_layout
from trainer.step import make_train_step

# Of the released weights, tied embeddings once.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
    "olmo2-7b": 7_298_617_344,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_the_published_one(name):
    config = PRESETS[name]()
    config.validate()
    assert count(param_specs(config)) == PUBLISHED[name]


@pytest.mark.parametrize("size", LADDER)
def test_ladder_sizes_are_what_they_say(size):
    config = ladder(size)
    config.validate()
    said = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert count(param_specs(config)) == pytest.approx(said, rel=0.1)
    assert config.heads * config.head_dim == config.width


def test_bad_size_is_refused_with_the_choices():
    with pytest.raises(UsageError, match=r"no model of size '1B'; choose 10m, 20m, .*, 1b"):
        ladder("1B")


@pytest.mark.parametrize("name", PRESETS)
def test_train_step_traces_on_a_mesh(name):
    """The shipped config's own step on fsdp 4 and tensor 2; nothing is allocated or compiled."""
    module = name.replace("-", "_").replace(".", "")
    experiment = importlib.import_module(f"configs.{module}").get_config()
    experiment.mesh = MeshConfig(fsdp=4, tensor=2)
    mesh = make_mesh(experiment.mesh, jax.devices()[:8])
    shape = (experiment.train.batch_size, experiment.data.seq_len)
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P(BATCH, SEQ)))
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), row)
    layout = make_layout(experiment, mesh)
    state = abstract_state(experiment, layout)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(make_train_step(experiment, layout), donate_argnums=0).trace(state, batch)
    new_state, metrics = traced.out_info
    assert jax.tree.map(lambda a: a.shape, new_state) == jax.tree.map(lambda a: a.shape, state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
