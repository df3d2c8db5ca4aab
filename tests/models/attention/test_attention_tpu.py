"""The TPU kernels made for chips that are not there: lowered always, compiled where libtpu is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from models.attention.blocks import TABLE
from models.attention.dispatch import attention
from models.attention.mask import Mask
from sharding.hardware import CHIPS
from sharding.topology import compiler_environment

ROOT = Path(__file__).resolve().parents[3]
HEAD_SIZES = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
ALL_CHIPS = sorted({chip for chip, _, _ in TABLE})


def both_passes(mask: Mask, H: int, V: int, T: int = 1024, S: int = 1024, **options):
    """Returns (a function of both passes, its abstract arguments)."""
    bf16, ids = jnp.bfloat16, (jnp.int32, (2, T))

    def function(q, k, v, dout, dlse, positions, segments, key_positions, key_segments):
        def call(q, k, v):
            return attention(
                q, k, v, mask, q_positions_BT=positions, k_positions_BS=key_positions,
                q_segments_BT=segments, k_segments_BS=key_segments, scale=H**-0.5, **options,
            )  # fmt: skip

        results, pull = jax.vjp(call, q, k, v)
        return *results, *pull((dout, dlse))

    shapes = (
        (bf16, (2, T, 4, H)), (bf16, (2, S, 2, H)), (bf16, (2, S, 2, V)), (bf16, (2, T, 4, V)),
        (jnp.float32, (2, T, 4)), ids, ids, (jnp.int32, (2, S)), (jnp.int32, (2, S)),
    )  # fmt: skip
    return function, [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in shapes]


@pytest.mark.parametrize(
    ("chip", "mask", "sizes", "options"),
    [
        ("v5e", Mask(), (128, 128), dict(rows_aligned=True)),
        ("v6e", Mask(window=300), (80, 96), dict(rows_aligned=False, logit_bound=30.0)),
        ("v4", Mask(causal=False), (192, 128), dict(rows_aligned=True, softcap=50.0)),
    ],
)
def test_lowers_for_a_tpu_that_is_not_there(chip, mask, sizes, options):
    device = jax.sharding.AbstractDevice(
        device_kind=CHIPS[chip].kinds[0], num_cores=1, platform="tpu"
    )
    function, arguments = both_passes(mask, *sizes, T=300, S=300, **options)
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    ):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


COMPILE = """
import sys
import jax
from sharding.topology import parse_slice, slice_devices
from tests.models.attention.test_attention_tpu import Mask, both_passes

chip, H, V = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
slices = {"v4": "v4-8", "v5e": "v5e-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}
mesh = jax.sharding.Mesh(slice_devices(parse_slice(slices[chip]))[:1], ("x",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
for options in (dict(rows_aligned=True), dict(S=2048, softcap=50.0)):
    function, arguments = both_passes(Mask(window=700), H, V, **options)
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(function).lower(*arguments).compile()
"""


@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("chip", ALL_CHIPS)
@pytest.mark.soak
def test_every_entry_compiles(chip, sizes):
    """The compiler refuses a kernel that does not fit in the chip's memory for vectors."""
    environment = {**os.environ, **compiler_environment(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE, chip, *map(str, sizes)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
