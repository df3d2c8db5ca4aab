"""Estimates for the attention kernels of others: splash, flash and tokamax, as they are installed.

Each steps over its grid and computes the blocks in which its mask has a visible pair; documents do
not change which those are. Bodies count at least what their products keep the matrix units busy.
A kernel that the compiler spreads over two cores is credited with an even split, which flatters
those whose work is causal along what is split.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.attention import bundles
from models.attention.estimate import CORES, Shape, compile_for, flops_per_cycle
from sharding.hardware import CHIPS
from tests.benchmarks.absent_tpu import read_kernels

Blocks = tuple[int, int, int]  # queries, keys, keys computed at once

BLOCKS = ((1024, 1024, 512), (1024, 1024, 1024), (512, 512, 512), (1024, 2048, 512))


def peers(shape: Shape) -> Iterator[tuple[str, Callable, tuple[Blocks, ...]]]:
    """Yields (name, function of chip, shape and blocks giving seconds, candidates) of a shape.

    The best of each direction counts. Longer rows take what won at 4,096 tokens on v5e, v5p and
    v6e: it is within 3% of the best there in both directions.
    """
    few = BLOCKS[2:3] if shape.window else BLOCKS[:1]
    candidates = BLOCKS if shape.length <= 4096 else few
    yield "splash, fused", partial(splash, fused=True), candidates
    yield "splash, split", partial(splash, fused=False), few
    if shape.window is None:
        yield "flash", flash, few
    if importlib.util.find_spec("tokamax"):
        yield "tokamax", tokamax, candidates if shape.window or len(candidates) > 1 else BLOCKS[1:2]


def gradients(call: Callable) -> Callable:
    """Returns the function of both passes; call: q, k, v, segments to out."""

    def both(q, k, v, dout, segments):
        out, pull = jax.vjp(lambda *qkv: call(*qkv, segments), q, k, v)
        return out, *pull(dout)

    return both


def arguments(shape: Shape, repeat_keys: bool = False) -> list[tuple]:
    """Shapes and dtypes of q, k, v, dout (heads first) and segments."""
    q, kv = (
        ((heads, shape.length, shape.head_dim), jnp.bfloat16)
        for heads in (shape.heads, shape.heads if repeat_keys else shape.kv_heads)
    )
    return [q, kv, kv, q, ((shape.length,), jnp.int32)]


def splash(chip: str, shape: Shape, blocks: Blocks, fused: bool) -> dict[str, float]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, (q, k, compute) = shape.length, blocks
    window = shape.window and (shape.window - 1, 0)
    one = masks.LocalMask((T, T), window, 0) if window else masks.CausalMask((T, T))
    sizes = dict(block_q=q, block_kv=k, block_kv_compute=compute, block_q_dkv=q, block_kv_dkv=k)
    sizes |= dict(block_kv_dkv_compute=compute, use_fused_bwd_kernel=fused)
    if not fused:
        sizes |= dict(block_q_dq=q, block_kv_dq=k)
    group = shape.heads // shape.kv_heads
    make = kernels.make_splash_mqa if group > 1 else kernels.make_splash_mha
    mask = masks.MultiHeadMask([one] * (group if group > 1 else shape.heads))
    kernel = make(mask, block_sizes=kernels.BlockSizes(**sizes), head_shards=1, q_seq_shards=1)

    def call(q, k, v, segments):
        ids = kernels.SegmentIds(segments, segments) if shape.documents else None
        run = partial(kernel, segment_ids=ids)
        if group == 1:
            return run(q, k, v)
        return jax.vmap(run)(q.reshape(-1, group, *q.shape[1:]), k, v).reshape(q.shape)

    found = read_kernels(lambda: compile_for(chip, gradients(call), *arguments(shape)))
    return seconds(chip, shape, found, (q, k), fused=fused)


def tokamax(chip: str, shape: Shape, blocks: Blocks) -> dict[str, float]:
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    T, (q, k, compute) = shape.length, blocks
    window = shape.window and (shape.window - 1, 0)
    mask = masks.LocalMask((T, T), window, 0) if window else masks.CausalMask((T, T))
    config = kernels.SplashConfig(
        block_q=q, block_kv=k, block_kv_compute=compute, block_q_dkv=q, block_kv_dkv=k,
        block_kv_dkv_compute=compute,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(mask, config=config, q_seq_shards=1)

    def call(q, k, v, segments):
        ids = kernels.base.SegmentIds(segments, segments) if shape.documents else None
        return kernel(q, k, v, segment_ids=ids)

    found = read_kernels(lambda: compile_for(chip, gradients(call), *arguments(shape)))
    return seconds(chip, shape, found, (q, k), fused=True, listed=True)


def flash(chip: str, shape: Shape, blocks: Blocks) -> dict[str, float]:
    """Keys are repeated for grouped heads, which it does not know."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernels

    q, k, compute = blocks
    sizes = kernels.BlockSizes(
        block_q=q, block_k_major=k, block_k=compute, block_b=1, block_q_major_dkv=q,
        block_k_major_dkv=k, block_k_dkv=compute, block_q_dkv=q, block_k_major_dq=k,
        block_k_dq=compute, block_q_dq=q,
    )  # fmt: skip

    def call(q, k, v, segments):
        ids = segments[None]
        ids = kernels.SegmentIds(ids, ids) if shape.documents else None
        return kernels.flash_attention(
            q[None], k[None], v[None], segment_ids=ids, causal=True, block_sizes=sizes
        )[0]

    inputs = arguments(shape, repeat_keys=True)
    found = read_kernels(lambda: compile_for(chip, gradients(call), *inputs))
    return seconds(chip, shape, found, (q, k), fused=False)


