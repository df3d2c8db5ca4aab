"""How fast a fault is found and a run goes on, and what a plain loop in a shell script makes of it.

    python -m tests.benchmarks.recovery --processes 2 --faults kill,stop --tries 10
    python -m tests.benchmarks.recovery --plain --tries 10

One supervised run of the tiny config; as soon as it has got over a fault, the next comes to a rank
by chance. From the signal to: `found`, the supervisor knows; `restored`, the state is back in new
processes; `next step`, one that is new is done, after tracing and compiling with the cache. The
plain loop is Orbax's CheckpointManager, asynchronous, at the same cadence, in one process that a
shell script starts again; its step is one matrix product.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import tests.conftest  # noqa: F401  (how processes of tests compile)
from tests.processes import ROOT
from tests.trainer.recovery.runs import at_step, incidents, launch, trainers
from trainer.metrics import read_metrics

LIMIT = 2.0  # of step and data, for hangs
STEP = 0.05  # seconds, slowed down so that steps can be counted
EVERY, SNAPSHOT = 20, 5  # steps between checkpoints, and between snapshots

PLAIN = """
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp, orbax.checkpoint as ocp
folder, log = Path(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(
    save_interval_steps=int(sys.argv[3]), max_to_keep=2, enable_async_checkpointing=True))
state = {"w": jnp.zeros((256, 256)), "step": jnp.zeros((), jnp.int32)}
if manager.latest_step() is not None:
    state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
step = jax.jit(lambda s: {"w": jnp.tanh(s["w"] @ s["w"] + 1), "step": s["step"] + 1})
while True:
    state = step(state)
    time.sleep(float(sys.argv[4]))
    log.write(f"{time.time()} {int(state['step'])}\\n")
    manager.save(int(state["step"]), args=ocp.args.StandardSave(state))
"""


def table(name: str, *columns: list[float]) -> None:
    """Prints one row; also of a benchmark that is interrupted."""
    cells = [
        f"{statistics.median(values):.2f} (worst {max(values):.2f})" if values else "—"
        for values in columns
    ]
    print(f"| {name} | {len(columns[-1])} | " + " | ".join(cells) + " |", flush=True)


def until(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError("the run does not go on")
        time.sleep(0.005)
    return result


def supervised(processes: int, fault: str, tries: int, folder: Path) -> None:
    rng, run = random.Random(0), folder / f"{fault}{processes}"
    job = launch(
        run, "--processes", str(processes), "--limit", f"step={LIMIT}", "--limit", f"data={LIMIT}",
        f"--config={ROOT}/tests/trainer/recovery/slow.py", f"--config.checkpoint.every={EVERY}",
        f"--config.checkpoint.snapshot_every={SNAPSHOT}",
        "--config.train.steps=100000", SLOW=f"data={STEP}", TORUS_CACHE=str(folder / "cache"),
    )  # fmt: skip
    reader = threading.Thread(target=job.communicate)  # a pipe that nobody reads stops the run
    reader.start()
    found, restored, back, lost = [], [], [], []
    try:
        at_step(run, job, EVERY + 1)
        for n in range(tries):
            time.sleep(rng.uniform(2.5, 3.5))
            victim = trainers(job)[rng.randrange(processes)]
            began = time.time()
            os.kill(victim, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)

            def over(wanted: int = 2 * (n + 1)) -> list[dict]:
                seen = incidents(run) if (run / "incidents.jsonl").exists() else []
                return seen if len(seen) >= wanted else []

            fell, rose = until(over)[-2:]
            assert (fell["kind"], rose["kind"]) == (
                {"kill": "crash", "stop": "hang"}[fault],
                "recovered",
            )
            found.append(fell["time"] - fell["ending"] - began)
            back.append(rose["time"] - began)
            lost.append(rose["lost_steps"])
            resumed = [e["time"] for e in read_metrics(run, "event") if e["event"] == "resumed"]
            restored.append(max(resumed) - began)
    finally:
        job.kill()
        reader.join()
        table(
            f"`torus launch`, SIG{fault.upper()}, {processes} processes",
            found,
            restored,
            back,
            lost,
        )


def plain(tries: int, folder: Path) -> None:
    program, log = folder / "plain.py", folder / "log"
    program.write_text(PLAIN)
    command = f"{sys.executable} {program} {folder}/plain {log} {EVERY} {STEP}"
    script = f"while true; do {command}; done"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }  # fmt: skip
    job = subprocess.Popen(
        ["bash", "-c", script], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    rng, back, lost = random.Random(0), [], []

    def reached() -> int:
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        return max((int(line.split()[1]) for line in lines), default=0)

    try:
        until(lambda: reached() > EVERY)
        for _ in range(tries):
            time.sleep(rng.uniform(2.5, 3.5))
            began, best, count = time.time(), reached(), len(log.read_text().split("\n"))
            os.kill(trainers(job)[0], signal.SIGKILL)
            until(lambda best=best: reached() > best)
            first = int(log.read_text().split("\n")[count].split()[1])
            back.append(time.time() - began)
            lost.append(best - first + 1)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        table("plain Orbax loop in a shell script, SIGKILL, 1 process", [], [], back, lost)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--faults", default="kill,stop")
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(
        "| | tries | found, s | restored, s | next step, s | steps done twice |\n"
        + "|---" * 6
        + "|"
    )
    with tempfile.TemporaryDirectory() as folder:
        if given.plain:
            return plain(given.tries, Path(folder))
        for fault in given.faults.split(","):
            supervised(given.processes, fault, given.tries, Path(folder))


if __name__ == "__main__":
    main()
