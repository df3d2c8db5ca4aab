"""From logical axes to mesh axes: what is sharded, replicated, and refused by name."""

import re

import pytest
from jax.sharding import PartitionSpec as P

from sharding.errors import UsageError
from sharding.rules import RULES, spec_for

SIZES = {"data": 2, "fsdp": 4, "seq": 3, "tensor": 8}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("vocab", "embed"), (16, 8), P("tensor", "fsdp")),
        (("embed", "heads", "head_dim"), (8, 16, 5), P("fsdp", "tensor", None)),
        (("layers", "norm"), (7, 5), P(None, None)),
        (("batch", "seq", None), (16, 6, 5), P(("data", "fsdp"), "seq", None)),
        (("kv_heads", "head_dim"), (16, 5), P("tensor", None)),
        (("kv_heads", "head_dim"), (8, 5), P("tensor", None)),
        (("kv_heads", "head_dim"), (4, 5), P(None, None)),
        (("kv_heads", "head_dim"), (1, 5), P(None, None)),
    ],
)
def test_axes_follow_the_table(axes, shape, expected):
    assert spec_for(axes, shape, SIZES, "x") == expected


def test_axes_that_are_left_out():
    found = spec_for(("vocab", "embed"), (16, 9), SIZES, "x", frozenset({"fsdp"}))
    assert found == P("tensor", None)
    found = spec_for(("batch",), (2,), SIZES, "x", frozenset({"fsdp"}))
    assert found == P("data")


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embd",), (8,), "x: no sharding rule for logical axis 'embd' (rules: batch, seq, "),
        (("embd",), (8,), "; did you mean `embed`?"),
        (("heads", "mlp"), (8, 8), "x: mesh axis 'tensor' would shard two dimensions"),
        (("batch", "embed"), (8, 8), "x: mesh axis 'fsdp' would shard two dimensions"),
        (
            ("layers", "heads"), (2, 12),
            "x: dimension 1 (heads, size 12) does not divide over mesh axis tensor of size 8",
        ),
        (("batch",), (12,), "(batch, size 12) does not divide over mesh axis data × fsdp of"),
        (("kv_heads",), (3,), "(kv_heads, size 3) does not divide over mesh axis tensor of size 8"),
        (("kv_heads",), (12,), "(kv_heads, size 12) does not divide over mesh axis tensor"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_named(axes, shape, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        spec_for(axes, shape, SIZES, "x")


def test_a_dimension_without_a_name_is_a_mistake_of_the_code():
    with pytest.raises(ValueError, match=r"x: 1 axis names for shape \(2, 3\)"):
        spec_for(("embed",), (2, 3), SIZES, "x")


def test_no_rule_shards_one_dimension_twice():
    for axes in RULES.values():
        assert len(set(axes)) == len(axes)
