"""One trial: a small run under `torus launch`, a fault in it, and what became of the run.

All runs are the tiny config with steps of a tenth of a second, a snapshot of every fifth and a
checkpoint of every tenth. Runs without a fault are done once for all trials that need them.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.steps import complete_steps
from tests.processes import ROOT, environment
from tests.trainer.recovery.runs import SLOW, command, keeper, trainers
from tests.trainer.test_resume import stored_state
from trainer.goodput import read_incidents
from trainer.metrics import all_records, read_metrics
from trainer.recovery.progress import Progress, ProgressPage, process_state

STEPS, SNAPSHOT, CHECKPOINT = 30, 5, 10
STEP = 0.1  # seconds that the data of a step takes
PATIENCE = 400.0  # seconds for a run that two cores share with others
FLAGS = (
    SLOW, f"--config.train.steps={STEPS}", f"--config.checkpoint.every={CHECKPOINT}",
    f"--config.checkpoint.snapshot_every={SNAPSHOT}", "--config.eval.batches=8",
)  # fmt: skip


@dataclass
class Result:
    """What a trial showed; times in seconds from the fault on."""

    fault: str
    seed: int
    problem: str = ""
    lost: int | None = None  # steps that were done twice
    detect: float | None = None
    next_step: float | None = None
    seconds: float = 0.0  # of the whole trial
    incidents: list[dict[str, Any]] = field(default_factory=list)


class Trial:
    """Starts the run of one trial, watches it and strikes. Everything raised is a failed trial."""

    def __init__(self, fault: str, seed: int, runs: "CalmRuns", folder: Path) -> None:
        self.draw = random.Random(f"{fault} {seed}")
        self.seed, self.result, self.calm = seed, Result(fault, seed), runs
        self.folder, self.run = folder, folder / "run"
        self.struck: float | None = None  # Unix time of the fault
        self._jobs: list[subprocess.Popen] = []
        self._stack = contextlib.ExitStack()
        folder.mkdir(parents=True)

    def close(self) -> None:
        for job in self._jobs:
            job.kill()
            job.wait()
        self._stack.close()

    def start(self, *flags: str, host: int = 0, hosts: int = 1, **variables: str):
        """Starts `torus launch`, one of `hosts`; what it says goes to a file."""
        if hosts > 1:
            variables |= {
                "JAX_PROCESS_ID": str(host), "JAX_NUM_PROCESSES": str(hosts),
                "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
            }  # fmt: skip
        slow = f"data={STEP} {variables.pop('SLOW', '')}"
        own = environment(SLOW=slow, TMPDIR=str(self.folder), **variables)
        with open(self.folder / "log", "a") as log:
            line = command(self.run, *FLAGS, *flags)
            job = subprocess.Popen(line, env=own, cwd=ROOT, stdout=log, stderr=log)
        self._jobs.append(job)
        return job

    def small_disk(self, mebibytes: int) -> Path:
        """Returns a folder on a file system of so many MiB, mounted in a namespace of its own."""
        folder = self.folder / "disk"
        folder.mkdir()
        script = f"mount -t tmpfs -o size={mebibytes}m none {folder} && echo && exec sleep 600"
        line = ["unshare", "-Urm", "sh", "-c", script]
        holder = self._stack.enter_context(subprocess.Popen(line, stdout=subprocess.PIPE))
        self._stack.callback(holder.kill)
        assert holder.stdout.readline(), "no small file system can be mounted here"
        return Path(f"/proc/{holder.pid}/root{folder}")

    # ------------------------------------------------------------ watching

    def until(self, what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Returns what `what` gives once it is true; the run must not end before."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, "waited in vain"
            assert any(job.poll() is None for job in self._jobs), "the run ended before"
            time.sleep(0.005)
        return found

    def page(self, rank: int, generation: int) -> Progress | None:
        for path in self.folder.glob(f"torus-launch-*/{generation}.{rank}.progress"):
            with contextlib.suppress(OSError):  # being made, or going
                if path.stat().st_size and (found := ProgressPage(path).read()).since:
                    return found
        return None

    def at_step(self, step: int, rank: int = 0, generation: int = 0) -> None:
        self.until(lambda: (p := self.page(rank, generation)) and p.step >= step)

    def in_phase(self, phase: str, rank: int = 0, generation: int = 0) -> None:
        self.until(lambda: (p := self.page(rank, generation)) and p.phase == phase)

    def incidents(self, *kinds: str) -> list[dict[str, Any]]:
        return [i for i in read_incidents(self.run) if not kinds or i["kind"] in kinds]

    # ------------------------------------------------------------ striking

    def pause(self, most: float) -> None:
        time.sleep(self.draw.uniform(0, most))

    def strike(self, *pids: int, how: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal; the first one is the fault that times are counted from."""
        self.struck = self.struck or time.time()
        for pid in pids:
            os.kill(pid, how)

    def trainer(self, job: subprocess.Popen, rank: int) -> int:
        return trainers(job)[rank]

    def keeper(self, job: subprocess.Popen) -> int:
        return keeper(job)

    # ------------------------------------------------------------ the end

    def ends(self, job: subprocess.Popen, status: int = 0, seconds: float = PATIENCE) -> None:
        try:
            found = job.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end in {seconds:g} s") from None
        assert found == status, f"ended with {found}, not {status}"

    def same_bits(self, calm: Path) -> None:
        assert stored_state(self.run, STEPS) == stored_state(calm, STEPS), "other bits at the end"

    def near(self, calm: Path, tolerance: float) -> None:
        """Compares losses, for a run that was on another mesh for a while.

        Of steps whose work was lost and came back from memory there are no records.
        """
        mine, other = (
            {r["step"]: r["loss"] for r in read_metrics(run, "train")} for run in (self.run, calm)
        )
        assert mine.keys() <= other.keys() and STEPS in mine, "not the same steps"
        worst = max(abs(mine[s] / other[s] - 1) for s in mine)
        assert worst < tolerance, f"a loss is off by {worst:.1g}"

    def kinds(self, *wanted: str, other: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Asserts that these are the incidents, beside `other` ones; returns them."""
        found = [i for i in self.incidents() if i["kind"] not in ("recovered", *other)]
        kinds = [i["kind"] for i in found]
        assert kinds == list(wanted), f"incidents are {kinds}"
        return found

    def injected(self) -> None:
        """Takes the time of the fault from what an injector of the schedule left behind."""
        marks = sorted((self.run / "chaos").glob("*"), key=lambda path: path.stat().st_mtime)
        assert marks, "the fault was never injected"
        self.struck = marks[0].stat().st_mtime

    def measure(self, lost: int) -> None:
        """Takes times and lost steps from the records; asserts that no more than `lost` are."""
        result = self.result
        faults = [i for i in self.incidents() if "ending" in i]
        if faults and self.struck:
            result.detect = round(faults[0]["time"] - faults[0]["ending"] - self.struck, 3)
        recovered, attempts = self.incidents("recovered"), self._attempts()
        if recovered:
            result.lost = sum(i["lost_steps"] for i in recovered)
            back = recovered[0]["time"]
        else:  # nobody was left to write that down
            result.lost = sum(max(0, a[-1]["step"] - b[0]["step"]) for a, b in attempts)
            back = next((r["time"] for _, b in attempts for r in b if r["kind"] == "train"), None)
        if back and self.struck:
            result.next_step = round(back - self.struck, 3)
        assert result.lost <= lost, f"{result.lost} steps lost, {lost} are allowed"

    def _attempts(self) -> list[tuple[list[dict], list[dict]]]:
        """Returns the records of each attempt with those of the next."""
        found: list[list[dict]] = []
        for record in all_records(self.run):
            if record.get("event") in ("start", "resumed") or not found:
                found.append([])
            found[-1].append(record)
        return list(itertools.pairwise(found))


class CalmRuns:
    """Runs that nothing disturbs, to compare with or to start from."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._known: dict[tuple, Path] = {}

    def __call__(self, *flags: str) -> Path:
        """Returns the folder of an undisturbed run with these flags."""
        with self._lock:
            if flags not in self._known:
                trial = Trial("calm", len(self._known), self, self._folder / str(len(self._known)))
                try:
                    trial.ends(trial.start(*flags))
                    trial.kinds()
                finally:
                    trial.close()
                self._known[flags] = trial.run
            return self._known[flags]

    def half(self, trial: Trial, *flags: str) -> list[int]:
        """Makes the trial's run one that stopped at two thirds; returns its checkpoints."""
        shutil.copytree(self(*flags, f"--config.train.stop_at={2 * CHECKPOINT}"), trial.run)
        return complete_steps(trial.run / "checkpoints")


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead may wait for whoever adopted it."""
    return process_state(pid) not in ("", "Z")
