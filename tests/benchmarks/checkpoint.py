"""What a checkpoint costs: blocking time, throughput, and the price of verification, paired.

Run: `python -m tests.benchmarks.checkpoint [--gib 1] [--rounds 5] [--folder /tmp/x]`. Every round
writes and reads the same arrays in each way, in turn: a raw write with fsync, a save that waits,
one that does not, one without fingerprints, and restores with and without verification. Medians of
ratios within rounds, and ratios of the fastest times: on a virtual machine whose host takes freed
memory back, what disturbs a round only ever adds to it, up to 4 s for a GiB.

With `--chunks 1,4,16` it compares sizes of chunks (MiB) instead: time of a save, of a restore, and
the bytes that each of four processes reads to restore its quarter of every array. With `--crc` it
times the storage alone with and without a crc32c in every chunk of 4 MiB, not forced to disk.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import SingleDeviceSharding

from checkpoint.config import CheckpointConfig
from checkpoint.fingerprint import as_text, fingerprints
from checkpoint.manager import CheckpointManager
from checkpoint.storage import load_step
from sharding.runtime import start_runtime
from tests.processes import run_processes


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
    bare = mock.patch("checkpoint.storage.fingerprints", lambda tree: np.zeros((len(tree), 2), int))
    ways = [("async", contextlib.nullcontext()), ("bare", bare)][:: 1 if number % 2 else -1]
    for name, context in (*ways, ("sync", contextlib.nullcontext())):
        config = CheckpointConfig(asynchronous=name != "sync")
        with context, CheckpointManager(folder / name, config) as manager:
            took[f"{name} blocking"] = seconds(lambda m=manager: m.save(1, state, {}, force=True))
            waited = seconds(manager.wait)
        took[f"{name} total"] = took[f"{name} blocking"] + waited
        if name != "sync":  # its pages are those that the next save gets, as it had the raw ones
            shutil.rmtree(folder / name)
    ways = [("restore", False), ("restore verified", True)]
    for name, verify in ways if number % 2 else reversed(ways):  # the second finds warmer caches
        took[name] = seconds(
            lambda v=verify: jax.block_until_ready(
                load_step(folder / "sync", 1, abstract, verify=v)[0]
            )
        )
    shutil.rmtree(folder / "sync")
    return took


WIDTH = 4096

QUARTER = """
import sys, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from checkpoint.storage import load_step
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.runtime import start_runtime

def read_bytes():
    return int(open("/proc/self/io").read().split()[1])  # rchar