def seconds(
    chip: str, shape: Shape, kernels: list[bundles.Kernel], block: tuple[int, int], *,
    fused: bool, listed: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Weighs the kernels of one call; returns seconds of the forward and of the whole backward.

    listed: tokamax: the forward steps over active blocks only, and every kernel has two bodies, of
    which a block runs one; the shorter counts for all.
    """
    T, (bq, bk) = shape.length, block
    i, j = np.meshgrid(np.arange(T // bq), np.arange(T // bk), indexing="ij")
    active = j * bk <= (i + 1) * bq - 1
    if shape.window:
        active &= i * bq - (j + 1) * bk + 1 < shape.window
    result = {"forward": 0.0, "backward": 0.0}
    for kernel in kernels:
        name = "dq" if "dq" in kernel.name else "dkv" if "dkv" in kernel.name else "forward"
        if name == "forward" and not any(r.products for r in kernel.regions):
            continue  # a fusion of XLA's
        products = {"forward": 2, "dq": 3, "dkv": 5 if fused else 4}[name]
        leaves = list(_leaves(kernel.regions))
        bodies = [r.bundles for r in leaves if r.products]
        once = sum(r.bundles for r in leaves if not r.products)
        step = sum(r.bundles for r in kernel.regions) + kernel.overhead - sum(bodies) - once
        hot = min(bodies) if listed else sum(bodies)
        hot = max(
            hot, products * 2 * bq * bk * shape.head_dim / flops_per_cycle(chip, shape.head_dim)
        )
        runs = T // (bk if name == "dkv" else bq)
        grid = active.size
        if listed and name == "forward":
            grid = active.sum()
        elif shape.window and not listed:
            # Splash's grid of a local mask holds as many columns as its widest row needs.
            grid = (
                active.sum(0).max() * (T // bk)
                if name == "dkv"
                else active.sum(1).max() * (T // bq)
            )
        cycles = shape.heads * (active.sum() * hot + grid * step + runs * once)
        cores = (
            CORES.get(chip, 1)
            if kernel.trips is None
            else round(shape.heads * grid / (kernel.trips - 2))
        )
        result["forward" if name == "forward" else "backward"] += (
            cycles / max(1, cores) / CHIPS[chip].clock
        )
    return result


def _leaves(regions: tuple[bundles.Region, ...]) -> Iterator[bundles.Region]:
    """The parts that run or are skipped as a whole; a loop guard around all others is none."""
    for region in regions:
        hot = [r for r in region.inner if r.products]
        if hot and sum(r.bundles for r in region.inner) > 0.8 * region.bundles:
            yield from _leaves(region.inner)
        else:
            yield region
