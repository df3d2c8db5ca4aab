"""Planning time and memory, far jumps, padding, and attention cost between data ranks.

Run: `python -m tests.benchmarks.plan`, alone on the machine; numpy only. Real lengths are those of
the built-in corpus, in bytes and in BPE ids. It has under a thousand documents, so where two
million or a million rows are wanted the lengths are log-normal around those of web text (mean 905
tokens), and for the balance also the built-in ones drawn with replacement.
"""

import time
import tracemalloc

import numpy as np

from trainer.data.config import DataConfig
from trainer.data.dataset import open_dataset
from trainer.data.mixture import Balanced
from trainer.data.plan import Plan
from trainer.data.rows import Rows

RANKS, ROWS_PER_RANK, WINDOW = 16, 1, 64


def web_lengths(documents: int) -> np.ndarray:
    return np.random.default_rng(0).lognormal(6.2, 1.1, documents).astype(np.int64) + 2


class PlanRows(Rows):
    """The costs of a plan's rows, for the balance."""

    fields = ()

    def __init__(self, plan: Plan) -> None:
        self.seq_len, self.rows_per_epoch = plan.seq_len, plan.rows_per_epoch
        self.costs, self.sources = plan.costs, list


def lockstep(costs: np.ndarray) -> float:
    """Returns mean over steps of the largest cost of a rank, over the mean cost."""
    ranks = costs.reshape(-1, RANKS, ROWS_PER_RANK).sum(axis=2)
    return float(ranks.max(axis=1).mean() / ranks.mean())


def main() -> None:
    lengths = web_lengths(2_000_000)
    for _ in range(3):
        begin = time.perf_counter()
        plan = Plan(lengths, seq_len=2048)
        print(f"plan of 2M documents at 2,048: {time.perf_counter() - begin:.2f} s")
    print(f"  padding {plan.padding:.4%}, {plan.rows_per_epoch:,} rows per epoch")

    tracemalloc.start()
    plan = Plan(lengths, seq_len=2048)
    ids = 256 * np.arange(1, 5)[:, None] * 10**7 + np.arange(256)
    for batch in ids:
        plan.rows(batch)
    held, peak = (size / 2**20 for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    print(f"  holds {held:.1f} MiB with two windows, {peak:.1f} MiB at most")

    for name, dataset in (("web", None), ("builtin", open_dataset(DataConfig(seq_len=2048)))):
        rows = plan.rows if dataset is None else dataset.rows
        jumps = []
        for step in (10_000_000, 10_000_123, 11_000_000, 12_345_678, 20_000_000):
            begin = time.perf_counter()
            rows(step * 256 + np.arange(256))
            jumps.append(f"{1e3 * (time.perf_counter() - begin):.0f}")
        print(f"jumps to step 10M and on, batch 256, {name}: {', '.join(jumps)} ms")

    for path in ("builtin", "builtin:2048", "builtin:4096"):
        for seq_len in (512, 2048, 8192):
            dataset = open_dataset(DataConfig(path, seq_len=seq_len))
            floor = -(-dataset.plan.positions_per_epoch // seq_len) * seq_len
            floor = 1 - dataset.plan.positions_per_epoch / floor
            print(f"{path} at {seq_len}: padding {dataset.plan.padding:.3%}, least {floor:.3%}")

    builtin = open_dataset(DataConfig("builtin:2048")).shards.lengths
    drawn = builtin[np.random.default_rng(0).integers(0, len(builtin), 150_000)]
    for name, lengths in (("web", web_lengths(1_000_000)), ("builtin:2048", drawn)):
        for seq_len in (8192, 32768):
            plan = PlanRows(Plan(lengths, seq_len=seq_len))
            batch = RANKS * ROWS_PER_RANK
            ids = np.arange(plan.rows_per_epoch // (batch * WINDOW) * batch * WINDOW)
            balanced = Balanced(plan, WINDOW, batch, seed=0)
            print(
                f"{name} at {seq_len}, {len(ids):,} rows, max / mean cost of {RANKS} ranks: "
                f"random {lockstep(plan.costs(ids)):.3f}, "
                f"balanced {lockstep(balanced.costs(ids)):.3f}"
            )


if __name__ == "__main__":
    main()
