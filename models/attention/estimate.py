"""How long the Pallas kernels would take on a TPU that is not there, by the compiler's bundles.

Cycles are the sum over the parts of a kernel's grid loop of their bundles times how often the part
runs, which the tables of the very call say; a body counts at least what its products keep the
matrix units busy. Memory waits and stalls are not counted, so the figures rank kernels and shapes;
they time nothing. Run as a module it reads requests from stdin: `torus bench attention --on` does
so, because libtpu must be told to write its bundles before it is loaded.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from models.attention import schedule, tpu
from models.attention.blocks import blocks_for
from models.attention.bundles import FOLDER, Kernel, compile_and_read
from models.attention.dispatch import attention
from models.attention.mask import Mask, reach
from sharding.hardware import CHIPS
from sharding.topology import parse_slice, slice_devices

SLICES = {"v4": "v4-8", "v5e": "v5e-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}
CORES = {"v4": 2, "v5p": 2}  # that one JAX device has
DIRECTIONS = ("forward", "backward")
_WIDE = ("v6e", "tpu7x")  # matrix units of 256 x 256, which a head of 128 half fills
_PRODUCTS = {"forward": 2, "backward": 5}


@dataclass(frozen=True)
class Shape:
    """Causal attention over one row, in bfloat16. documents: their lengths; () is one."""

    heads: int
    kv_heads: int
    length: int
    head_dim: int = 128
    window: int | None = None
    documents: tuple[int, ...] = ()

    def __str__(self) -> str:
        extra = f" window {self.window}" if self.window else ""
        extra += f" {len(self.documents)} documents" if self.documents else ""
        return f"H{self.heads}/{self.kv_heads} S{self.length} D{self.head_dim}{extra}"

    @property
    def flops(self) -> float:
        """Operations of the visible pairs in one product, as q k."""
        reached = [np.arange(1, n + 1) for n in self.documents or (self.length,)]
        pairs = sum(np.minimum(n, self.window or self.length).sum() for n in reached)
        return 2.0 * pairs * self.heads * self.head_dim


def estimate(chip: str, shape: Shape, folder: str, directions: tuple[str, ...] = DIRECTIONS):
    """Returns seconds by direction; `folder` is the one of `bundles.environment`.

    Raises:
      JaxRuntimeError: the blocks do not fit the chip.
    """
    return {
        direction: _seconds(chip, shape, direction, kernel)
        for direction in directions
        for kernel in compile_and_read(folder, partial(compile_torus, chip, shape, direction))
    }


def busy(chip: str, shape: Shape, direction: str, seconds: float) -> float:
    """Returns the share of the chip's peak that the visible pairs' products come to."""
    rate = CORES.get(chip, 1) * flops_per_cycle(chip, shape.head_dim) * CHIPS[chip].clock
    return _PRODUCTS[direction] * shape.flops / rate / seconds


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


def compile_for(chip: str, function: Callable, *shapes: tuple, auto_layout: bool = False):
    """Compiles for one device of the chip; arguments are (shape, dtype).

    auto_layout: the compiler lays arguments and results out as it likes, as inside a model.
    """
    mesh = jax.sharding.Mesh([_device(chip)], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in shapes]
    free = Format(Layout.AUTO)
    options = dict(in_shardings=free, out_shardings=free) if auto_layout else {}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, **options).lower(*arguments).compile()


@cache
def _device(chip: str):
    return slice_devices(parse_slice(SLICES[chip]))[0]


def flops_per_cycle(chip: str, head_dim: int) -> float:
    """Peak of one core; a head narrower than the matrix unit uses its share."""
    info = CHIPS[chip]
    peak = info.flops_bf16 / info.clock / CORES.get(chip, 1)
    return peak * min(1.0, head_dim / 256) if chip in _WIDE else peak


def _seconds(chip: str, shape: Shape, direction: str, kernel: Kernel) -> float:
    """Weighs the parts of the kernel by what the tables of this very call make of every step."""
    T, group = shape.length, shape.heads // shape.kv_heads
    sizes = blocks_for(chip, direction, shape.head_dim, T, T, shape.window)
    mask = Mask(window=shape.window)
    lengths = shape.documents or (T,)
    segments = jnp.asarray(np.repeat(np.arange(len(lengths)) + 1, lengths)[None], jnp.int32)
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None], jnp.int32)
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

    def floor(pairs: float) -> float:
        return _PRODUCTS[direction] * 2 * pairs * shape.head_dim / rate

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
    # Trips are those of one core, and of one of the panels that a small VMEM cuts a backward into.
    cores = round(steps * heads / (kernel.trips - 2)) if kernel.trips else 1
    return cycles * heads / min(max(cores, 1), CORES.get(chip, 1)) / CHIPS[chip].clock


def main() -> None:
    """Reads {"chip", "shapes"} from stdin, writes one JSON object a line: seconds and shares."""
    request = json.load(sys.stdin)
    chip, folder = request["chip"], os.environ[FOLDER]
    for fields in request["shapes"]:
        shape = Shape(**{**fields, "documents": tuple(fields["documents"])})
        try:
            found = estimate(chip, shape, folder)
        except jax.errors.JaxRuntimeError as error:
            print(json.dumps({"refused": str(error).splitlines()[0]}), flush=True)
            continue
        shares = {d: busy(chip, shape, d, seconds) for d, seconds in found.items()}
        print(json.dumps({"seconds": found, "share_of_peak": shares}), flush=True)


if __name__ == "__main__":
    main()
