"""The GPU backends without a GPU: what they lower to for CUDA, and what they refuse.

Lowering shows that Triton's language can say what the kernels do, and what cuDNN is asked for. It
compiles nothing: registers, shared memory and speed are not looked at.
"""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from models.attention.dispatch import attention
from models.attention.mask import Mask
from sharding.errors import UsageError
from tests.models.attention.test_attention_tpu import both_passes

ABSENT = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
)


def lowered(function, arguments) -> str:
    """The program for a GPU that is not there."""
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=ABSENT)
    ):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("mask", "sizes", "options"),
    [
        (Mask(), (128, 128), dict(rows_aligned=True)),
        (Mask(window=300), (80, 96), dict(softcap=30.0)),
        (Mask(causal=False), (256, 64), dict(alibi_slopes_N=jnp.ones(4))),
        (Mask(chunk=64), (64, 64), dict(sinks_N=jnp.ones(4))),
    ],
    ids=["causal", "window, soft-cap", "ALiBi", "chunk, sinks"],
)
def test_three_triton_kernels_for_both_passes(mask, sizes, options):
    text = lowered(*both_passes(mask, *sizes, T=300, S=300, **options))
    names = re.findall(r"xla\.gpu\.triton", text)
    assert len(names) == 3


def test_saved_names_spare_the_second_forward():
    """Four kernels where nothing is kept: the forward runs again."""
    function, arguments = both_passes(Mask(), 64, 64, T=256, S=256)
    for names, kernels in ((("attention_out", "attention_lse"), 3), ((), 4)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)

        def both(q, k, v, dout, dlse, *ids, policy=policy):
            positions, segments, k_positions, k_segments = ids

            @jax.checkpoint_wrapper(policy) if False else (lambda f: jax.checkpoint(f, policy=policy))
            def call(q, k, v):
                return attention(
                    q, k, v, Mask(), q_positions_BT=positions, k_positions_BS=k_positions,
                    q_segments_BT=segments, k_segments_BS=k_segments, scale=1.0,
                )  # fmt: skip

            results, pull = jax.vjp(call, q, k, v)
            return *results, *pull((dout, dlse))

        assert lowered(both, arguments).count("xla.gpu.triton") == kernels
