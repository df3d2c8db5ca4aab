"""Train-step throughput on one CPU device: Torus, MaxText and PyTorch at the same dimensions.

Run: `python -m tests.benchmarks.step_cpu [--size 60m] [--rounds 3] [--only TEXT]`. Every round runs
each contender once in a process of its own, in rotating order, so that all see the same weather.
Reported per contender: best tokens per second, the median over rounds of its ratio to Torus in the
same dtype and round, and its share of the best matmul rate that any library reached. Two clocks:
wall, and processor seconds of all threads, which stay meaningful on a machine that is shared.

MaxText needs an environment of its own, given by --maxtext-python or TORUS_MAXTEXT_PYTHON:
    python3.12 -m venv maxtext && maxtext/bin/pip install uv
    maxtext/bin/uv pip install --python maxtext/bin/python --resolution=lowest 'maxtext[tpu]==0.2.5'
PyTorch takes part where torch and transformers are installed, by --torch-python elsewhere.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
WARM_UP = 2
SIZES = {
    "60m": {"width": 512, "layers": 8, "heads": 8, "head_dim": 64, "mlp": 1536, "vocab": 32_000},
    "23m": {"width": 384, "layers": 6, "heads": 6, "head_dim": 64, "mlp": 1024, "vocab": 16_384},
}
BATCH = {"batch": 4, "seq": 512}


@dataclass(frozen=True)
class Contender:
    """One program: the start of its command line, and its own fields of the job."""

    name: str
    command: tuple[str, ...]
    dtype: str
    job: dict = dataclasses.field(default_factory=dict, hash=False)


def contenders(maxtext_python: str | None, torch_python: str | None) -> list[Contender]:
    """Returns all that can run here, each in float32 and bfloat16."""
    worker = (sys.executable, "-m", "tests.benchmarks.step_cpu", "--worker")
    found = []
    for dtype in ("float32", "bfloat16"):
        found.append(Contender("torus", worker, dtype))
        if maxtext_python:
            command = (maxtext_python, str(HERE / "peers/maxtext_step.py"))
            for remat in ("full", "minimal_with_context"):
                found.append(Contender(f"maxtext {remat}", command, dtype, {"remat": remat}))
        if torch_python:
            command = (torch_python, str(HERE / "peers/pytorch_step.py"))
            for name, compiled in (("pytorch eager", False), ("pytorch compiled", True)):
                found.append(Contender(name, command, dtype, {"compiled": compiled}))
    return found


def step_flops(size: dict) -> float:
    """Returns the model FLOPs of one step: embedding lookup 0, attention causal."""
    D, F, inner = size["width"], size["mlp"], size["heads"] * size["head_dim"]
    layer = 4 * D * inner + 3 * D * F
    attention = 12 * inner * (size["seq"] + 1) / 2 * size["layers"]
    weights = size["layers"] * layer + D * size["vocab"]
    return size["batch"] * size["seq"] * (6 * weights + attention)


# ---------------------------------------------------------------- Torus, in its own process


def torus_experiment(size: dict, dtype: str):
    """Returns the Experiment of one job."""
    from models.config import ModelConfig
    from trainer.config import Experiment, validate

    model = ModelConfig(
        vocab=size["vocab"],
        layers=size["layers"],
        width=size["width"],
        heads=size["heads"],
        kv_heads=size["heads"],
        head_dim=size["head_dim"],
        mlp=size["mlp"],
        max_length=size["seq"],
        dtype=dtype,
        remat="none",
        scan_layers=False,
    )
    experiment = Experiment(model=model)
    experiment.train.batch_size = size["batch"]
    experiment.data.seq_len = size["seq"]
    validate(experiment)
    return experiment


def matmul_rate(size: dict, dtype: str) -> float:
    """Returns XLA's best FLOP/s on the MLP's product."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size["batch"] * size["seq"], size["width"]), dtype)
    w = jnp.ones((size["width"], size["mlp"]), dtype)
    multiply = jax.jit(jnp.dot)
    jax.block_until_ready(multiply(x, w))
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        jax.block_until_ready(multiply(x, w))
        best = min(best, time.perf_counter() - begin)
    return 2 * x.size * size["mlp"] / best


