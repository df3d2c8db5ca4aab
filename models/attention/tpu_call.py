"""What both TPU kernels share: how they are launched, and how they read their blocks.

Shapes: B batch, T tokens, H head dim, P grid steps, R rows of a tile, C columns of a tile.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.attention import schedule
from models.attention.blocks import Blocks

F32 = jnp.float32
LANES = 128
LN2, LOG2E = math.log(2.0), math.log2(math.e)


@dataclass(frozen=True)
class Kernel:
    """What is static about a kernel.

    bounded: scores are known to stay within the range of exp2, so no maximum is kept.
    aligned: rows are aligned, so what a query sees is one run of rows: `ids` holds its ends.
    edge: DIAGONAL blocks may also stand where a window ends (`schedule.window_edge`).
    causal, limited: else, which sides of a query's reach PART blocks test.
    """

    blocks: Blocks
    softcap: float | None
    bounded: bool
    aligned: bool
    edge: bool
    causal: bool
    limited: bool
    vmem_bytes: int
    interpret: bool


def launch(
    body: Callable,
    name: str,
    kernel: Kernel,
    *,
    kv_heads: int,
    tables: Sequence[jax.Array],
    operands: Sequence[tuple[jax.Array, str]],
    results: Sequence[tuple[jax.ShapeDtypeStruct, str]],
    scratch: Sequence[tuple[int, int]],
) -> list[jax.Array]:
    """Runs `body(*scalars, *blocks, *scratch, kernel=, index=)` for every head and step.

    tables: (B, P) each, the first with the steps of `schedule.py`; `index` is a step's place in
    them, flat. An int32 (1,) among them is passed on as it is. operands, results: arrays whose
    first dimension counts batch and heads, and which block of them a step takes: the query tile
    (`q`) or key tile (`k`) of its rows, the query tile of a single row (`q row`), the query tile
    in the third table (`target`); `ids` is (B, 8, T) and taken whole. scratch: float32.

    The heads are spread over the cores of a chip that has two.
    """
    heads, (B, P), blocks = operands[0][0].shape[0], tables[0].shape, kernel.blocks

    def place(h, p):
        return _share(h, heads // B, heads) * P + p

    maps = {
        "q": lambda h, p, steps, *_: (h, schedule.query_tile(steps[place(h, p)]), 0),
        "k": lambda h, p, steps, *_: (
            _share(h, heads // kv_heads, heads), schedule.key_tile(steps[place(h, p)]), 0,
        ),
        "q row": lambda h, p, steps, *_: (h, 0, schedule.query_tile(steps[place(h, p)])),
        "target": lambda h, p, steps, bits, targets, *_: (h, targets[place(h, p)], 0),
        "ids": lambda h, p, *_: (_share(h, heads // B, heads), 0, 0),
    }  # fmt: skip

    def spec(array, which: str) -> pl.BlockSpec:
        _, rows, columns = array.shape
        shapes = {"ids": (rows, columns), "q row": (1, blocks.q), "k": (blocks.k, columns)}
        return pl.BlockSpec((1, *shapes.get(which, (blocks.q, columns))), maps[which])

    def step(*references):
        body(*references, kernel=kernel, index=place(pl.program_id(0), pl.program_id(1)))

    return pl.pallas_call(
        step,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(heads, P),
            in_specs=[spec(*operand) for operand in operands],
            out_specs=[spec(*result) for result in results],
            scratch_shapes=[pltpu.VMEM(shape, F32) for shape in scratch],
        ),
        out_shape=[shape for shape, _ in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=kernel.vmem_bytes,
            disable_bounds_checks=True,  # the tables are ours; checks are a third of a step's cost
        ),
        interpret=kernel.interpret,
        name=name,
    )(*(table.reshape(-1) for table in tables), *(array for array, _ in operands))


def _share(h, group: int, heads: int):
    """h // group for h < heads, spelled so that the scalar unit need not divide where it can."""
    if group == heads:
        return 0
    if group & (group - 1) == 0:
        return h >> (group.bit_length() - 1)
    return lax.div(h, jnp.int32(group))


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contracts one axis of each in float32; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == F32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=F32)


def ids_of(ids_ref, start, length: int) -> jax.Array:
    """The columns of `ids` for `length` tokens from `start`."""
    return ids_ref[0, :, pl.ds(pl.multiple_of(start, LANES), length)]


def cut(keep: Callable, offset: int, s: jax.Array) -> jax.Array:
    """Puts -inf where `keep(row + offset, column)` does not hold, as on one side of a diagonal."""
    row, column = (lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
    return jnp.where(keep(row + offset, column), s, -jnp.inf)


def load(ref, at: slice) -> jax.Array:
    """Rows `at` of a block."""
    return ref[0, at]


def spans(start: int, stop: int, size: int) -> list[slice]:
    """Cuts start .. stop into slices of at most `size`."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]
