"""How long the TPU kernels take, for the planner: a compiled program says nothing about them.

Shares of a chip's peak are bundle counts of the compiled kernels (docs/benchmarks.md, "Attention
on absent TPUs"): heads of 128, causal, 4,096 tokens; v4 is taken to be as v5p and tpu7x as v6e.
Memory waits and stalls are not in them. Imports no JAX.
"""

from collections.abc import Sequence

from models.attention.blocks import blocks_for
from sharding.hardware import Chip

# Share of peak that a forward and a backward pass reach on the products that they must do.
PEAK_SHARE: dict[str, tuple[float, float]] = {
    "v4": (0.80, 0.87), "v5e": (0.82, 0.88), "v5p": (0.80, 0.87), "v6e": (0.33, 0.37),
    "tpu7x": (0.33, 0.37),
}  # fmt: skip


# Products of a pass by its kernel's name, the first that fits; ours and those of splash attention.
PRODUCTS = {"backward": 5, "dkv": 4, "dq": 3, "": 2}


def kernel_seconds(
    name: str,
    operands: Sequence[tuple[str, tuple[int, ...]]],
    visible: Sequence[float],
    chip: Chip,
) -> tuple[float, float]:
    """Returns (FLOPs, seconds) of one call of an attention kernel.

    Args:
      name: of the kernel; says which pass it is (`PRODUCTS`).
      operands: dtype and shape of each; queries are the first of three dimensions (heads of all
        rows, tokens, head size), the tables before them are flat.
      visible: mean keys that a query sees, for each kind of layer that the model has; how many
        blocks the kernel visits says which of them this is. () means causal rows.
    """
    arrays = [dims for dtype, dims in operands if dtype[0] in "bf" and len(dims) >= 3]
    tables = [dims[0] for dtype, dims in operands if dtype == "s32" and len(dims) == 1]
    heads, queries, size = arrays[0][-3], arrays[0][-2], arrays[0][-1]
    for outer in arrays[0][:-3]:
        heads *= outer
    products = next(count for part, count in PRODUCTS.items() if part in name)
    # Grouped heads may lie one behind the other among the queries: keys are counted by the keys.
    kinds = sorted(visible) or [arrays[min(1, len(arrays) - 1)][-2] / 2]
    keys = kinds[-1]
    if tables and len(kinds) > 1:  # a window leaves most blocks out
        blocks = blocks_for(chip.name, "forward", size, queries, queries)
        listed = max(tables) * blocks.q * blocks.k / queries
        keys = min(kinds, key=lambda seen: abs(seen - listed))
    flops = 2.0 * products * heads * queries * keys * size
    share = PEAK_SHARE.get(chip.name, PEAK_SHARE["v5e"])[products > 2]
    return flops, flops / (chip.flops_bf16 * share)
