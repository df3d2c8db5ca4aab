"""Blockwise attention against `jax.nn.dot_product_attention` on CPU: time and memory.

    python -m tests.benchmarks.attention_cpu [--rounds=9]

One step is forward and backward of causal attention. Times are ratios of runs that took turns, at
2,048 tokens; memory is the compiler's count of temporaries at 8,192, which needs no run.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp

from models.attention.dispatch import attention
from models.attention.mask import Mask

BATCH, HEADS, HEAD_DIM = 2, 8, 64


def blockwise(q_BTNH, k_BSKH, v_BSKH):
    ids = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1], dtype=jnp.int32), q_BTNH.shape[:2])
    ones = jnp.ones_like(ids)
    return attention(
        q_BTNH, k_BSKH, v_BSKH, Mask(), q_positions_BT=ids, k_positions_BS=ids, q_segments_BT=ones,
        k_segments_BS=ones, scale=HEAD_DIM**-0.5, backend="blockwise", rows_aligned=True,
    )[0]  # fmt: skip


def dense(q_BTNH, k_BSKH, v_BSKH):
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True)


def compile_step(function, batch: int, length: int, dtype: str):
    x = jax.ShapeDtypeStruct((batch, length, HEADS, HEAD_DIM), dtype)
    loss = lambda q, k, v: (function(q, k, v).astype(jnp.float32) ** 2).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()


def main(arguments: list[str]) -> int:
    rounds = int(next((a.split("=")[1] for a in arguments if a.startswith("--rounds=")), 9))
    for dtype in ("float32", "bfloat16"):
        steps = [compile_step(f, BATCH, 2048, dtype) for f in (blockwise, dense)]
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = [jax.random.normal(k, (BATCH, 2048, HEADS, HEAD_DIM), dtype) for k in keys]
        ratios = []
        for _ in range(rounds):
            seconds = []
            for step in steps:
                start = time.perf_counter()
                jax.block_until_ready(step(*arrays))
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[1] / seconds[0])
        memory = [
            compile_step(f, 1, 8192, dtype).memory_analysis().temp_size_in_bytes
            for f in (blockwise, dense)
        ]
        print(
            f"{dtype}: {statistics.median(ratios[1:]):.2f} times as fast as "
            f"jax.nn.dot_product_attention at 2,048 tokens ({min(ratios[1:]):.2f} to "
            f"{max(ratios[1:]):.2f}); {memory[0] / memory[1]:.1%} of its memory at 8,192 "
            f"({memory[0] / 2**20:.0f} of {memory[1] / 2**20:.0f} MiB)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
