"""What kernel estimates for absent TPUs share: the named shapes, and results that are kept.

Import this before JAX: it sets the environment in which libtpu writes its bundles.
"""

import os
import tempfile

from models.attention import bundles

DUMP = tempfile.mkdtemp(prefix="bundles")
os.environ.update(bundles.environment(DUMP))

import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from models.attention.estimate import Shape  # noqa: E402

_UNEVEN = tuple(np.diff(np.cumsum(np.arange(9)) * 8192 // 36).tolist())  # 1:2:3:... of the row

SHAPES = (
    Shape(8, 8, 4096),
    Shape(16, 16, 8192),
    Shape(32, 8, 8192),
    Shape(16, 16, 8192, window=1024),
    Shape(16, 16, 8192, documents=_UNEVEN),
)


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
