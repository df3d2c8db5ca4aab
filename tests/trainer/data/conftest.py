"""Small datasets of random documents."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import ByteTokenizer

LENGTHS = (0, 1, 2, 3, 16, 17, 18, 160, 161, 40, 5, 9, 33, 31)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a dataset and returns its folder."""

    def make(
        name: str = "set",
        lengths: tuple[int, ...] = LENGTHS * 5,
        *,
        seed: int = 0,
        shard_tokens: int = 700,
    ) -> Path:
        random = np.random.default_rng(seed)
        folder = tmp_path / name
        with DatasetWriter(folder, ByteTokenizer(), shard_tokens=shard_tokens) as writer:
            for split in ("train", "val"):
                for length in lengths:
                    document = random.integers(0, 256, length)
                    document[:1] = ByteTokenizer.BOS
                    writer.add(split, document, max(length - 1, 0))
        return folder

    return make
