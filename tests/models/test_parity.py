"""Logits against Hugging Face transformers: tiny random models with every feature of the family on.

Both run on CPU in float32; the tolerance of 1e-4 on logits of order 1 is rounding. Our config and
parameters come from their saved folder by the tables of checkpoint/convert. Each family also names
one feature which, taken away from our side, must break the match: a feature that the tiny model
does not exercise would prove nothing.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.convert import huggingface
from checkpoint.convert.engine import plan_to_ours
from checkpoint.convert.families import find_family
from checkpoint.convert.fields import flat
from checkpoint.convert.mapping import build as build_array
from checkpoint.convert.safetensors import Tensors
from models import spec
from models.config import ModelConfig
from models.decoder import forward, logits, param_specs
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from tests.checkpoint.convert.theirs import FAMILIES, T, V, build, expected

REASON = "no parity with Hugging Face was checked: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

TOLERANCE = 1e-4


def converted(folder: Path) -> tuple[ModelConfig, spec.Tree]:
    """Returns our config and parameters of their folder; padding gets what must not matter."""
    theirs = huggingface.read_config(folder)
    family = find_family(theirs["model_type"])
    config = family.read(theirs)
    stored = huggingface.find_tensors(folder)
    plan = plan_to_ours(family, config, {n: (t.dtype, t.shape) for n, t in stored.items()}, None)
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in plan.target.items()}
    tensors = Tensors(stored)
    for element in plan.elements:
        arrays[element.name][element.lead] = build_array(element, tensors, np.dtype("float32"))
    tensors.close()
    for name in {"embedding", "head"} & set(arrays):
        assert not arrays[name][config.vocab :].any()
        arrays[name][config.vocab :] = 77.0
    params = spec.map_specs(lambda name, _: jnp.asarray(arrays[name]), param_specs(config))
    return config, params


def our_logits(params: spec.Tree, tokens_BT: np.ndarray, config: ModelConfig) -> np.ndarray:
    config.validate()
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), tokens_BT.shape)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    # Compiling takes longer than running, so it is not to try hard.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
    def run(params, tokens_BT, positions_BT, segments_BT):
        x_BTD, _ = forward(params, tokens_BT, positions_BT, segments_BT, config)
        return logits(params, x_BTD, config)

    with jax.set_mesh(mesh):
        params = jax.device_put(params, spec.shardings(param_specs(config), mesh))
        rows = jax.device_put(
            (tokens_BT, positions_BT, np.ones_like(tokens_BT)), NamedSharding(mesh, P(BATCH, SEQ))
        )
        return np.asarray(run(params, *rows))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_hugging_face(name, tmp_path):
    family = FAMILIES[name]
    model = build(family)
    model.save_pretrained(tmp_path)
    config, params = converted(tmp_path)
    assert flat(config) == flat(expected(family))
    config = dataclasses.replace(config, dtype="float32", remat="none")
    tokens_BT = np.random.default_rng(0).integers(0, V, (2, T), dtype=np.int32)
    with torch.no_grad():
        theirs_BTV = model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    ours_BTV = our_logits(params, tokens_BT, config)
    assert np.std(theirs_BTV) > 0.3
    error = np.max(np.abs(ours_BTV - theirs_BTV))
    print(f"{name}: largest difference {error:.1e}, logits up to {np.abs(theirs_BTV).max():.1f}")
    assert error < TOLERANCE

    broken = dataclasses.replace(config, **family.breaks)
    ours_BTV = our_logits(params, tokens_BT, broken)
    assert np.max(np.abs(ours_BTV - theirs_BTV)) > 50 * TOLERANCE
