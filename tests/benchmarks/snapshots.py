"""What snapshots in memory cost and bring, beside asynchronous checkpoints on disk; and XOR.

    python -m tests.benchmarks.snapshots [--steps 8] [--rounds 3]

Trains a model with 200 MB of state on the CPU, 2,048 tokens a step. Steps with a snapshot each,
steps without, and steps with an Orbax save each take turns; then the state is brought back from
memory, from files that the page cache holds, and from the disk itself, in turns. "Block" is how
long the loop waits in the calls, "slower" the ratio of the medians of whole steps. Parity is
measured alone, on one core.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager
from checkpoint.memory import parity
from checkpoint.memory.snapshots import Snapshots
from checkpoint.memory.wire import VARIABLE, Directory
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from sharding.runtime import start_runtime
from tests.tiny import get_config
from trainer.recovery.keeper import KeeperProcess
from trainer.state import abstract_state, init_state, make_layout, to_stored
from trainer.step import make_train_step

ROWS, LENGTH = 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Directory(folder)
        os.environ[VARIABLE] = directory.environment()[VARIABLE]
        with KeeperProcess(directory) as keeper:
            keeper.ensure()
            start_runtime()
            training(Path(folder), options.steps, options.rounds)
    xor()


def training(folder: Path, steps: int, rounds: int) -> None:
    experiment = get_config()
    experiment.model.width, experiment.model.layers, experiment.model.mlp = 512, 4, 2048
    experiment.model.heads = experiment.model.kv_heads = 8
    experiment.model.head_dim, experiment.model.max_length = 64, LENGTH
    mesh = make_mesh(experiment.mesh)
    layout = make_layout(experiment, mesh)
    row = np.random.default_rng(0).integers(0, 256, (ROWS, LENGTH + 1), np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    fields = {"tokens": row[:, :-1], "targets": row[:, 1:], "segment_ids": ones}
    fields["positions"] = np.cumsum(ones, axis=1, dtype=np.int32) - 1
    rows = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))
    with jax.set_mesh(mesh), Snapshots(1) as snapshots:
        batch = {name: jax.device_put(value, rows) for name, value in fields.items()}
        state = init_state(experiment, layout)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        print(f"state {size / 1e6:.0f} MB")
        abstract = to_stored(abstract_state(experiment, layout))
        train_step = jax.jit(make_train_step(experiment, layout), donate_argnums=0)
        snapshots.start(0, to_stored(state), held=False)
        config = CheckpointConfig(every=1)
        with CheckpointManager(folder / "steps", config) as checkpoints:

            def snapshot(step: int, state: Any) -> None:
                if snapshots.due(step):
                    snapshots.take(step, to_stored(state), lambda step=step: {"data": step})
                    taken.append(step)

            def orbax(step: int, state: Any) -> None:
                checkpoints.save(step, to_stored(state), {"data": step}, force=True)

            step, taken, ways = 0, [], {"off": None, "memory": snapshot, "disk": orbax}
            blocks: dict[str, list[float]] = {way: [] for way in ways}
            times: dict[str, list[float]] = {way: [] for way in ways}
            for round_number in range(rounds + 1):
                for way, save in ways.items():
                    for _ in range(steps if way != "disk" else 3):
                        began = time.perf_counter()
                        state, metrics = train_step(state, batch)
                        step += 1
                        called = time.perf_counter()
                        if save is not None:
                            save(step, state)
                        block = time.perf_counter() - called
                        jax.block_until_ready(metrics)
                        if round_number:  # the first is for compiling and for page faults
                            blocks[way].append(block)
                            times[way].append(time.perf_counter() - began)
                    if way == "memory" and snapshots._drain:
                        snapshots._drain.result()
                    checkpoints.wait()
            plain = statistics.median(times["off"])
            print(
                f"step {1e3 * plain:.0f} ms; {len(taken)} snapshots taken in {steps * (rounds + 1)}"
            )
            for way in ("memory", "disk"):
                block, whole = statistics.median(blocks[way]), statistics.median(times[way])
                print(
                    f"{way}: block {1e3 * block:.2f} ms, at most {1e3 * max(blocks[way]):.2f} "
                    f"({block / plain:.2%} of a step); slower {whole / plain:.3f}"
                )
            restoring(snapshots, checkpoints, abstract, step)


def restoring(
    snapshots: Snapshots, checkpoints: CheckpointManager, abstract: Any, step: int
) -> None:
    found: dict[str, list[float]] = {"memory": [], "page cache": [], "disk": []}
    for number in range(8):
        where = ("page cache", "disk")[number % 2]
        if where == "disk":
            for path in Path(str(checkpoints.folder)).rglob("*"):
                if path.is_file():
                    with path.open("rb") as stream:
                        os.fsync(stream.fileno())
                        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        kept = snapshots.restore_newest(abstract, None)
        jax.block_until_ready(kept.state)
        found["memory"].append(time.perf_counter() - began)
        began = time.perf_counter()
        saved = checkpoints.restore_newest(abstract)
        jax.block_until_ready(saved.state)
        found[where].append(time.perf_counter() - began)
        assert saved.step == step
    for way, (first, *others) in found.items():
        print(f"restore from {way}: {statistics.median(others):.3f} s, the first {first:.3f} s")


def xor() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for hosts in (2, 4, 8):
        sizes = [64 * 2**20 + 13] * hosts
        images = [memoryview(bytearray(os.urandom(size))) for size in sizes]
        size = parity.chunk_size(sizes)
        kept, rates = memoryview(bytearray(size)), []
        for _ in range(5):
            began, added = time.perf_counter(), 0
            for owner in range(1, hosts):
                start = parity.chunk_number(owner, 0) * size
                for part in parity.cut([images[owner]], start, size):
                    parity.add([kept], 0, part)
                    added += len(part)
            rates.append(added / (time.perf_counter() - began) / 1e9)
        print(json.dumps({"hosts": hosts, "xor_gb_per_s": round(statistics.median(rates), 1)}))


if __name__ == "__main__":
    main()
