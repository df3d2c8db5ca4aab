"""What is chosen for a chip: options, what is kept, and that a choice changes no result."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.quickstart import get_config
from models.config import SAVEABLE
from models.loss import _automatic_chunks
from models.presets import PRESETS
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from sharding.topology import FAMILIES
from trainer.config import Experiment, validate
from trainer.plan.recipe import (
    MEMORY_TARGET,
    OPTIONS,
    choose,
    compile_options,
    fixed_bytes,
    fixed_parts,
    kept_bytes,
    layer_weights,
    resolve_remat,
)
from trainer.state import init_state, make_layout
from trainer.step import jit_train_step, loss_sums

POD = {"data": 1, "fsdp": 256, "seq": 1, "tensor": 1}
WINDOWED = "xla_jf_spmd_threshold_for_windowed_einsum_mib"


def llama(rows: int = 256, length: int = 2048, **changes) -> Experiment:
    exp = Experiment(model=PRESETS["llama3-8b"](), **changes)
    exp.data.seq_len, exp.train.batch_size = length, rows
    return exp


def test_options_are_those_of_the_chip_and_the_mesh():
    fast = compile_options(llama(perf="fast"), "v5e", POD)
    assert fast["xla_jf_crs_combiner_threshold_count"] == "1" and WINDOWED in fast
    assert WINDOWED not in compile_options(
        llama(perf="fast"), "v5e", POD | {"fsdp": 64, "tensor": 4}
    )
    assert compile_options(llama(perf="fast"), "v5p", POD)
    assert not compile_options(llama(perf="fast"), "v4", POD)
    assert not set(fast) & set(compile_options(llama(perf="fast"), "v5p", POD))
    assert compile_options(llama(perf="off"), "v5e", POD) == {}
    assert all(option.reason and option.effect for option in OPTIONS)


def test_by_default_only_options_of_a_published_recipe_are_set():
    """MaxText's configs/tpu/v5p/32b.sh at e591f30 has these three; none for v5e has any of ours."""
    assert compile_options(llama(), "v5p", POD) == {
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
        "xla_tpu_use_tc_device_shape_on_sc": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    }
    assert compile_options(llama(), "v5e", POD) == {}
    assert compile_options(llama(), "v6e", POD) == {}


def test_untested_options_are_printed_as_such():
    tpu = SimpleNamespace(device_kind="TPU v5")
    text = str(choose(llama(perf="fast"), tpu, POD))
    untested_names = text.partition(" (untested on hardware: ")[2].rstrip(")").split(", ")
    published = set(compile_options(llama(), "v5p", POD))
    assert set(untested_names) == set(compile_options(llama(perf="fast"), "v5p", POD)) - published
    assert "untested" not in str(choose(llama(), tpu, POD))
    own = llama(perf="auto,xla_tpu_enable_sparse_core_collective_offload_all_reduce=false")
    assert "untested" not in str(choose(own, tpu, POD))  # of the table's values only


def test_options_are_overridden_by_name():
    perf = "fast,-xla_enable_async_all_reduce,xla_jf_crs_combiner_threshold_count=9,xla_x=true"
    chosen = compile_options(llama(perf=perf), "v5e", POD)
    assert "xla_enable_async_all_reduce" not in chosen
    assert chosen["xla_jf_crs_combiner_threshold_count"] == "9" and chosen["xla_x"] == "true"
    assert compile_options(llama(perf="off,xla_x=1"), "v5e", POD) == {"xla_x": "1"}


@pytest.mark.parametrize(
    ("perf", "match"),
    [
        ("fats", "choose auto, fast, off.*fast"),
        ("auto,x", "neither"),
        ("off,xla_dump_to=/tmp/x", "no path"),
    ],
)
def test_a_choice_that_cannot_be_read(perf, match):
    exp = get_config()
    exp.perf = perf
    with pytest.raises(UsageError, match=match):
        validate(exp)


