"""One run of `torus launch` on three hosts of a `Net`, what is done to it, and what came of it."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.network.net import PREFIX, Net
from tests.processes import ROOT, environment
from tests.trainer.recovery.runs import SLOW, command
from tests.trainer.test_resume import stored_state
from trainer.goodput import read_incidents
from trainer.metrics import all_records, read_metrics
from trainer.recovery.progress import Progress, ProgressPage

HOSTS, STEPS, CHECKPOINT, SNAPSHOT = 3, 60, 40, 5
STRIKE = 23  # the step of most faults: snapshots are there, a checkpoint is not yet
SILENCE = 32.0  # seconds without a word from a host that waits, at most: 25, and the machine's load
PATIENCE = 420.0
FLAGS = (
    SLOW, f"--config.train.steps={STEPS}", f"--config.checkpoint.every={CHECKPOINT}",
    f"--config.checkpoint.snapshot_every={SNAPSHOT}", "--config.train.batch_size=12",
    "--config.model.width=48",
)  # fmt: skip


class Play:
    """The run of one trial. Everything raised is a failed trial."""

    def __init__(self, net: Net, folder: Path, first: str = f"{PREFIX}0:1") -> None:
        self.net, self.folder, self.run, self.first = net, folder, folder / "run", first
        self.struck = 0.0  # when the fault began, by the monotonic clock
        self.said: dict[int, list[tuple[float, str]]] = {}  # host → when it said what
        self._jobs: dict[int, subprocess.Popen] = {}
        self._flags: tuple[str, ...] = ()
        self._environment: dict[str, str] = {}
        folder.mkdir(parents=True)

    def __enter__(self) -> "Play":
        return self

    def __exit__(self, *_: object) -> None:
        for host in list(self._jobs):
            self.kill(host)

    def start(self, *flags: str, slow: str = "step=0.15", **variables: str) -> None:
        self._flags, self._environment = flags, {"SLOW": slow, **variables}
        for host in range(HOSTS):
            self.start_host(host)

    def start_host(self, host: int, **variables: str) -> None:
        place = self.folder / f"tmp{host}"
        place.mkdir(exist_ok=True)
        own = environment(
            JAX_PROCESS_ID=str(host), JAX_NUM_PROCESSES=str(HOSTS), TMPDIR=str(place),
            JAX_COORDINATOR_ADDRESS=self.first, **self._environment, **variables,
        )  # fmt: skip
        job = self.net.popen(
            host, command(self.run, *FLAGS, *self._flags), env=own, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._jobs[host] = job
        threading.Thread(target=self._listen, args=(host, job), daemon=True).start()

    def _listen(self, host: int, job: subprocess.Popen) -> None:
        with open(self.folder / f"log{host}", "a") as log:
            for line in job.stdout:
                self.said.setdefault(host, []).append((time.monotonic(), line))
                print(f"{time.monotonic():.1f} {line}", end="", file=log, flush=True)

    # ------------------------------------------------------------ what is done

    def strike(self) -> None:
        self.struck = time.monotonic()

    def run_to_fault(self, *flags: str, slow: str = "step=0.15", **variables: str) -> None:
        """Starts all hosts and waits for the step of the fault, which begins now."""
        self.start(*flags, slow=slow, **variables)
        self.at_step(STRIKE)
        self.strike()

    def recovers(self, rank: int, calm: Path, **lost: int) -> None:
        """Kills a trainer; the right one is blamed, and the run ends on the same bits."""
        self.kill_trainer(rank)
        self.ends(0, 0, 0)
        self.blames(rank=rank)
        self.from_memory(**lost)
        self.same_bits(calm)

    def kill(self, host: int) -> None:
        """Ends everything that runs for a host at once, as a power cut does."""
        self._jobs.pop(host)
        spaces = self._pids(host)
        for pid in spaces:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_trainer(self, host: int) -> None:
        trainers = [p for p in self._pids(host) if b"recovery.standby" in self._line(p)]
        os.kill(min(trainers), signal.SIGKILL)

    def cut_folder(self, host: int) -> None:
        """Takes the run's folder away from a host: all its processes see an empty one instead.

        A network file system that waits for its server would stop them instead.
        """
        pid = min(self._pids(host))
        line = ["nsenter", "-t", str(pid), "-m", "mount", "-t", "tmpfs", "none", str(self.run)]
        subprocess.run(line, check=True)

    def mend_folder(self, host: int) -> None:
        pid = min(self._pids(host))
        subprocess.run(["nsenter", "-t", str(pid), "-m", "umount", str(self.run)], check=True)

    def _pids(self, host: int) -> list[int]:
        line = ["ip", "netns", "pids", self.net.space(host)]
        return list(map(int, subprocess.run(line, capture_output=True).stdout.split()))

    def _line(self, pid: int) -> bytes:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        return b""

    # ------------------------------------------------------------ what is seen

    def page(self, rank: int, generation: int) -> Progress | None:
        for path in self.folder.glob(f"tmp*/torus-launch-*/{generation}.{rank}.progress"):
            with contextlib.suppress(OSError, ValueError):  # being made, or going
                if path.stat().st_size and (found := ProgressPage(path).read()).since:
                    return found
        return None

    def until(self, what: Callable[[], Any], why: str, seconds: float = PATIENCE) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, f"waited in vain for {why}"
            assert any(job.poll() is None for job in self._jobs.values()), f"ended before {why}"
            time.sleep(0.05)
        return found

    def at_step(self, step: int, generation: int = 0) -> None:
        self.until(
            lambda: (p := self.page(0, generation)) and p.step >= step,
            f"step {step} of generation {generation}",
        )

    def ends(self, *statuses: int, seconds: float = PATIENCE) -> None:
        """Asserts how the hosts that are there end."""
        deadline = time.monotonic() + seconds
        found = []
        for host, job in sorted(self._jobs.items()):
            try:
                found.append(job.wait(max(1.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"host {host} does not end in {seconds:g} s") from None
        assert found == list(statuses), f"ended with {found}, not {list(statuses)}"

    def incidents(self, *kinds: str) -> list[dict[str, Any]]:
        return [i for i in read_incidents(self.run) if not kinds or i["kind"] in kinds]

    # ------------------------------------------------------------ what must hold

    def never_split(self) -> None:
        """Every host says the same members of a generation, and records are of one run."""
        seen: dict[str, set[str]] = {}
        for host, lines in self.said.items():
            for _, line in lines:
                if match := re.search(r"generation (\d+) begins on hosts ([\d, ]+)", line):
                    seen.setdefault(match[1], set()).add(match[2])
                    assert str(host) in match[2].split(", "), f"host {host} is in {match[2]}"
        assert seen and all(len(members) == 1 for members in seen.values()), f"split: {seen}"
        before = 0
        for line in (self.run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "train":
                assert record["step"] <= before + 1, f"step {record['step']} after {before}"
                before = record["step"]

    def never_silent(self, *hosts: int) -> None:
        """From the fault to the first new step no host that waits is silent for long."""
        back = self._back_at()
        for host in hosts or range(HOSTS):
            times = [at for at, _ in self.said[host] if self.struck <= at <= back]
            times = [self.struck, *times, back]
            longest = max(b - a for a, b in itertools.pairwise(times))
            assert longest <= SILENCE, f"host {host} is silent for {longest:.0f} s"

    def _back_at(self) -> float:
        """When the run had got over the fault; without an incident at once."""
        lines = [(at, line) for lines in self.said.values() for at, line in lines]
        found = [at for at, line in lines if "launch: recovered" in line and at > self.struck]
        return min(found, default=self.struck)

    def blames(self, *, hosts: list[int] | None = None, rank: int | None = None) -> dict[str, Any]:
        """Asserts that the first incident names these, or nobody."""
        first = self.incidents()[0]
        named = {k: first[k] for k in ("hosts", "rank") if k in first}
        right = [{}, {"hosts": hosts} if hosts is not None else {"rank": rank}]
        if hosts is not None:
            right += [{"rank": host} for host in hosts]
        assert named in right, f"blamed: {first}"
        return first

    def from_memory(self, lost: int = SNAPSHOT + 3) -> dict[str, Any]:
        recovered = self.incidents("recovered")[0]
        assert recovered["source"] in ("memory", "peer", "parity"), f"{recovered}"
        assert recovered["lost_steps"] <= lost, f"{recovered}"
        return recovered

    def same_bits(self, calm: Path) -> None:
        assert stored_state(self.run, STEPS) == stored_state(calm, STEPS), "other bits at the end"

    def near(self, calm: Path) -> None:
        """For a run that had fewer hosts: sums in another order, float32, 60 steps."""
        mine, other = (
            {r["step"]: r["loss"] for r in read_metrics(run, "train")} for run in (self.run, calm)
        )
        assert STEPS in mine, "not trained to the end"
        worst = max(abs(mine[s] / other[s] - 1) for s in mine)
        assert worst < 1e-3, f"a loss is off by {worst:.1g}"

    def attempts(self) -> int:
        return sum(record.get("event") in ("start", "resumed") for record in all_records(self.run))


def calm_run(folder: Path) -> Path:
    """Returns an undisturbed run on the same mesh, of three processes on this host."""
    run = folder / "calm"
    line = command(run, *FLAGS, "--processes", str(HOSTS))
    subprocess.run(line, env=environment(SLOW=""), cwd=ROOT, check=True, capture_output=True)
    shutil.rmtree(run / "launch", ignore_errors=True)
    return run