def torus_job(job: dict) -> dict:
    """Times Torus' own jitted step, as `torus train` builds it, on random tokens."""
    from sharding.mesh import make_mesh
    from sharding.runtime import start_runtime

    start_runtime()
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from sharding.rules import BATCH as BATCH_AXES
    from sharding.rules import SEQ
    from trainer.state import init_state, make_layout
    from trainer.step import make_train_step

    size = job["size"]
    experiment = torus_experiment(size, job["dtype"])
    mesh = make_mesh(experiment.mesh)
    rate = matmul_rate(size, job["dtype"])
    seconds, processor = [], []
    with jax.set_mesh(mesh):
        layout = make_layout(experiment, mesh)
        state = init_state(experiment, layout)
        step = jax.jit(make_train_step(experiment, layout), donate_argnums=0)
        shape = (size["batch"], size["seq"])
        tokens = np.random.default_rng(0).integers(1, size["vocab"], (shape[0], shape[1] + 1))
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.tile(np.arange(shape[1]), (shape[0], 1)),
            "segment_ids": np.ones(shape),
        }
        placed = NamedSharding(mesh, PartitionSpec(BATCH_AXES, SEQ))
        batch = {k: jax.device_put(a.astype(np.int32), placed) for k, a in batch.items()}
        for _ in range(job["steps"] + WARM_UP):
            wall, cpu = time.perf_counter(), time.process_time()
            state, metrics = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - wall)
            processor.append(time.process_time() - cpu)
    return {
        "seconds": seconds[WARM_UP:],
        "processor_seconds": processor[WARM_UP:],
        "loss": float(metrics["loss"]),
        "matmul_flops": rate,
    }


# ---------------------------------------------------------------- rounds and the table


def run(contender: Contender, size: dict, steps: int) -> dict:
    """Returns what one process printed; its error output goes to ours when it fails."""
    job = {"size": size, "dtype": contender.dtype, "steps": steps, **contender.job}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [*contender.command, json.dumps(job)],
        env=environment,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        raise RuntimeError(f"{contender.name} {contender.dtype} ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(results: dict[Contender, list[dict]], size: dict) -> str:
    """Returns one line per contender."""
    tokens, flops = size["batch"] * size["seq"], step_flops(size)
    rates = {
        dtype: max(
            (r.get("matmul_flops", 0) for c, rs in results.items() for r in rs if c.dtype == dtype),
            default=0,
        )
        for dtype in ("float32", "bfloat16")
    }
    lines = [
        f"{'':31s}{'tokens/s':>9s}{'Torus is':>10s}{'of matmul':>10s}"
        f"{'tokens/cpu-s':>13s}{'Torus is':>10s}"
    ]
    for contender, rounds in results.items():
        torus = next(
            (rs for c, rs in results.items() if c.name == "torus" and c.dtype == contender.dtype),
            None,
        )

        def ratio(field, rounds=rounds, torus=torus) -> str:
            if not torus:
                return "-"
            pairs = zip(rounds, torus, strict=False)
            ratios = [statistics.median(r[field]) / statistics.median(t[field]) for r, t in pairs]
            return f"{statistics.median(ratios):.2f}x"

        wall = min(min(r["seconds"]) for r in rounds)
        cpu = min(min(r["processor_seconds"]) for r in rounds)
        share = flops / wall / rates[contender.dtype] if rates[contender.dtype] else float("nan")
        lines.append(
            f"{contender.dtype + ' ' + contender.name:31s}{tokens / wall:9.0f}"
            f"{ratio('seconds'):>10s}{share:10.0%}{tokens / cpu:13.0f}"
            f"{ratio('processor_seconds'):>10s}"
        )
    best = ", ".join(f"{d} {r / 1e9:.0f}" for d, r in rates.items() if r)
    return "\n".join([*lines, f"matmul rate, GFLOP/s: {best}; FLOPs per step: {flops / 1e9:.0f} G"])


def has_torch() -> bool:
    """Returns whether this Python can run the PyTorch side."""
    from importlib.util import find_spec

    return bool(find_spec("torch") and find_spec("transformers"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="60m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per process")
    parser.add_argument(
        "--only", default="", help="contenders whose name or dtype contains this; Torus always runs"
    )
    parser.add_argument("--maxtext-python", default=os.environ.get("TORUS_MAXTEXT_PYTHON"))
    parser.add_argument("--torch-python", default=sys.executable if has_torch() else None)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(torus_job(json.loads(options.worker))))
        return
    size = SIZES[options.size] | BATCH
    chosen = [
        c
        for c in contenders(options.maxtext_python, options.torch_python)
        if c.name == "torus" or options.only in f"{c.dtype} {c.name}"
    ]
    results: dict[Contender, list[dict]] = {c: [] for c in chosen}
    for number in range(options.rounds):
        turn = number % len(chosen)
        for contender in chosen[turn:] + chosen[:turn]:
            results[contender].append(run(contender, size, options.steps))
            print(f"round {number + 1}: {contender.dtype} {contender.name}", file=sys.stderr)
    print(f"{options.size}: {options.rounds} rounds of {options.steps} steps, batch 4 x 512 tokens")
    print(table(results, size))


if __name__ == "__main__":
    main()