@pytest.mark.parametrize(
    ("rows", "remat"),
    [
        (256, "rotated_qk,v,attention,residual,gate,up"),  # 2,048 tokens a chip: all fits
        (1024, "rotated_qk,v,attention"),
        (4096, "full"),
    ],
)
def test_what_is_kept_follows_the_memory(rows, remat):
    capacity = FAMILIES["v5e"].compiler_bytes
    chosen = resolve_remat(llama(rows), capacity, POD)
    assert chosen.model.remat == remat
    names, _ = chosen.model.remat_names()
    kept = sum(kept_bytes(chosen, name, POD) for name in names)
    assert not names or fixed_bytes(chosen, POD) + kept <= MEMORY_TARGET * capacity


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_bytes_of_a_layer_and_of_gradients_are_those_of_the_published_sizes(reduce_dtype):
    """llama3-8b: 218,103,808 matmul weights a layer, 525,336,576 in the head, on one device."""
    exp = llama(rows=1, length=8)
    exp.model = dataclasses.replace(exp.model, reduce_dtype=reduce_dtype, vocab=128)
    one = dict.fromkeys(POD, 1)
    parts = fixed_parts(exp, one)
    summed = {"float32": 4, "bfloat16": 2}[reduce_dtype]
    # Two layers gathered in bfloat16, one gradient, and 8 tokens: 5 x 14,336 + 4 x 4,096 wide.
    assert parts["loss or a layer"] == (2 * 2 + summed) * 218_103_808 + 2 * 8 * (71_680 + 16_384)
    weights = 32 * 218_103_808 + 2 * 128 * 4096
    assert parts["parameters"] == parts["gradients"] == 4 * weights
    assert parts["optimizer"] == 8 * weights
    sharded = fixed_parts(exp, POD | {"fsdp": 8, "tensor": 2})
    assert sharded["parameters"] == sharded["gradients"] == 4 * weights / 16


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 64, 257])
def test_the_loss_needs_what_its_chunks_hold(rows, reduce_dtype):
    """The recipe's formula against the chunks that models/loss.py makes: never less, seldom more.

    It does not know how a ratio is rounded to a whole number of chunks: between one chunk and one
    and a half it says at most 1.5 times what is held.
    """
    exp = llama(rows=rows, length=2048)
    exp.model = dataclasses.replace(exp.model, reduce_dtype=reduce_dtype, mlp=8)
    model, tokens = exp.model, rows * 2048
    chunks = _automatic_chunks(tokens, model.padded_vocab, model.width)
    head = model.padded_vocab * model.width
    summed = {"float32": 4, "bfloat16": 2}[reduce_dtype] if chunks == 1 else 4
    held = (2 + summed) * head + 4 * model.padded_vocab * -(-tokens // chunks)
    said = fixed_parts(exp, dict.fromkeys(POD, 1))["loss or a layer"]
    wide = 2 * tokens * (5 * 8 + 4 * 4096) + 8 * layer_weights(model)
    assert held <= said * 1.001 and said <= max(1.5 * held, wide)


def test_kv_heads_of_which_there_are_fewer_than_devices_are_kept_whole():
    """llama3-8b has 8 of 128: over tensor 4 a device keeps 2, over tensor 16 all of them."""
    exp, layers = llama(rows=1, length=8), 32
    four, sixteen = (dict.fromkeys(POD, 1) | {"tensor": tensor} for tensor in (4, 16))
    assert kept_bytes(exp, "v", four) == 2 * 8 * layers * 2 * 128
    assert kept_bytes(exp, "v", sixteen) == 2 * 8 * layers * 8 * 128
    assert kept_bytes(exp, "rotated_qk", sixteen) == 2 * 8 * layers * (2 + 8) * 128


def test_what_is_written_in_the_config_stays():
    exp = llama()
    exp.model.remat = "attention"
    assert resolve_remat(exp, 1e12, POD) is exp
    assert resolve_remat(llama(perf="off"), 1e12, POD).model.remat == "full"
    assert resolve_remat(llama(), None, POD).model.remat == "full"  # no TPU
    gelu = dataclasses.replace(llama().model, activation="gelu")
    assert (
        "gate" not in resolve_remat(dataclasses.replace(llama(), model=gelu), 1e13, POD).model.remat
    )


def test_the_loop_and_the_planner_get_one_program_on_cpu():
    """With nothing to choose, "auto" is the program that "off" and "full" make, bit for bit."""
    exp = get_config()
    exp.model.remat = "auto"
    mesh = make_mesh(exp.mesh)
    with jax.set_mesh(mesh):
        _, choice = jit_train_step(exp, make_layout(exp, mesh))
    assert choice.options == {} and choice.experiment.model.remat == "full"
    tpu = SimpleNamespace(device_kind="TPU v5e")
    chosen = choose(llama(), tpu, POD)
    assert chosen.experiment.model.remat.startswith("rotated_qk")
    assert chosen.experiment.model.barriers and "; barriers; no compile options" in str(chosen)
    fast = choose(llama(perf="fast"), tpu, POD)
    assert fast.experiment == dataclasses.replace(chosen.experiment, perf="fast")
    assert not choose(llama(perf="auto,-barriers"), tpu, POD).experiment.model.barriers
    assert not choose(llama(perf="off"), tpu, POD).experiment.model.barriers


def test_what_is_chosen_changes_no_result():
    """On 8 devices: loss and gradients, six names kept and barriers against neither.

    The mathematics is the same; XLA fuses otherwise, so float32 rounding is allowed.
    """
    exp = get_config()
    exp.model = dataclasses.replace(exp.model, dtype="float32", layers=2)
    exp.data.seq_len = 64
    mesh = make_mesh(exp.mesh)
    results = []
    with jax.set_mesh(mesh):
        params = init_state(exp, make_layout(exp, mesh)).params
        shape = (exp.train.batch_size, exp.data.seq_len)
        tokens = jax.random.randint(jax.random.key(0), shape, 0, exp.model.vocab)
        batch = {
            "tokens": tokens, "targets": jnp.roll(tokens, -1, 1),
            "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
            "segment_ids": jnp.ones(shape, jnp.int32),
        }  # fmt: skip
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH, SEQ)))
        for remat, barriers in (("full", False), (",".join(SAVEABLE), True)):
            model = dataclasses.replace(exp.model, remat=remat, barriers=barriers)
            one = dataclasses.replace(exp, model=model)
            both = jax.value_and_grad(lambda p, b, one=one: loss_sums(p, b, one)[0])
            results.append(jax.device_get(jax.jit(both)(params, batch)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(one).max())
