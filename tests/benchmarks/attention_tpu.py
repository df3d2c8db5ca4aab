"""Attention kernels for TPUs that are not there: estimates from bundle counts, and memory.

    python -m tests.benchmarks.attention_tpu compare [CHIP ...] [--shape=TEXT]
    python -m tests.benchmarks.attention_tpu tune [CHIP ...]
    python -m tests.benchmarks.attention_tpu memory

compare: Torus and splash at five shapes, or those whose name has TEXT. tune: the candidates for
models/attention/blocks.py. memory: temporaries of both passes at 131,072 tokens.

Every figure is made on a CPU by libtpu's compiler: cycles = sum over the parts of the grid loop of
bundles times how often the part runs, a body counting at least what its products keep the matrix
units busy. Memory waits and stalls are not counted; nothing here was timed on a TPU.
"""

import os
import sys
import tempfile

from tests.benchmarks import bundles

_DUMP = tempfile.mkdtemp(prefix="bundles")
os.environ.update(bundles.environment(_DUMP))

import dataclasses  # noqa: E402
import functools  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental.layout import Format, Layout  # noqa: E402

from models.attention import blocks as table  # noqa: E402
from models.attention import schedule, tpu  # noqa: E402
from models.attention.dispatch import attention  # noqa: E402
from models.attention.mask import Mask, reach  # noqa: E402
from sharding.hardware import CHIPS  # noqa: E402
from sharding.topology import parse_slice, slice_devices  # noqa: E402

SLICES = {"v4": "v4-8", "v5e": "v5e-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}
CORES = {"v4": 2, "v5p": 2}  # that one JAX device has
WIDE = ("v6e", "tpu7x")  # matrix units of 256 x 256, which a head of 128 half fills


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    length: int
    head_dim: int = 128
    window: int | None = None
    documents: int = 1  # of equal length

    def __str__(self) -> str:
        extra = f" window {self.window}" if self.window else ""
        extra += f" {self.documents} documents" if self.documents > 1 else ""
        return f"H{self.heads}/{self.kv_heads} S{self.length} D{self.head_dim}{extra}"


SHAPES = (
    Shape(8, 8, 4096),
    Shape(16, 16, 8192),
    Shape(32, 8, 8192),
    Shape(8, 8, 8192, window=1024),
    Shape(8, 8, 8192, documents=8),
)


@functools.cache
def device(chip: str):
    return slice_devices(parse_slice(SLICES[chip]))[0]


def compile_for(chip: str, function, *shapes, auto_layout: bool = False):
    """Compiles for one device of the chip; arguments are (shape, dtype).

    auto_layout: the compiler lays arguments and results out as it likes, as inside a model.
    """
    mesh = jax.sharding.Mesh([device(chip)], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in shapes]
    free = Format(Layout.AUTO)
    options = dict(in_shardings=free, out_shardings=free) if auto_layout else {}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, **options).lower(*arguments).compile()


def flops_per_cycle(chip: str, head_dim: int) -> float:
    """Peak of one core; a head narrower than the matrix unit uses its share."""
    info = CHIPS[chip]
    peak = info.flops_bf16 / info.clock / CORES.get(chip, 1)
    return peak * min(1.0, head_dim / 256) if chip in WIDE else peak


# ------------------------------------------------------------------------------ Torus


def torus(chip: str, shape: Shape) -> dict[str, float]:
    """Returns seconds of the forward and of the backward kernel."""
    kernels = bundles.compile_and_read(_DUMP, lambda: compile_torus(chip, shape))
    by_name = {("backward" if "backward" in k.name else "forward"): k for k in kernels}
    return {name: torus_seconds(chip, shape, name, kernel) for name, kernel in by_name.items()}


def compile_torus(chip: str, shape: Shape, auto_layout: bool = False):
    """Compiles forward and backward, through the door, gradient of lse included."""

    def both(q, k, v, dout, dlse, positions, segments):
        def call(q, k, v):
            return attention(
                q, k, v, Mask(window=shape.window), q_positions_BT=positions,
                k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
                scale=shape.head_dim**-0.5, rows_aligned=True, backend="pallas",
            )  # fmt: skip

        results, pull = jax.vjp(call, q, k, v)
        return *results, *pull((dout, dlse))

    T, N, K, H = shape.length, shape.heads, shape.kv_heads, shape.head_dim
    bf16, ids = jnp.bfloat16, ((1, T), jnp.int32)
    q, kv = ((1, T, N, H), bf16), ((1, T, K, H), bf16)
    dlse = ((1, T, N), jnp.float32)
    return compile_for(chip, both, q, kv, kv, q, dlse, ids, ids, auto_layout=auto_layout)


