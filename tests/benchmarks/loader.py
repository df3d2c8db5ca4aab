"""Tokens per second and padding of the loader, against grain's own packers on the same documents.

Run: `JAX_PLATFORMS=cpu taskset -c 0 python -m tests.benchmarks.loader`. Seconds are processor
seconds of all threads, so that the figures are those of one core, whatever else the machine does.
All rows read the documents of the built-in corpus from memory-mapped shards, shuffled. grain cannot
cut long documents while packing, so its packers get pieces of at most one row, cut beforehand. The
readers take turns, ROUNDS times; a ratio is the median of those of single rounds.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trainer.data.config import DataConfig
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.loader import Loader

TOKENS_PER_BATCH = 32_768
SECONDS, ROUNDS = 1.5, 3
BINS = 64
# grain's default of 16 threads is slower for such rows, and would run on behind the other readers.
INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def measure(batches: Iterator[dict[str, np.ndarray]], mask: str) -> tuple[float, float]:
    """Returns (predicted tokens per processor second in millions, share of padding)."""
    next(batches)
    real = total = 0
    begin = time.process_time()
    while time.process_time() - begin < SECONDS:
        segments = np.asarray(next(batches)[mask])
        real += int((segments > 0).sum())
        total += segments.size
    return real / (time.process_time() - begin) / 1e6, 1 - real / total


def documents(dataset: Dataset) -> grain.MapDataset:
    """Returns the pieces of all documents, cut to row length, shuffled by grain."""
    shards, seq_len = dataset.shards, dataset.seq_len
    pieces = [
        (number, start)
        for number, length in enumerate(shards.lengths.tolist())
        for start in range(0, length - 1, seq_len)
    ]

    def read(piece: tuple[int, int]) -> dict[str, np.ndarray]:
        number, start = piece
        tokens = shards.document(number)[start : start + seq_len + 1].astype(np.int32)
        return {"tokens": tokens[:-1], "targets": tokens[1:]}

    return grain.MapDataset.source(pieces).seed(0).shuffle().map(read).repeat()


def grain_packed(
    dataset: Dataset, batch_size: int, packer: Callable
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches that a streaming packer of grain makes."""
    lengths = {"tokens": dataset.seq_len, "targets": dataset.seq_len}
    stream = documents(dataset).to_iter_dataset(INLINE)
    packed = packer(stream, length_struct=lengths, num_packing_bins=BINS)
    for batch in packed.batch(batch_size):
        yield {"segment_ids": batch["tokens_segment_ids"]}


def main() -> None:
    """Prints one table."""
    sharding = NamedSharding(jax.make_mesh((1,), ("data",)), P("data"))
    print(f"{'seq_len':>7}  {'reader':<34} {'Mtok/s':>7} {'padding':>8} {'ratio':>6}")
    for seq_len in (512, 2048):
        dataset = open_dataset(DataConfig(seq_len=seq_len))
        batch_size = TOKENS_PER_BATCH // seq_len

        def host(dataset=dataset, batch_size=batch_size):
            step = 0
            while True:
                yield dataset.rows(step * batch_size + np.arange(batch_size))
                step += 1

        rows = {
            f"grain FirstFit, {BINS} bins": grain_packed(
                dataset, batch_size, grain.experimental.FirstFitPackIterDataset
            ),
            f"grain BestFit, {BINS} bins": grain_packed(
                dataset, batch_size, grain.experimental.BestFitPackIterDataset
            ),
            "plan, grain MapDataset front end": iter(
                dataset.as_grain().batch(batch_size).to_iter_dataset(INLINE)
            ),
            "plan, rows on the host": host(),
            "plan, Loader (rows on the device)": Loader(dataset, batch_size, sharding),
        }
        speeds: dict[str, list[float]] = {name: [] for name in rows}
        padding = {}
        for _ in range(ROUNDS):
            for name, batches in rows.items():
                speed, padding[name] = measure(batches, "segment_ids")
                speeds[name].append(speed)
        peer = next(iter(speeds.values()))
        for name, found in speeds.items():
            ratio = statistics.median(np.divide(found, peer))
            print(
                f"{seq_len:>7}  {name:<34} {statistics.median(found):7.1f} "
                f"{padding[name]:8.2%} {ratio:6.1f}"
            )
        rows["plan, Loader (rows on the device)"].close()


if __name__ == "__main__":
    main()
