"""Held-out evaluation: one pass over the held-out split, in nats per token and bits per byte."""

import itertools
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding

from models.spec import Tree
from trainer.data.corpus import compression_baselines, held_out_bytes
from trainer.data.dataset import Dataset
from trainer.data.loader import eval_batches
from trainer.data.rows import Rows, Steps
from trainer.metrics import bits_per_byte

BASELINE_LIMIT = 8 * 2**20  # larger held-out texts are not worth the compressors' minutes


def evaluate(
    eval_step: Callable[[Tree, dict], dict[str, jax.Array]],
    params: Tree,
    dataset: Rows,
    batch_size: int,
    sharding: NamedSharding,
    batches: int = 0,
    compiled: Callable[[], None] = lambda: None,
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
        if sums is None:
            compiled()
        sums = part if sums is None else jax.tree.map(lambda a, b: a + b, sums, part)
    nll, tokens = (float(x) for x in jax.device_get((sums["nll"], sums["tokens"])))
    if not tokens:
        return {"loss": None, "bits_per_byte": None, "tokens": 0}
    loss = nll / tokens
    return {"loss": loss, "bits_per_byte": to_bits_per_byte(loss, dataset), "tokens": int(tokens)}


def to_bits_per_byte(loss: float, data: Steps, row: int = 0) -> float | None:
    """Returns a loss in nats per token around global row `row` as bits per byte of its text.

    None where the two do not compare: some text carries no loss, or was rearranged.
    """
    ratio = data.bytes_per_token(row)
    return None if ratio is None else bits_per_byte(loss, ratio)


def baselines(dataset: Rows) -> dict[str, float] | None:
    """Returns gzip -9 and xz -9 bits per byte of the held-out text.

    None if it is large, of several datasets, or not what the loss is about.
    """
    if not isinstance(dataset, Dataset) or dataset.bytes_per_token() is None:
        return None
    if dataset.shards.text_bytes > BASELINE_LIMIT:
        return None
    found = compression_baselines(held_out_bytes(dataset.shards.folder))
    return {f"{name}_bits_per_byte": bits for name, bits in found.items()}
