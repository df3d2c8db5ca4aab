"""Attention kernels for TPUs that are not there: estimates from bundle counts, and memory.

    python -m tests.benchmarks.attention_tpu compare [CHIP ...] [--shape=TEXT] [--results=FILE]
    python -m tests.benchmarks.attention_tpu tune [CHIP ...] [--head=SIZE] [--results=FILE]
    python -m tests.benchmarks.attention_tpu memory

compare: Torus beside splash (its backward fused and split), flash and, where it is installed,
tokamax (Python 3.12), each at the best of several block sizes per direction, at five shapes or
those whose name has TEXT. tune: the candidates for models/attention/blocks.py. memory: temporaries
of both passes at 131,072 tokens. FILE keeps what was compiled, so that a run can be continued.

Every figure is made on a CPU by libtpu's compiler: cycles = sum over the parts of the grid loop of
bundles times how often the part runs, a body counting at least what its products keep the matrix
units busy. Memory waits and stalls are not counted; nothing here was timed on a TPU.
"""

# ruff: noqa: I001 (the first import sets the environment that JAX reads)

from tests.benchmarks import absent_tpu
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.attention import blocks as table
from models.attention import schedule, tpu
from models.attention.dispatch import attention
from models.attention.mask import Mask, reach
from sharding.hardware import CHIPS
from tests.benchmarks import attention_peers, bundles
from tests.benchmarks.absent_tpu import SHAPES, SLICES, Results, Shape, compile_for, flops_per_cycle

# ------------------------------------------------------------------------------ Torus


def torus(
    chip: str, shape: Shape, directions: tuple[str, ...] = ("forward", "backward")
) -> dict[str, float]:
    """Returns seconds of the forward and of the backward kernel."""
    seconds = {}
    for direction in directions:
        (kernel,) = absent_tpu.read_kernels(lambda: compile_torus(chip, shape, direction))  # noqa: B023
        seconds[direction] = torus_seconds(chip, shape, direction, kernel)
    return seconds


def compile_torus(chip: str, shape: Shape, direction: str, auto_layout: bool = False):
    """Compiles the forward, the backward, or `both`, through the door, with the gradient of lse."""

    def run(q, k, v, out, dout, lse, dlse, positions, segments):
        def call(q, k, v, given=None):
            return attention(
                q, k, v, Mask(window=shape.window), q_positions_BT=positions,
                k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
                scale=shape.head_dim**-0.5, rows_aligned=True, backend="pallas", given=given,
            )  # fmt: skip

        if direction == "forward":
            return call(q, k, v)
        given = (out, lse) if direction == "backward" else None
        results, pull = jax.vjp(partial(call, given=given), q, k, v)
        return *results, *pull((dout, dlse))

    T, N, K, H = shape.length, shape.heads, shape.kv_heads, shape.head_dim
    bf16, row, ids = jnp.bfloat16, ((1, T, N), jnp.float32), ((1, T), jnp.int32)
    q, kv = ((1, T, N, H), bf16), ((1, T, K, H), bf16)
    arguments = q, kv, kv, q, q, row, row, ids, ids
    return compile_for(chip, run, *arguments, auto_layout=auto_layout)


