"""What a checkpoint costs: blocking time, throughput, and the price of verification, paired.

Run: `python -m tests.benchmarks.checkpoint [--gib 1] [--rounds 5] [--folder /tmp/x]`. Every round
writes and reads the same arrays in each way, in turn: a raw write with fsync, a save that waits, a
save that does not, and restores with and without verification. Medians of ratios within rounds.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from checkpoint.config import CheckpointConfig
from checkpoint.fingerprint import as_text, fingerprints
from checkpoint.manager import CheckpointManager, load_step


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def raw_write(folder: Path, state: dict) -> None:
    with open(folder / "raw", "wb") as stream:
        for array in state.values():
            stream.write(memoryview(np.asarray(array)).cast("B"))
        stream.flush()
        os.fsync(stream.fileno())


def one_round(folder: Path, state: dict, abstract: dict, number: int) -> dict[str, float]:
    took = {"raw": seconds(lambda: raw_write(folder, state))}
    (folder / "raw").unlink()
    took["fingerprint"] = seconds(lambda: as_text(fingerprints(state), list(state)))
    for name, asynchronous in (("sync", False), ("async", True)):
        target = folder / name
        with CheckpointManager(target, CheckpointConfig(asynchronous=asynchronous)) as manager:
            took[f"{name} blocking"] = seconds(lambda m=manager: m.save(1, state, {}, force=True))
            waited = seconds(manager.wait)
        took[f"{name} total"] = took[f"{name} blocking"] + waited
    ways = [("restore", False), ("restore verified", True)]
    for name, verify in ways if number % 2 else reversed(ways):  # the second finds warmer caches
        took[name] = seconds(
            lambda v=verify: jax.block_until_ready(
                load_step(folder / "sync", 1, abstract, verify=v)[0]
            )
        )
    for name in ("sync", "async"):
        shutil.rmtree(folder / name)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure")
    args = parser.parse_args()
    rows = int(args.gib * 2**30 / 16 / 4 / 1024)
    keys = jax.random.split(jax.random.key(0), 16)
    state = {f"w{i}": jax.random.normal(key, (rows, 1024)) for i, key in enumerate(keys)}
    here = SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here) for name, x in state.items()
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        one_round(Path(folder), state, abstract, 0)  # compiles, and warms the page cache
        rounds = [one_round(Path(folder), state, abstract, n) for n in range(args.rounds)]

    def median(key: str) -> float:
        return statistics.median(took[key] for took in rounds)

    def ratio(over: str, under: str) -> float:
        return statistics.median(took[over] / took[under] for took in rounds)

    size = sum(x.nbytes for x in state.values())
    for key in rounds[0]:
        print(f"{key:18} {median(key):7.3f} s  {size / median(key) / 1e9:6.2f} GB/s")
    print(f"async blocking / sync total      {ratio('async blocking', 'sync total'):.4f}")
    print(f"raw write / async total          {ratio('raw', 'async total'):.3f}")
    print(f"fingerprint / async total        {ratio('fingerprint', 'async total'):.3f}")
    pair = median("restore verified") / median("restore")
    print(f"restore verified / not verified  {pair:.3f}")


if __name__ == "__main__":
    main()
