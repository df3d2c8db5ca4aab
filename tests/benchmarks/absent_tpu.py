"""What kernel estimates for absent TPUs share: the shapes, compiling for one chip, kept results.

Import this before JAX: it sets the environment in which libtpu writes its bundles.
"""

import os
import tempfile

from tests.benchmarks import bundles

DUMP = tempfile.mkdtemp(prefix="bundles")
os.environ.update(bundles.environment(DUMP))

import dataclasses  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental.layout import Format, Layout  # noqa: E402

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
    documents: int = 1  # of uneven lengths, 1:2:3:... of the row

    def __str__(self) -> str:
        extra = f" window {self.window}" if self.window else ""
        extra += f" {self.documents} documents" if self.documents > 1 else ""
        return f"H{self.heads}/{self.kv_heads} S{self.length} D{self.head_dim}{extra}"

    def document_of(self) -> np.ndarray:
        """The document of every token, from 0."""
        ends = np.cumsum(np.arange(1, self.documents + 1))
        return np.searchsorted(ends * self.length // ends[-1], np.arange(self.length), side="right")


SHAPES = (
    Shape(8, 8, 4096),
    Shape(16, 16, 8192),
    Shape(32, 8, 8192),
    Shape(16, 16, 8192, window=1024),
    Shape(16, 16, 8192, documents=8),
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


def read_kernels(compile_once: Callable[[], object]) -> list[bundles.Kernel]:
    """Runs `compile_once` and returns the kernels that it compiled."""
    return bundles.compile_and_read(DUMP, compile_once)


class Results:
    """Seconds of kernels by chip, shape and blocks, kept in a file if one is named.

    None stands for what does not compile, most often for want of VMEM.
    """

    def __init__(self, file: str):
        self.path = Path(file) if file else None
        self.kept = json.loads(self.path.read_text()) if file and self.path.exists() else {}

    def get(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float] | None:
        key = f"jax {jax.__version__} {key}"
        if key not in self.kept:
            try:
                self.kept[key] = measure()
            except jax.errors.JaxRuntimeError:
                self.kept[key] = None
            if self.path:
                self.path.with_suffix(".new").write_text(json.dumps(self.kept, indent=0))
                self.path.with_suffix(".new").rename(self.path)
        return self.kept[key]
