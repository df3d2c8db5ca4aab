"""Starts the trainers of one host, watches them, and starts them again until the run is done.

A generation is one set of processes, on all hosts: when one of them fails or hangs, all end, and
the next starts at a new coordinator port, so that nothing left of an old one can join it. What
follows is decided on the first host (`hosts.py`).
Crashes are seen by the exit of a process, hangs by its progress page; both end in one line of
incidents.jsonl and one on the console.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from checkpoint.memory.wire import Directory
from checkpoint.steps import complete_steps, folder_path, is_remote
from trainer.recovery.hosts import Hosts
from trainer.recovery.keeper import KeeperProcess
from trainer.recovery.policy import (
    FINISHED,
    LOST,
    NO_PROGRESS,
    PREEMPTED,
    STOPPED,
    Budget,
    End,
    PhaseLimits,
    first_cause,
    permanent,
)
from trainer.recovery.progress import VARIABLE, Progress, ProgressPage

INCIDENTS = "incidents.jsonl"
_POLL = 0.02  # seconds
_SETTLE = 0.3  # after a first failure, for the others to fail of it
_DUMP = 0.3  # for a hung process to write its stacks


@dataclass(frozen=True)
class Options:
    """How a run is supervised.

    Attributes:
      command: arguments of one trainer.
      workdir: the run's folder.
      processes: trainers on this host; each gets JAX's variables for a job of so many.
      grace: seconds that trainers get to save and end after a signal.
      limits: seconds a phase may take, where they are not to be learned.
      tries: how many in a row may bring no new checkpoint.
      host, hosts: which this one is, of how many.
      address: of the first host.
      patience: seconds to wait for the other hosts.
      snapshots: keep the trainers' snapshots in memory.
    """

    command: list[str]
    workdir: str
    processes: int = 1
    grace: float = 60.0
    limits: dict[str, float] | None = None
    tries: int = 3
    host: int = 0
    hosts: int = 1
    address: str = "127.0.0.1"
    patience: float = 600.0
    snapshots: bool = False


@dataclass
class _Trainer:
    rank: int
    process: subprocess.Popen
    page: ProgressPage
    output: TextIO | None

    def end(self) -> End:
        return End(self.rank, self.process.poll(), self.page.read())


class Supervisor:
    """One host's part of a run, from the first start to the last end."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._limits = PhaseLimits(options.limits)
        self._budget = Budget(options.tries)
        self._signal = ""  # that asked this supervisor to stop
        self._fault: tuple[float, int] | None = None  # when, and the step reached then
        self._reached = 0

    def run(self) -> int:
        """Supervises the run to its end; returns one of the exit statuses of policy.py, or 130."""
        self._budget.best = self._newest()
        before = {n: signal.signal(n, self._remember) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tempfile.TemporaryDirectory(prefix="torus-launch-") as folder:
                self._meet_in(Path(folder))
                with self._keeper:
                    while (status := self._one_generation(Path(folder))) is None:
                        pass
                self._hosts.conclude(status)
                return status
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        if self._signal:  # a second one: no more waiting
            self._options = replace(self._options, grace=0.0)
        self._signal = signal.Signals(number).name

    def _meet_in(self, folder: Path) -> None:
        """A host that is alone has nobody to tell, and its run's folder may not be made yet."""
        given = self._options
        remote = is_remote(given.workdir)
        place = folder if given.hosts == 1 else folder_path(given.workdir) / "launch"
        keepers = Directory(str(place), given.host, given.hosts, given.processes, given.address)
        self._keeper = KeeperProcess(keepers if given.snapshots else None, _die_with_parent)
        self._hosts = Hosts(
            place, given.host, given.hosts, given.address,
            every=5.0 if remote else 1.0, patience=given.patience,
        )  # fmt: skip

    def _one_generation(self, folder: Path) -> int | None:
        """Runs trainers until all have ended; returns launch's status, or None to go on."""
        until = time.monotonic() + self._budget.pause
        while time.monotonic() < until and not self._signal:
            self._hosts.beat()
            time.sleep(_POLL)
        met = self._hosts.meet(lambda: bool(self._signal))
        if met is None:
            return self._stopped()
        if isinstance(met, int):
            self._say("other hosts did not come" if met == LOST else "the first host ended the run")
            return met
        trainers = self._start(folder, met)
        try:
            failed = self._watch(trainers)
            if self._signal:
                self._drain(trainers)
        finally:
            self._kill(trainers)
        statuses = {trainer.process.returncode for trainer in trainers}
        if statuses == {FINISHED} and not failed:
            return FINISHED
        if self._signal or STOPPED in statuses:  # by a signal to another host, perhaps
            return self._stopped()
        failed = self._hosts.gather(failed)
        return self._judge(failed) if self._options.host == 0 else None

    # ------------------------------------------------------------ processes

    def _start(self, folder: Path, coordinator: str) -> list[_Trainer]:
        here = self._options.processes
        count, first = here * self._options.hosts, here * self._options.host
        trainers = []
        self._keeper.ensure()
        for rank in range(first, first + here):
            path = folder / f"{self._hosts.generation}.{rank}.progress"
            page = ProgressPage(path)
            page.enter("start", 0)
            environment = {**os.environ, VARIABLE: str(path), **self._keeper.environment}
            if count > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": coordinator,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(rank),
                }
            # What the others say is kept for the stacks of a hang; the first speaks for all.
            output = None if rank == first else self._log(rank)
            process = subprocess.Popen(
                self._options.command, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
            trainers.append(_Trainer(rank, process, page, output))
        return trainers

    def _log(self, rank: int) -> TextIO:
        workdir = self._options.workdir
        place = Path(tempfile.gettempdir()) if is_remote(workdir) else folder_path(workdir)
        (place / "launch").mkdir(parents=True, exist_ok=True)
        return open(place / "launch" / f"rank{rank}.log", "a")

    def _watch(self, trainers: list[_Trainer]) -> list[End]:
        """Waits for all to finish, for a signal, or for a failure; returns what failed."""
        seen = {t.rank: t.page.read() for t in trainers}
        while not self._signal:
            ends = [trainer.end() for trainer in trainers]
            if any(end.status == STOPPED for end in ends):  # all of the job are saving
                self._wait(trainers)
                return []
            if any(end.status for end in ends):
                time.sleep(_SETTLE)
                return [end for end in (t.end() for t in trainers) if end.status]
            if all(end.status == 0 for end in ends) or self._hosts.others_ended():
                return []
            now = time.monotonic()
            running = [end for end in ends if end.status is None]
            for end in running:
                self._limits.learn(seen[end.rank], end.progress)
                seen[end.rank] = end.progress
            if self._keeper.ensure():
                self._record("keeper lost")
            self._recovered(max((end.progress for end in ends), key=lambda p: p.step))
            # The others wait for the one that did least, however long that may rightly take.
            slowest = first_cause(running)
            self._hosts.beat(slowest.progress)
            late = now - slowest.progress.since > self._limits.of(slowest.progress.phase)
            if late and not self._hosts.waits_for(slowest.progress):
                self._dump(trainers)
                return running
            time.sleep(_POLL)
        return []

    def _dump(self, trainers: list[_Trainer]) -> None:
        """Makes every process write its stacks; one that is frozen cannot."""
        for trainer in trainers:
            with contextlib.suppress(ProcessLookupError):
                trainer.process.send_signal(signal.SIGUSR1)
        time.sleep(_DUMP)

    def _drain(self, trainers: list[_Trainer]) -> None:
        """Passes the signal on and waits for the trainers to save and end."""
        self._say(f"{self._signal}: saving, for at most {self._options.grace:g} s")
        for trainer in trainers:
            with contextlib.suppress(ProcessLookupError):
                trainer.process.send_signal(signal.SIGTERM)
        self._wait(trainers)

    def _wait(self, trainers: list[_Trainer]) -> None:
        began = time.monotonic()
        while any(t.process.poll() is None for t in trainers):
            if time.monotonic() - began > self._options.grace:
                return
            time.sleep(_POLL)

    def _kill(self, trainers: list[_Trainer]) -> None:
        for trainer in trainers:
            if trainer.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(trainer.process.pid, signal.SIGKILL)
            trainer.process.wait()
            if trainer.output is not None:
                trainer.output.close()

    # ------------------------------------------------------------ verdicts

    def _judge(self, failed: list[End]) -> int | None:
        newest = self._newest()
        if not failed:  # a host was lost, or its supervisor started anew
            self._record("host lost", checkpoint=newest)
            self._fault = self._fault or (time.monotonic(), self._reached)
            return None if self._budget.spend(newest) else NO_PROGRESS
        cause = first_cause(failed)
        status = permanent(cause)
        reached = max(end.progress.start for end in failed)  # perhaps in memory
        goes_on = self._budget.spend(max(newest, reached) if reached else newest)
        if status is None and not goes_on:
            status = NO_PROGRESS
        if self._fault is None:  # a fault before the last one was got over counts from the first
            self._fault = time.monotonic(), cause.progress.step
        self._record(
            "hang" if cause.status is None else "crash",
            rank=cause.rank, phase=cause.progress.phase, step=cause.progress.step,
            cause=cause.text, checkpoint=newest, exit=status,
        )  # fmt: skip
        if status == NO_PROGRESS:
            self._say(f"{self._options.tries} tries in a row brought no new checkpoint; giving up")
        return status

    def _recovered(self, now: Progress) -> None:
        """Records what the last fault cost, once the run has passed a first step again."""
        self._reached = now.step
        if self._fault is None or not now.source or now.step <= now.start:
            return
        seconds, reached = time.monotonic() - self._fault[0], self._fault[1]
        self._record(
            "recovered", step=now.step, seconds=round(seconds, 2), source=now.source,
            restored=now.start, lost_steps=max(0, reached - now.start),
        )  # fmt: skip
        self._fault = None

    def _stopped(self) -> int:
        self._record("stopped", cause=self._signal or "another host", checkpoint=self._newest())
        return 130 if self._signal == "SIGINT" else PREEMPTED

    def _newest(self) -> int:
        return max(complete_steps(folder_path(self._options.workdir) / "checkpoints"), default=-1)

    def _record(self, kind: str, **facts: Any) -> None:
        known = {name: value for name, value in facts.items() if value is not None}
        line = {"time": round(time.time(), 3), "generation": self._hosts.generation, "kind": kind}
        self._say(f"{kind}  " + "  ".join(f"{name} {value}" for name, value in known.items()))
        folder = folder_path(self._options.workdir)
        if not folder.is_dir():
            return  # refused before anything was written
        text = json.dumps(line | known) + "\n"
        path = folder / INCIDENTS
        if is_remote(self._options.workdir):  # nothing can be appended there
            path.write_text((path.read_text() if path.exists() else "") + text)
            return
        with open(path, "a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _say(self, text: str) -> None:
        print(f"launch: {text}", file=sys.stderr, flush=True)


def _die_with_parent() -> None:
    """Run in a new trainer: it must not outlive its supervisor, whatever ends that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