def torus_seconds(chip: str, shape: Shape, direction: str, kernel: bundles.Kernel) -> float:
    """Weighs the parts of the kernel by what the tables of this very call make of every step."""
    T, group = shape.length, shape.heads // shape.kv_heads
    sizes = table.blocks_for(chip, direction, shape.head_dim, T, T)
    mask = Mask(window=shape.window)
    documents = np.arange(T) * shape.documents // T
    positions = jnp.asarray((np.arange(T) - documents * (T // shape.documents))[None], jnp.int32)
    segments = jnp.asarray(documents[None] + 1, jnp.int32)
    seen = reach(mask, positions, positions, segments, segments)
    block, sub = (sizes.q, sizes.k), (sizes.sub, sizes.sub)
    kinds, bits = (np.asarray(x[0]) for x in schedule.block_kinds(mask, seen, block, sub, True))
    needed = tpu._listed(mask, T, T, sizes, True)
    backward = direction == "backward"
    repeat = group if backward else 1
    counts = {kind: repeat * int(((kinds == kind) & needed).sum()) for kind in range(4)}
    subtiles = repeat * sum(int(b).bit_count() for b in bits[(kinds == schedule.PART) & needed])
    steps = repeat * int(needed.sum())
    runs = sizes_of_runs = T // sizes.k if backward else T // sizes.q
    heads = shape.kv_heads if backward else shape.heads

    rate = flops_per_cycle(chip, shape.head_dim)
    products = 5 if backward else 2

    def floor(pairs: float) -> float:
        return products * 2 * pairs * shape.head_dim / rate

    bodies = [r for r in kernel.regions if r.products]
    before = [r for r in kernel.regions if r.stop <= bodies[0].start]
    after = [r for r in kernel.regions if r.start >= bodies[-1].stop]
    diagonal, full, part = bodies
    pairs = sizes.q * sizes.k
    n = sizes.q // sizes.sub
    cycles = steps * kernel.overhead
    cycles += runs * (before[-1].bundles if backward else 0) + runs * after[0].bundles
    if not backward:  # the start of rows that begin with another block than a diagonal one
        cycles += (sizes_of_runs - min(sizes_of_runs, counts[schedule.DIAGONAL])) * before[
            0
        ].bundles
    else:
        cycles += repeat * (T // sizes.q) * after[1].bundles
        cycles += repeat * T / 128 * before[0].bundles
    cycles += counts[schedule.DIAGONAL] * max(diagonal.bundles, floor(pairs * (n + 1) / (2 * n)))
    cycles += counts[schedule.FULL] * max(full.bundles, floor(pairs))
    tile = max(r.bundles for r in part.inner)
    cycles += subtiles * max(tile, floor(sizes.sub**2))
    cycles += counts[schedule.PART] * (part.bundles - sum(r.bundles for r in part.inner))
    cores = round(steps * heads / (kernel.trips - 2)) if kernel.trips else 1
    return cycles * heads / max(cores, 1) / CHIPS[chip].clock


# ------------------------------------------------------------------------------ JAX's kernels


def splash(chip: str, shape: Shape, fused: bool, sizes: tuple[int, int, int]) -> dict[str, float]:
    """Returns seconds of splash attention's kernels at one set of block sizes."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, (bq, bkv, compute) = shape.length, sizes
    if shape.window:
        one = masks.LocalMask((T, T), (shape.window - 1, 0), 0)
    else:
        one = masks.CausalMask((T, T))
    options = dict(
        block_q=bq, block_kv=bkv, block_kv_compute=compute, block_q_dkv=bq, block_kv_dkv=bkv,
        block_kv_dkv_compute=compute, use_fused_bwd_kernel=fused,
    )  # fmt: skip
    if not fused:
        options |= dict(block_q_dq=bq, block_kv_dq=bkv)
    grouped = shape.heads != shape.kv_heads
    group = shape.heads // shape.kv_heads
    make = kernels.make_splash_mqa if grouped else kernels.make_splash_mha
    mask = masks.MultiHeadMask([one] * (group if grouped else shape.heads))
    kernel = make(mask, block_sizes=kernels.BlockSizes(**options), head_shards=1, q_seq_shards=1)

    def both(q, k, v, dout, segments):
        ids = kernels.SegmentIds(segments, segments) if shape.documents > 1 else None
        call = functools.partial(kernel, segment_ids=ids)
        if grouped:
            call = jax.vmap(call, in_axes=(0, 0, 0))
        out, pull = jax.vjp(call, q, k, v)
        return out, *pull(dout)

    H, bf16 = shape.head_dim, jnp.bfloat16
    q = ((shape.heads, T, H), bf16)
    kv = q
    if grouped:
        q, kv = ((shape.kv_heads, group, T, H), bf16), ((shape.kv_heads, T, H), bf16)
    found = bundles.compile_and_read(
        _DUMP, lambda: compile_for(chip, both, q, kv, kv, q, ((T,), jnp.int32))
    )
    return dict(dense_seconds(chip, shape, found, (bq, bkv), fused))


def dense_seconds(
    chip: str, shape: Shape, kernels: list[bundles.Kernel], block: tuple[int, int], fused: bool
) -> Iterator[tuple[str, float]]:
    """Weighs kernels that step over the whole grid: hot parts run where a block has a visible pair.

    Documents do not change which blocks these kernels compute.
    """
    T, (bq, bkv) = shape.length, block
    i, j = np.meshgrid(np.arange(T // bq), np.arange(T // bkv), indexing="ij")
    active = j * bkv <= (i + 1) * bq - 1
    if shape.window:
        active &= i * bq - (j + 1) * bkv + 1 < shape.window
    rate = flops_per_cycle(chip, shape.head_dim)
    for kernel in kernels:
        name = "dq" if "dq" in kernel.name else "dkv" if "dkv" in kernel.name else "forward"
        products = {"forward": 2, "dq": 3, "dkv": 5 if fused else 4}[name]
        leaves = list(_leaves(kernel.regions))
        hot = sum(r.bundles for r in leaves if r.products)
        once = sum(r.bundles for r in leaves if not r.products)
        step = sum(r.bundles for r in kernel.regions) + kernel.overhead - hot - once
        hot = max(hot, products * 2 * bq * bkv * shape.head_dim / rate)
        runs = T // (bkv if name == "dkv" else bq)
        # Splash's grid of a local mask holds as many columns as its widest row needs.
        grid = active.sum(1).max() * (T // bq) if shape.window else active.size
        if name == "dkv" and shape.window:
            grid = active.sum(0).max() * (T // bkv)
        cycles = shape.heads * (active.sum() * hot + grid * step + runs * once)
        cores = round(shape.heads * grid / (kernel.trips - 2)) if kernel.trips else 1
        yield name, cycles / max(1, cores) / CHIPS[chip].clock


def _leaves(regions: tuple[bundles.Region, ...]) -> Iterator[bundles.Region]:
    """The parts that run or are skipped as a whole; a loop guard around all others is none."""
    for region in regions:
        hot = [r for r in region.inner if r.products]
        if hot and sum(r.bundles for r in region.inner) > 0.8 * region.bundles:
            yield from _leaves(region.inner)
        else:
            yield region


# ------------------------------------------------------------------------------ commands

SPLASH_BLOCKS = ((1024, 1024, 512), (512, 512, 512))  # the best of nine at these lengths, windows


def compare(chips: list[str], only: str) -> None:
    for chip in chips:
        for shape in (shape for shape in SHAPES if only in str(shape)):
            ours = torus(chip, shape)
            best: dict[str, float] = {}
            for fused in (True, False):
                for sizes in SPLASH_BLOCKS if shape.window else SPLASH_BLOCKS[:1]:
                    parts = splash(chip, shape, fused, sizes)
                    total = {"forward": parts["forward"], f"fused={fused}": sum(parts.values())}
                    best |= {k: min(v, best.get(k, v)) for k, v in total.items()}
            both = sum(ours.values())
            print(
                f"{chip} {shape}: forward {1e6 * ours['forward']:.0f} us, "
                f"{best['forward'] / ours['forward']:.2f} x splash; both {1e6 * both:.0f} us, "
                f"{best['fused=True'] / both:.2f} x fused, "
                f"{best['fused=False'] / both:.2f} x split",
                flush=True,
            )


CANDIDATES = {
    "forward": [(b, s, r, c) for b in (1024, 2048) for s in (256, 512) for r in (256, 512, 1024)
                for c in (512, 1024)],
    "backward": [(b, s, r, c) for b in (1024,) for s in (256, 512) for r in (256, 512, 1024)
                 for c in (256, 512)],
}  # fmt: skip


def tune(chips: list[str], head_dim: int = 128) -> None:
    limit = 128 if head_dim <= 128 else 256
    for chip in chips:
        for direction, candidates in CANDIDATES.items():
            results = {}
            for sizes in candidates:
                table.TABLE[chip, direction, limit] = sizes
                try:
                    results[sizes] = torus(chip, Shape(8, 8, 4096, head_dim))[direction]
                except jax.errors.JaxRuntimeError as error:
                    print(chip, direction, sizes, str(error).splitlines()[0][:120])
            best = min(results, key=results.get)
            table.TABLE[chip, direction, limit] = best
            print(chip, direction, limit, best, f"{1e6 * results[best]:.0f} us", flush=True)


def memory() -> None:
    for auto_layout in (True, False):
        shape = Shape(16, 16, 131_072)
        analysis = compile_torus("v5e", shape, auto_layout).memory_analysis()
        layout = "chosen by the compiler" if auto_layout else "(batch, token, head, size)"
        print(
            f"v5e {shape}, arguments laid out {layout}: "
            f"{analysis.temp_size_in_bytes / 2**30:.2f} GiB of temporaries"
        )


def main(arguments: list[str]) -> int:
    command, *chips = arguments or ["help"]
    only = next((c.removeprefix("--shape=") for c in chips if c.startswith("--shape=")), "")
    chips = [c for c in chips if not c.startswith("--")]
    if command == "compare":
        compare(chips or ["v5e", "v5p", "v6e"], only)
    elif command == "tune":
        tune(chips or list(SLICES))
    elif command == "memory":
        memory()
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
