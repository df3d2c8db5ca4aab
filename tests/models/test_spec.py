"""The table of parameters: what follows from it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from models import spec
from models.spec import ParamSpec
from sharding.config import MeshConfig
from sharding.mesh import make_mesh

SPECS = {
    "table": ParamSpec((128, 16), ("vocab", "embed"), 0.5, unpadded=(100, 16)),
    "layers": {
        "w": ParamSpec((2, 16, 64), ("layers", "embed", "mlp"), 0.25),
        "scale": ParamSpec((2, 16), ("layers", "norm"), fill=1.5, decay=False),
    },
}
KEY = jax.random.key(3)


def test_values_have_the_standard_deviation_or_the_constant_of_their_spec():
    found = spec.init(SPECS, KEY)
    for name, values, std in (
        ("table", found["table"], 0.5),
        ("w", found["layers"]["w"], 0.25),
    ):
        assert values.dtype == jnp.float32
        # 2,048 draws: the deviation of a sample's is 1 / sqrt(2 * 2048) = 1.6%; five of them.
        assert abs(np.std(values) / std - 1) < 0.08, name
        assert abs(np.mean(values)) < 5 * std / np.sqrt(2048), name
    np.testing.assert_array_equal(found["layers"]["scale"], np.full((2, 16), 1.5, np.float32))


def test_another_parameter_changes_no_values():
    first = spec.init(SPECS, KEY)
    more = spec.init({"before": ParamSpec((4,), ("norm",), 1.0), **SPECS}, KEY)
    np.testing.assert_array_equal(first["table"], more["table"])
    np.testing.assert_array_equal(first["layers"]["w"], more["layers"]["w"])
    other = spec.init(SPECS, jax.random.key(4))
    assert not np.array_equal(first["table"], other["table"])


def test_equal_shapes_begin_with_unequal_values():
    pair = {name: ParamSpec((8, 8), ("embed", "mlp"), 1.0) for name in ("gate", "up")}
    found = spec.init(pair, KEY)
    assert not np.array_equal(found["gate"], found["up"])


def test_shardings_and_targets_follow_the_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found = spec.shardings(SPECS, mesh)
    assert found["table"].spec == P("tensor", "fsdp")
    assert found["layers"]["w"].spec == P(None, "fsdp", "tensor")
    whole = spec.shardings(SPECS, mesh, without=frozenset({"fsdp"}))
    assert whole["layers"]["w"].spec == P(None, None, "tensor")
    target = spec.abstract(SPECS, found, jnp.bfloat16)["layers"]["w"]
    assert (target.shape, target.dtype) == ((2, 16, 64), jnp.bfloat16)
    assert target.sharding == found["layers"]["w"]


def test_counts_leave_padding_out_and_norms_do_not_decay():
    assert spec.count(SPECS) == 100 * 16 + 2 * 16 * 64 + 2 * 16
    assert spec.decay_mask(SPECS) == {"table": True, "layers": {"w": True, "scale": False}}
    names = []
    spec.map_specs(lambda name, _: names.append(name), SPECS)
    assert sorted(names) == ["layers/scale", "layers/w", "table"]
