"""Files as others map them: every tensor begins at a multiple of its element's size."""

import struct

import numpy as np
import pytest
from ml_dtypes import bfloat16

from checkpoint.convert.safetensors import create


@pytest.mark.parametrize("name", ["w" * n for n in range(1, 10)])  # headers of all lengths mod 8
def test_tensors_are_aligned(name, tmp_path):
    entries = [
        (name, np.dtype(np.int8), (3,)), ("b", np.dtype(bfloat16), (5,)),
        ("f", np.dtype(np.float32), (7,)), ("d", np.dtype(np.float64), (1,)),
    ]  # fmt: skip
    path = tmp_path / "x.safetensors"
    places = create(path, entries)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0
    for key, dtype, _ in entries:
        assert places[key].offset % dtype.itemsize == 0
