"""Held-out evaluation: one pass over the held-out split, in nats per token and bits per byte."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding

from models.spec import Tree
from sharding.errors import UsageError
from trainer.data.config import CollateConfig
from trainer.data.corpus import HELD_OUT, compression_baselines, split_bytes
from trainer.data.dataset import Dataset
from trainer.data.loader import eval_batches
from trainer.data.rows import Rows, Steps
from trainer.metrics import bits_per_byte

_READ = 64  # rows of a batch that are read to see whether any token carries loss
BASELINE_LIMIT = 8 * 2**20  # larger held-out texts are not worth the compressors' minutes


def evaluate(
    eval_step: Callable[[Tree, dict], dict[str, jax.Array]],
    params: Tree,
    dataset: Rows,
    batch_size: int,
    sharding: NamedSharding,
    batches: int = 0,
    compiled: Callable[[], None] | None = None,
) -> dict[str, float | None]:
    """Returns loss (nats per token), bits_per_byte and tokens over `batches` (0 = all) batches.

    Bits per byte divide by the text the tokens stand for: every byte is predicted exactly once, so
    the figure compares with a compressor's on the same text. It is None with loss on a part only.
    Where no token carries loss, loss and bits per byte are None.

    Args:
      compiled: called once the first batch has been handed over, for which `eval_step` is compiled.
    """
    sums = None
    for batch in itertools.islice(eval_batches(dataset, batch_size, sharding), batches or None):
        part = eval_step(params, batch)
        if sums is None and compiled is not None:
            compiled()
        sums = part if sums is None else jax.tree.map(lambda a, b: a + b, sums, part)
    sums = sums or {"nll": 0.0, "tokens": 0.0}
    nll, tokens = (float(x) for x in jax.device_get((sums["nll"], sums["tokens"])))
    if not tokens:
        return {"loss": None, "bits_per_byte": None, "tokens": 0}
    loss = nll / tokens
    return {"loss": loss, "bits_per_byte": to_bits_per_byte(loss, dataset), "tokens": int(tokens)}


def check_loss_tokens(data: Steps, collate: CollateConfig, batch_size: int, split: str) -> None:
    """Refuses data that a collate function leaves without loss: it would train at a loss of 0.

    Args:
      data: the dataset that training reads, or the held-out one.
      split: its name, for the error.

    Raises:
      UsageError: no token carries loss in the first rows of the first 8 batches.
    """
    if collate.kind not in ("instruction", "prefix"):
        return
    read = 0
    for first in range(0, 8 * batch_size, batch_size):
        rows, at = data.step(first, batch_size)
        ids = np.arange(at, at + min(batch_size * data.seq_len // rows.seq_len, _READ))
        batch = rows.rows(ids)
        if ((batch["targets"] >= 0) & (batch["segment_ids"] > 0)).any():
            return
        read += len(ids)
    more = " (config.eval.every = 0 evaluates nothing)" if split == HELD_OUT else ""
    raise UsageError(
        f"config.data.collate: no token carries loss in {read} rows of the split {split}: do the "
        f"ids of begin = {collate.begin} and end = {collate.end} occur in its documents?{more}"
    )


def to_bits_per_byte(loss: float, data: Steps, row: int = 0) -> float | None:
    """Returns a loss in nats per token around global row `row` as bits per byte of its text.

    None where the two do not compare: some text carries no loss, or was rearranged.
    """
    ratio = data.bytes_per_token(row)
    return None if ratio is None else bits_per_byte(loss, ratio)


def baselines(dataset: Rows) -> dict[str, float] | None:
    """Returns gzip -9 and xz -9 bits per byte of the held-out text.

    None if it is large, of several datasets, partly skipped, or not what the loss is about.
    """
    if not isinstance(dataset, Dataset) or dataset.bytes_per_token() is None:
        return None
    if dataset.shards.text_bytes > BASELINE_LIMIT:
        return None
    if not (text := split_bytes(dataset.shards)):
        return None
    found = compression_baselines(text)
    return {f"{name}_bits_per_byte": bits for name, bits in found.items()}
