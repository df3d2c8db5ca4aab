"""What sequence parallelism costs on TPUs that are not there: overlap, waiting and memory.

    python -m tests.benchmarks.sequence --strategies ring,gather --lengths 131072 --kv-heads 16

Compiles one attention layer, forward and backward, for v5e-16 with seq = 16 and reads the scheduled
program: which transfers are asynchronous, what runs between their start and their end, and the
peak memory per device. Times are arithmetic, not measurements: bytes over the links' rate, and
floating-point operations over 0.6 of the peak. One compilation takes about 10 CPU seconds.
"""

import argparse
import math
import re
import time
from dataclasses import dataclass, replace

from sharding.topology import compiler_environment

SLICE, CHIP = "v5e-16", "v5e"
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1, "u32": 4, "s8": 1}


@dataclass
class Transfer:
    """One asynchronous pair: what is sent, the way round, and what runs while it is under way."""

    shape: str
    forwards: bool
    loops: int = 0  # while loops between start and done: the tiles of a hop
    cycles: int = 0  # the compiler's estimate of the rest between them

    @property
    def bytes(self) -> int:
        return size(self.shape)


def size(shape: str) -> int:
    """Returns the bytes of the arrays in an HLO shape."""
    return sum(
        BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"\b(bf16|f32|s32|u32|s8|pred)\[([\d,]*)\]", shape)
    )


def read(text: str) -> dict[str, list[Transfer]]:
    """Returns the transfers of each computation of a scheduled HLO module."""
    found, transfers, flying = {}, [], {}
    for line in text.splitlines():
        if not line.startswith(" "):
            transfers = found.setdefault(line.split(" ")[0], [])
            continue
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(%?([\w.\-]*)", line)
        if not match:
            continue
        name, shape, op, operand = match.groups()
        if op == "collective-permute-start":
            target = int(re.search(r"source_target_pairs=\{\{0,(\d+)", line)[1])
            flying[name] = Transfer("", forwards=target < 8)
        elif op == "collective-permute-done":
            transfers.append(replace(flying.pop(operand), shape=shape))
        else:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            for transfer in flying.values():
                transfer.loops += op == "while"
                transfer.cycles += int(cycles[1]) if cycles else 0
    return {name: transfers for name, transfers in found.items() if transfers}


def compiled(strategy: str, order: str, length: int, heads: int, kv_heads: int, head_dim: int):
    """Returns (program, plan) of the gradient of one attention layer over one row."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from models.attention.mask import Mask
    from models.attention.sequence import Rows, plan_for, sequence_attention
    from models.config import ModelConfig
    from sharding.config import MeshConfig
    from sharding.mesh import make_mesh
    from sharding.rules import BATCH, SEQ
    from sharding.topology import parse_slice, slice_devices

    config = ModelConfig(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, seq_strategy=strategy, seq_order=order
    )
    mesh = make_mesh(MeshConfig(fsdp=1, seq=16), slice_devices(parse_slice(SLICE)))
    rows, columns = P(BATCH, SEQ, None, None), P(BATCH, SEQ)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        plan = plan_for(config, length)

        def local(q, k, v, positions, segments):
            return sequence_attention(
                q,
                k,
                v,
                Rows(positions, segments),
                Mask(),
                plan,
                scale=head_dim**-0.5,
                softcap=None,
                backend="auto",
            )

        spread = jax.shard_map(
            local, in_specs=(rows, rows, rows, columns, columns), out_specs=rows, check_vma=False
        )

        def loss(q, k, v, positions, segments):
            return jnp.sum(jnp.square(spread(q, k, v, positions, segments).astype(jnp.float32)))

        q = array((1, length, heads, head_dim), jnp.bfloat16, rows)
        k = array((1, length, kv_heads, head_dim), jnp.bfloat16, rows)
        ids = array((1, length), jnp.int32, columns)
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, ids, ids).compile()
    return program, plan


def report(strategy: str, order: str, length: int, heads: int, kv_heads: int, head_dim: int):
    """Prints what one strategy costs."""
    from models.attention.sequence_plan import EFFICIENCY
    from sharding.hardware import CHIPS

    chip, start = CHIPS[CHIP], time.perf_counter()
    program, plan = compiled(strategy, order, length, heads, kv_heads, head_dim)
    text, memory = program.as_text(), program.memory_analysis()
    waits = [
        f"{count} {op}" for op in ("collective-permute", "all-gather", "all-to-all",
                                   "reduce-scatter", "all-reduce")
        if (count := len(re.findall(rf" {op}\(", text)))
    ]  # fmt: skip
    print(
        f"{plan.strategy} {plan.order}, length {length}, {heads} heads, {kv_heads} KV heads: "
        f"peak {memory.peak_memory_in_bytes / 2**20:.0f} MiB per device (arguments "
        f"{memory.argument_size_in_bytes / 2**20:.0f}); blocking: {', '.join(waits) or 'none'}; "
        f"{time.perf_counter() - start:.0f} s"
    )
    pairs = length / plan.devices * length / 2 / plan.ring  # of one hop, over all heads
    rate = EFFICIENCY * chip.flops_bf16
    for name, transfers in read(text).items():
        # Gradients travel in the backward pass only. Of five products there, two are forward.
        back = any("f32" in t.shape for t in transfers)
        hop = 2 * (5 if back else 2) * heads * head_dim * pairs / rate
        groups = [[t] for t in transfers] if name == "ENTRY" else [transfers]
        for group in groups:
            wire = max(
                sum(t.bytes for t in group if t.forwards == way) for way in (True, False)
            ) / (chip.ici_bandwidth / 2)
            looped = sum(t.loops > 0 for t in group)
            work = hop if looped else min(t.cycles for t in group) / chip.clock
            where = "once" if name == "ENTRY" else f"{'backward' if back else 'forward'} hop"
            print(
                f"    {where}: {len(group)} asynchronous, {looped} across the tile loop; "
                f"links {1e3 * wire:.3f} ms, compute {1e3 * work:.3f} ms, "
                f"hidden {min(1, work / wire):.0%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", default="gather,ulysses,ring,bidirectional,hybrid")
    parser.add_argument("--order", default="auto")
    parser.add_argument("--lengths", default="131072")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    flags = parser.parse_args()
    for strategy in flags.strategies.split(","):
        for length in flags.lengths.split(","):
            report(strategy, flags.order, int(length), flags.heads, flags.kv_heads, flags.head_dim)


if __name__ == "__main__":
    import os

    os.environ.update(compiler_environment())
    main()
