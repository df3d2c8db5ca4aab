"""What watching over a run costs: judging a step, comparing replicas, the check before a start.

    python -m tests.benchmarks.health

Medians over repeats on this machine, 8 fake CPU devices as 4 replicas of 2 shards.
"""

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.fingerprint import fingerprints
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from trainer.integrity import device_sums, self_check
from trainer.recovery.health import HealthConfig, Watch

MIB = 200


def median(action: Callable[[], object], repeats: int = 9) -> float:
    """Returns the seconds of one call, the first left out."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(action())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def judging(steps: int = 3000) -> float:
    """Returns seconds per step to judge it and to say the limits of the next."""
    watch, rng = Watch(HealthConfig()), np.random.default_rng(0)
    numbers = [(3 + 0.05 * a, math.exp(0.2 * b)) for a, b in rng.normal(size=(steps, 2)).tolist()]
    start = time.perf_counter()
    for step, (loss, norm) in enumerate(numbers):
        watch.judge(step, loss, norm, False)
        watch.limits(step + 1)
    return (time.perf_counter() - start) / steps


def false_alarms(steps: int = 50_000) -> tuple[int, int]:
    """Returns how many of so many steps of noise, with tails, are called spikes, and sustained."""
    watch, rng = Watch(HealthConfig()), np.random.default_rng(1)
    spikes = sustained = 0
    for step in range(steps):
        loss = 3 + 2 * math.exp(-step / 5000) + 0.05 * rng.normal()
        spikes += watch.judge(step, loss, math.exp(0.2 * rng.standard_t(8)), False) != ""
        sustained += watch.sustained
    return spikes, sustained


def main() -> int:
    print(f"judge one step            {1e6 * judging():8.0f} us")
    spikes, sustained = false_alarms()
    print(f"false alarms in 50,000    {spikes:8d}     and {sustained} rewinds")
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    rows = MIB * 2**20 // 4 // 1024
    with jax.set_mesh(mesh):
        state = [jax.device_put(np.ones((rows, 1024), np.float32), NamedSharding(mesh, P("fsdp")))]
        seconds = median(lambda: device_sums(state))
        print(f"compare 4 replicas        {1e3 * seconds:8.0f} ms  for {MIB} MiB each")
        seconds = median(lambda: fingerprints({"w": state[0]}))
        print(f"fingerprint of the state  {1e3 * seconds:8.0f} ms  for {MIB} MiB")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        self_check(mesh, folder)
        print(f"self-check, compiled anew {1e3 * (time.perf_counter() - start):8.0f} ms")
        print(f"self-check again          {1e3 * median(lambda: self_check(mesh, folder)):8.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
