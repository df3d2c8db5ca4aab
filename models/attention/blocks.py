"""Block sizes of the TPU kernels, by chip, direction and head size.

Chosen by bundle counts for heads of 128 (docs/benchmarks.md);
`python -m tests.benchmarks.attention_tpu tune` compiles candidates and prints them by estimate.
Compiling proves that an entry fits the chip's VMEM: `pytest -m soak tests/models/attention`.

Shapes: T queries, S keys.
"""

from dataclasses import dataclass

_MIB = 2**20


@dataclass(frozen=True)
class Blocks:
    """Sizes in tokens, multiples of 128; `sub` divides the blocks.

    q, k: what one grid step loads. sub: edge of the tiles that a mask skips or tests.
    rows, columns: queries and keys taken at once where no mask is tested; fewer spill fewer
    registers, more push weights into the matrix unit less often.
    """

    q: int
    k: int
    sub: int
    rows: int
    columns: int


VMEM_BYTES = {
    "v4": 16 * _MIB, "v5e": 100 * _MIB, "v5p": 64 * _MIB, "v6e": 100 * _MIB, "tpu7x": 48 * _MIB,
}  # fmt: skip
"""What a kernel may use."""

DQ_BYTES = {
    "v4": 4 * _MIB, "v5e": 64 * _MIB, "v5p": 32 * _MIB, "v6e": 64 * _MIB, "tpu7x": 24 * _MIB,
}  # fmt: skip
"""How much of it the backward gives to dq; longer rows are taken in panels."""

DEFAULT_CHIP = "v5e"  # for interpret mode, where sizes only matter for time

# (chip, direction, head size up to) -> block, sub, rows, columns
TABLE: dict[tuple[str, str, int], tuple[int, int, int, int]] = {
    **{(chip, "forward", 128): (1024, 512, 256, 512) for chip in ("v4", "v5e", "v5p")},
    **{(chip, "forward", 128): (1024, 512, 1024, 512) for chip in ("v6e", "tpu7x")},
    **{(chip, "backward", 128): (1024, 256, 512, 512) for chip in ("v4", "v5e", "v5p", "tpu7x")},
    ("v6e", "backward", 128): (1024, 512, 512, 512),
    **{(chip, "forward", 256): (512, 256, 256, 512) for chip in VMEM_BYTES},
    **{(chip, "backward", 256): (512, 256, 512, 512) for chip in VMEM_BYTES},
}


def limit_of(head_dim: int) -> int:
    """Returns the head size whose entry of the table serves this one."""
    return 128 if head_dim <= 128 else 256


def blocks_for(
    chip: str, direction: str, head_dim: int, T: int, S: int, window: int | None = None
) -> Blocks:
    """Returns the blocks for a call of T queries and S keys; the larger of two head sizes counts.

    Lengths are cut into equal blocks no larger than the table's, so that little is padded, nor
    than a window from 512 on, so that it may end where a block does.
    """
    block, sub, rows, columns = TABLE[chip, direction, limit_of(head_dim)]
    if window is not None:
        block = min(block, max(512, window // 512 * 512))
    if T % block or S % block:
        block = min(block, 1024)  # smaller sub-tiles of a larger block would be too many
    q, k = even(T, block), even(S, block)
    sub = max(s for s in range(128, sub + 1, 128) if q % s == 0 and k % s == 0)
    return Blocks(q, k, sub, rows, columns)


def even(length: int, limit: int) -> int:
    """Returns the edge of equal blocks that cover `length`: at most `limit`, in steps of 128."""
    step = 128 if length <= 512 else 256
    per_block = -(-length // -(-length // limit))
    return min(-(-per_block // step) * step, limit)