start_runtime()
folder, rows, spec = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
place = NamedSharding(make_mesh(MeshConfig()), PartitionSpec(*spec))
leaf = jax.ShapeDtypeStruct((rows, int(sys.argv[4])), jnp.float32, sharding=place)
abstract = {f"w{i}": leaf for i in range(16)}
before = read_bytes()
jax.block_until_ready(load_step(folder, 1, abstract, verify=False)[0])
print(read_bytes() - before)
"""


def chunk_round(folder: Path, state: dict, abstract: dict, mib: int, axis: int | None) -> dict:
    """Saves and restores with one size of chunks; along `axis` also a quarter by process."""
    took = {"raw": seconds(lambda: raw_write(folder, state))}
    (folder / "raw").unlink()
    with CheckpointManager(folder / "run", CheckpointConfig(chunk_mib=mib)) as manager:

        def save() -> None:
            manager.save(1, state, {}, force=True)
            manager.wait()

        took["save"] = seconds(save)
    load = lambda: jax.block_until_ready(load_step(folder / "run", 1, abstract, verify=False)[0])  # noqa: E731
    took["restore"] = seconds(load)
    if axis is not None:
        size = sum(x.nbytes for x in state.values())
        spec = (("fsdp", None), (None, "fsdp"))[axis]
        rows = next(iter(state.values())).shape[0]
        arguments = [folder / "run", rows, spec, WIDTH]
        results = run_processes(QUARTER, 4, 1, arguments, timeout=120)
        took["read"] = max(int(result.stdout.split()[-1]) for result in results) / size
    shutil.rmtree(folder / "run")
    return took


def compare_chunks(folder: Path, state: dict, abstract: dict, sizes: list[int], rounds: int):
    found: dict[int, list[dict]] = {mib: [] for mib in sizes}
    reads = {
        (mib, axis): chunk_round(folder, state, abstract, mib, axis)["read"]
        for mib in sizes
        for axis in (0, 1)
    }
    for _ in range(rounds):
        for mib in sizes:
            found[mib].append(chunk_round(folder, state, abstract, mib, None))
    for mib, took in found.items():
        save, restore = (statistics.median(t[k] for t in took) for k in ("save", "restore"))
        raw = statistics.median(t["raw"] / t["save"] for t in took)
        print(
            f"{mib:3} MiB: save {save:.2f} s (raw write / save {raw:.2f}), restore {restore:.2f} s;"
            f" a quarter reads {reads[mib, 0]:.1%} by rows, {reads[mib, 1]:.1%} by columns"
        )


def storage_round(folder: Path, crc: bool) -> dict[str, float]:
    """Returns the seconds of writing and of reading 512 MiB, two layers at a time."""
    layers = [np.random.default_rng(i).normal(size=(2048, 4096)).astype(np.float32) for i in (0, 1)]
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    metadata = {
        "shape": [16, 2048, 4096], "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 256, 4096]}},
        "codecs": codecs + [{"name": "crc32c"}] * crc,
    }  # fmt: skip
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
    kvstore = {"driver": "ocdbt", "base": f"file://{folder}/crc/", "path": "x/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    store = ts.open(spec, create=True, context=context).result()

    def write() -> None:
        for i in range(0, 16, 2):
            for future in [store[i + k].write(layers[k]) for k in (0, 1)]:
                future.result()

    def read() -> None:
        for i in range(0, 16, 2):
            for future in [store[i + k].read() for k in (0, 1)]:
                future.result()

    took = {"write": seconds(write), "read": seconds(read)}
    shutil.rmtree(folder / "crc")
    return took


def compare_crc(folder: Path, rounds: int) -> None:
    storage_round(folder, True)  # warms the page cache
    pairs = [[storage_round(folder, crc) for crc in (True, False)] for _ in range(rounds)]
    for what in ("write", "read"):
        ratios = sorted(with_it[what] / without[what] for with_it, without in pairs)
        print(f"{what}: time with crc32c / without: {', '.join(f'{r:.2f}' for r in ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure")
    parser.add_argument("--chunks", default="", help="sizes to compare, MiB")
    parser.add_argument("--crc", action="store_true", help="the cost of a crc32c in the storage")
    args = parser.parse_args()
    if args.crc:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            return compare_crc(Path(folder), args.rounds)
    start_runtime()
    rows = int(args.gib * 2**30 / 16 / 4 / WIDTH)
    keys = jax.random.split(jax.random.key(0), 16)
    state = {f"w{i}": jax.random.normal(key, (rows, WIDTH)) for i, key in enumerate(keys)}
    here = SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here) for name, x in state.items()
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.chunks:
            sizes = [int(mib) for mib in args.chunks.split(",")]
            return compare_chunks(Path(folder), state, abstract, sizes, args.rounds)
        one_round(Path(folder), state, abstract, 0)  # compiles, and warms the page cache
        rounds = [one_round(Path(folder), state, abstract, n) for n in range(args.rounds)]

    def median(key: str) -> float:
        return statistics.median(took[key] for took in rounds)

    def best(key: str) -> float:
        return min(took[key] for took in rounds)

    size = sum(x.nbytes for x in state.values())
    for key in rounds[0]:
        print(f"{key:18} {median(key):7.3f} s  {size / median(key) / 1e9:6.2f} GB/s"
              f"  fastest {best(key):7.3f} s")  # fmt: skip
    for over, under in (
        ("async blocking", "sync total"),
        ("raw", "async total"),
        ("async total", "bare total"),
        ("restore verified", "restore"),
    ):
        paired = statistics.median(took[over] / took[under] for took in rounds)
        fastest = best(over) / best(under)
        print(f"{over + ' / ' + under:32} {paired:.4f}, of the fastest {fastest:.4f}")


if __name__ == "__main__":
    main()
