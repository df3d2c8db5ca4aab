"""Stable names of optimizer state, and what check_storable refuses."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from checkpoint.tree import check_storable, flatten, name_optimizer, unname_optimizer
from sharding.errors import UsageError

PARAMS = {"block": {"wq": np.ones((4, 4)), "scale": np.ones(4)}, "embed": np.ones((8, 4))}
MASK = {"block": {"wq": True, "scale": False}, "embed": True}
SCHEDULE = optax.linear_schedule(1e-2, 0.0, 100)
ADAM = optax.scale_by_adam()
FULL = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.1, mask=MASK),
    optax.scale_by_schedule(SCHEDULE),
    optax.scale(-1.0),
)


def trained(transformation):
    """A state whose counters say 3 and whose arrays differ by field and path."""

    def fill(path, leaf):
        place = jax.tree_util.keystr(path).rsplit(".", 1)[-1]
        value = 3 if jnp.issubdtype(leaf.dtype, jnp.integer) else zlib.crc32(place.encode()) % 997
        return np.full(leaf.shape, value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract(transformation))


def abstract(transformation):
    return jax.eval_shape(transformation.init, PARAMS)


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_names_are_field_and_parameter_path():
    names = set(flatten(name_optimizer(FULL.init(PARAMS))))
    paths = ["block/wq", "block/scale", "embed"]
    assert names == {"count", *(f"{field}/{path}" for field in ("mu", "nu") for path in paths)}


@pytest.mark.parametrize(
    "transformation",
    [
        FULL,
        optax.MultiSteps(FULL, 2),
        optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
        optax.masked(ADAM, MASK),
        optax.contrib.muon(1e-3),
        optax.adafactor(1e-3),
        optax.lion(1e-3),
        optax.sgd(0.1, momentum=0.9),
        optax.apply_if_finite(FULL, 3),
        optax.sgd(0.1),
    ],
    ids=[
        "chain",
        "multi",
        "inject",
        "masked",
        "muon",
        "adafactor",
        "lion",
        "momentum",
        "finite",
        "empty",
    ],
)
def test_round_trip(transformation):
    state = trained(transformation)
    named = name_optimizer(state)
    if named:
        check_storable(named)
    equal(unname_optimizer(named, abstract(transformation)), state)


@pytest.mark.parametrize(
    "other",
    [
        optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(SCHEDULE), optax.scale(-1.0)),
        optax.chain(optax.scale_by_adam(), optax.scale(-1e-3)),
        optax.adamw(SCHEDULE, mask=MASK),
        optax.chain(optax.clip(1.0), FULL),
    ],
    ids=["no clip", "no schedule", "adamw", "nested"],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_changed_chain_takes_over_moments_and_count(other, reverse):
    source, target = (other, FULL) if reverse else (FULL, other)
    state = unname_optimizer(name_optimizer(trained(source)), abstract(target))
    equal(state, trained(target))


def test_abstract_state_has_the_same_names():
    shapes = abstract(FULL)
    named = name_optimizer(shapes)
    assert flatten(named).keys() == flatten(name_optimizer(FULL.init(PARAMS))).keys()
    assert unname_optimizer(named, shapes) == shapes


def test_shared_counter_is_not_one_buffer():
    named = jax.tree.map(jnp.asarray, name_optimizer(trained(FULL)))
    state = unname_optimizer(named, abstract(FULL))
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    assert step(state)[1].count == 4  # the same buffer given twice cannot be donated


def test_two_states_of_one_name_are_refused_naming_both():
    two = optax.chain(optax.trace(0.9), optax.trace(0.5))
    with pytest.raises(
        UsageError, match=r"`trace/block/scale`: TraceState and TraceState at \[1\]"
    ):
        name_optimizer(abstract(two))
    mixed = optax.chain(optax.scale_by_adam(), optax.scale_by_belief())
    with pytest.raises(UsageError, match=r"ScaleByAdamState and ScaleByBeliefState"):
        name_optimizer(abstract(mixed))


def test_counters_that_may_drift_apart_are_refused():
    drifting = optax.chain(optax.apply_if_finite(ADAM, 3), optax.scale_by_schedule(SCHEDULE))
    with pytest.raises(UsageError, match=r"`count`: ScaleByAdamState and ScaleByScheduleState"):
        name_optimizer(abstract(drifting))


def test_name_that_is_also_a_folder_is_refused():
    class Flat(optax.TraceState):
        """Holds one array where TraceState holds a tree."""

    both = (Flat(jnp.ones(3)), optax.trace(0.9).init(PARAMS))
    with pytest.raises(UsageError, match=r"both `trace` and below it"):
        name_optimizer(both)
    with pytest.raises(UsageError, match=r"both `trace` and below it"):
        name_optimizer(both[::-1])


def test_missing_array_is_named():
    with pytest.raises(UsageError, match=r"needs `count`, which was not stored"):
        unname_optimizer(name_optimizer(trained(optax.sgd(0.1, momentum=0.9))), abstract(ADAM))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, r"'\.' or '/': the top: 'a\.b'"),
        ({"p": {"a/b": jnp.ones(2)}}, r"'\.' or '/': p: 'a/b'"),
        ({"p": {"": jnp.ones(2)}}, r"cannot be empty .*: p: ''"),
        ({"p": {1: jnp.ones(2), "1": jnp.ones(2)}}, r"names must be strings: p: 1"),
        ({"p": [jnp.ones(2)]}, r"only nested dicts .*: p is list"),
        ({"p": ADAM.init(PARAMS)}, r"only nested dicts .*: p is ScaleByAdamState"),
        ({"p": None}, r"only nested dicts .*: p is NoneType"),
        (jnp.ones(2), r"only nested dicts"),
        ({"p": {"w": jnp.ones((0, 4)), "v": np.ones((2, 0))}}, r"without elements: p/v, p/w"),
        ({"p": 3, "q": "text"}, r"not an array: p, q"),
        ({"key": jax.random.key(0)}, r"typed random key .*: key"),
        ({str(i): jnp.ones(0) for i in range(9)}, r"0, 1, 2, 3 and 5 more"),
    ],
)
def test_refusals(state, message):
    with pytest.raises(UsageError, match=message):
        check_storable(state)
