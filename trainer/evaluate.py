"""Held-out evaluation: one pass over the held-out split, in nats per token and bits per byte."""

import itertools
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding

from models.spec import Tree
from trainer.data.corpus import compression_baselines, held_out_bytes
from trainer.data.dataset import Dataset
from trainer.data.loader import eval_batches
from trainer.metrics import bits_per_byte

BASELINE_LIMIT = 8 * 2**20  # larger held-out texts are not worth the compressors' minutes


def evaluate(
    eval_step: Callable[[Tree, dict], dict[str, jax.Array]],
    params: Tree,
    dataset: Dataset,
    batch_size: int,
    sharding: NamedSharding,
    batches: int = 0,
) -> dict[str, float]:
    """Returns loss (nats per token), bits_per_byte and tokens over `batches` (0 = all) batches.

    Bits per byte divide by the text the tokens stand for: every byte is predicted exactly once, so
    the figure compares with a compressor's on the same text.
    """
    sums = None
    for batch in itertools.islice(eval_batches(dataset, batch_size, sharding), batches or None):
        part = eval_step(params, batch)
        sums = part if sums is None else jax.tree.map(lambda a, b: a + b, sums, part)
    nll, tokens = (float(x) for x in jax.device_get((sums["nll"], sums["tokens"])))
    loss = nll / tokens
    return {"loss": loss, "bits_per_byte": to_bits_per_byte(loss, dataset), "tokens": int(tokens)}


def to_bits_per_byte(loss: float, dataset: Dataset) -> float:
    """Returns a loss in nats per token of `dataset` as bits per byte of its text."""
    return bits_per_byte(loss, dataset.shards.text_bytes / dataset.plan.positions_per_epoch)


def baselines(dataset: Dataset) -> dict[str, float] | None:
    """Returns gzip -9 and xz -9 bits per byte of the held-out text, or None if it is large."""
    if dataset.shards.text_bytes > BASELINE_LIMIT:
        return None
    found = compression_baselines(held_out_bytes(dataset.shards.folder))
    return {f"{name}_bits_per_byte": bits for name, bits in found.items()}