def torus_seconds(chip: str, shape: Shape, direction: str, kernel: bundles.Kernel) -> float:
    """Weighs the parts of the kernel by what the tables of this very call make of every step."""
    T, group = shape.length, shape.heads // shape.kv_heads
    sizes = table.blocks_for(chip, direction, shape.head_dim, T, T, shape.window)
    mask = Mask(window=shape.window)
    documents = shape.document_of()
    starts = np.searchsorted(documents, np.arange(shape.documents))
    positions = jnp.asarray((np.arange(T) - starts[documents])[None], jnp.int32)
    segments = jnp.asarray(documents[None] + 1, jnp.int32)
    seen = reach(mask, positions, positions, segments, segments)
    block, sub = (sizes.q, sizes.k), (sizes.sub, sizes.sub)
    kinds, bits = (np.asarray(x[0]) for x in schedule.block_kinds(mask, seen, block, sub, True))
    needed = tpu._listed(mask, T, T, sizes, True)
    backward = direction == "backward"
    repeat = group if backward else 1
    counts = {kind: repeat * int(((kinds == kind) & needed).sum()) for kind in range(4)}
    edges = repeat * int(((kinds == schedule.DIAGONAL) & ~np.eye(len(kinds), dtype=bool)).sum())
    subtiles = repeat * sum(int(b).bit_count() for b in bits[(kinds == schedule.PART) & needed])
    steps = repeat * int(needed.sum())
    runs = T // sizes.k if backward else T // sizes.q
    heads = shape.kv_heads if backward else shape.heads

    rate = flops_per_cycle(chip, shape.head_dim)
    products = 5 if backward else 2

    def floor(pairs: float) -> float:
        return products * 2 * pairs * shape.head_dim / rate

    bodies = [r for r in kernel.regions if r.products]
    before = [r for r in kernel.regions if r.stop <= bodies[0].start]
    after = [r for r in kernel.regions if r.start >= bodies[-1].stop]
    diagonal, *edge, full, part = bodies
    pairs = sizes.q * sizes.k
    n = sizes.q // sizes.sub
    cycles = steps * kernel.overhead
    cycles += runs * (before[-1].bundles if backward else 0) + runs * after[0].bundles
    if not backward:  # the start of rows that begin with another block than a diagonal one
        cycles += (runs - min(runs, counts[schedule.DIAGONAL] - edges)) * before[0].bundles
    else:
        cycles += repeat * (T // sizes.q) * after[1].bundles
        cycles += repeat * T / 128 * before[0].bundles
    triangles = [(diagonal, counts[schedule.DIAGONAL] - edges), *((body, edges) for body in edge)]
    for body, count in triangles:
        cycles += count * max(body.bundles, floor(pairs * (n + 1) / (2 * n)))
    cycles += counts[schedule.FULL] * max(full.bundles, floor(pairs))
    tile = max(r.bundles for r in part.inner)
    cycles += subtiles * max(tile, floor(sizes.sub**2))
    cycles += counts[schedule.PART] * (part.bundles - sum(r.bundles for r in part.inner))
    cores = round(steps * heads / (kernel.trips - 2)) if kernel.trips else 1
    return cycles * heads / max(cores, 1) / CHIPS[chip].clock


# ------------------------------------------------------------------------------ commands


def compare(chips: list[str], only: str, results: Results) -> None:
    for chip in chips:
        for shape in (shape for shape in SHAPES if only in str(shape)):
            ours = results.get(f"{chip} {shape} torus", partial(torus, chip, shape))
            both = sum(ours.values())
            print(f"{chip} {shape}: {1e6 * ours['forward']:.0f} us, both {1e6 * both:.0f} us")
            for name, measure, candidates in attention_peers.peers(shape):
                found = [
                    results.get(
                        f"{chip} {shape} {name} {sizes}", partial(measure, chip, shape, sizes)
                    )
                    for sizes in candidates
                ]
                parts = [part for part in found if part]
                if not parts:
                    print(f"    {name}: compiles at none of its block sizes")
                    continue
                forward, backward = (min(p[d] for p in parts) for d in ("forward", "backward"))
                print(
                    f"    {name}: {forward / ours['forward']:.2f} x Torus, "
                    f"both {(forward + backward) / both:.2f} x",
                    flush=True,
                )


CANDIDATES = {
    "forward": [(b, s, r, c) for b in (1024, 2048) for s in (256, 512) for r in (256, 512, 1024)
                for c in (512, 1024)],
    "backward": [(b, s, r, c) for b in (1024,) for s in (256, 512) for r in (256, 512, 1024)
                 for c in (256, 512)],
}  # fmt: skip


def tune(chips: list[str], head_dim: int, results: Results) -> None:
    """Prints every candidate, best first, beside the table's entry."""
    for chip in chips:
        for direction, candidates in CANDIDATES.items():
            key = chip, direction, table.limit_of(head_dim)
            entry, found = table.TABLE[key], {}
            for sizes in dict.fromkeys((entry, *candidates)):
                table.TABLE[key] = sizes
                shape = Shape(8, 8, 4096, head_dim)
                name = f"{chip} {shape} {direction} {sizes}"
                if parts := results.get(name, partial(torus, chip, shape, (direction,))):
                    found[sizes] = parts[direction]
            table.TABLE[key] = entry
            for sizes in sorted(found, key=found.get):
                ratio = found[sizes] / found[entry] if entry in found else float("nan")
                mark = " in the table" if sizes == entry else ""
                print(f"{key} {sizes}: {1e6 * found[sizes]:.0f} us, {ratio:.3f}{mark}", flush=True)


def memory() -> None:
    for auto_layout in (True, False):
        shape = Shape(16, 16, 131_072)
        analysis = compile_torus("v5e", shape, "both", auto_layout).memory_analysis()
        layout = "chosen by the compiler" if auto_layout else "(batch, token, head, size)"
        print(
            f"v5e {shape}, arguments laid out {layout}: "
            f"{analysis.temp_size_in_bytes / 2**30:.2f} GiB of temporaries"
        )


def main(arguments: list[str]) -> int:
    command, *rest = arguments or ["help"]
    options = dict(option.removeprefix("--").split("=") for option in rest if "=" in option)
    chips = [word for word in rest if not word.startswith("--")] or list(SLICES)
    results = Results(options.get("results", ""))
    if command == "compare":
        compare(chips, options.get("shape", ""), results)
    elif command == "tune":
        tune(chips, int(options.get("head", "128")), results)
    elif command == "memory":
        memory()
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
