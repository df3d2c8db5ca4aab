"""Starts the trainers of one host, watches them, and starts them again until the run is done.

A generation is one set of processes, on all its hosts: when one of them fails or hangs, all end,
and the next starts at a new coordinator port, so that nothing left of an old one can join it. What
follows is decided on the host that leads (`hosts.py`), and how many hosts the next has.
Crashes are seen by the exit of a process, hangs by its progress page; both end in one line of
incidents.jsonl and one on the console.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from checkpoint.memory.wire import Directory
from checkpoint.steps import complete_steps, folder_path, is_remote, listing
from sharding.addresses import ADDRESS
from torus import module_command
from trainer.lock import JOB
from trainer.recovery.cluster import VARIABLES
from trainer.recovery.health import SUSPECT
from trainer.recovery.hosts import Hosts, Place
from trainer.recovery.keeper import KeeperProcess
from trainer.recovery.log import SILENCE, Log
from trainer.recovery.policy import (
    COLLATERAL,
    FINISHED,
    LOST,
    NO_PROGRESS,
    PREEMPTED,
    RESIZE,
    RETRY,
    STOPPED,
    UNWRITABLE,
    Budget,
    End,
    PhaseLimits,
    first_cause,
    is_certain,
    permanent,
)
from trainer.recovery.progress import VARIABLE, Progress, ProgressPage, process_state
from trainer.recovery.standby import hand_over

SUSPECTS = "launch/suspects"  # names of hosts to leave out, in the run's folder
_POLL = 0.02  # seconds
_SETTLE = 0.3  # after a first failure, for the others to fail of it
_DUMP = 0.3  # for a hung process to write its stacks
_STATUSES = {signal.SIGINT: 130, signal.SIGTERM: PREEMPTED, signal.SIGUSR2: RESIZE}


@dataclass(frozen=True)
class Options:
    """How a run is supervised.

    Attributes:
      command: arguments of `torus` for one trainer.
      workdir: the run's folder.
      processes: trainers on this host; each gets JAX's variables for a job of so many.
      grace: seconds that trainers get to save and end after a signal.
      limits: seconds a phase may take, where they are not to be learned.
      tries: how many in a row may bring no new checkpoint.
      host, hosts: which this one is, of how many.
      address: of the first host.
      patience: seconds to wait for other hosts, or for a folder that cannot be written.
      lease: seconds without a sign of life after which a host counts as lost.
      sizes: of how many hosts the run may be, and what its trainers are told then in addition.
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
    lease: float = 15.0
    sizes: dict[int, list[str]] = field(default_factory=lambda: {1: []})
    snapshots: bool = False


@dataclass
class _Trainer:
    rank: int
    process: subprocess.Popen
    page: ProgressPage
    output: TextIO | None

    def end(self) -> End:
        status = self.process.poll()
        stopped = status is None and process_state(self.process.pid) == "T"
        return End(self.rank, status, self.page.read(), stopped)


class Supervisor:
    """One host's part of a run, from the first start to the last end."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._limits = PhaseLimits(options.limits)
        self._budget = Budget(options.tries)
        self._signal: signal.Signals | None = None  # that asked this supervisor to stop
        self._resizes = False  # all save, to meet again with more hosts
        self._step = 0  # reached by any trainer here
        self._moved = -1, 0.0  # the slowest trainer's step, and since when
        self._noticed = 0.0  # when this generation was last looked at: when its end was seen
        self._members: list[int] = []  # of the last generation
        self._loaded: dict[int, tuple[subprocess.Popen, TextIO | None]] = {}  # to be trainers
        self._fault: tuple[float, int] | None = None  # when, and the step reached then
        self._passed = -1  # the generation whose first step is known to be done
        self._unjudged: list[End] | None = None  # what failed, for the host that led to judge
        self._log = Log(options.workdir)

    def run(self) -> int:
        """Supervises the run to its end; returns one of the exit statuses of policy.py, or 130."""
        self._budget.best = self._newest()
        before = {number: signal.signal(number, self._remember) for number in _STATUSES}
        try:
            with tempfile.TemporaryDirectory(prefix="torus-launch-") as folder:
                self._meet_in(Path(folder))
                try:
                    with self._keeper:
                        while (status := self._one_generation(Path(folder))) is None:
                            pass
                except OSError as error:  # no process, no memory, no port: perhaps elsewhere
                    self._log.say(f"this host cannot go on: {error}")
                    status = RETRY if self._writable() else UNWRITABLE
                # The others go on without this one, if they may, when only this one must end.
                own = status in (SUSPECT, RETRY, PREEMPTED, 130)
                how = FINISHED if status == FINISHED else STOPPED if self._signal else None
                with contextlib.suppress(OSError):  # then the lease tells them
                    self._hosts.leave(status, how, all_end=not (own and self._hosts.elastic))
                return status
        finally:
            self._unload()
            self._hosts.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        # A person's second Ctrl-C: no more waiting. SLURM sends SIGTERM two or three times.
        if self._signal and number == signal.SIGINT:
            self._options = replace(self._options, grace=0.0)
        self._signal = self._signal or signal.Signals(number)

    def _meet_in(self, folder: Path) -> None:
        """A host that is alone has nobody to tell, and its run's folder may not be made yet."""
        given = self._options
        place = folder if given.hosts == 1 else folder_path(given.workdir) / "launch"
        keepers = Directory(str(place), given.host, given.hosts, given.processes, given.address)
        self._keeper = KeeperProcess(keepers if given.snapshots else None, _die_with_parent)
        self._hosts = Hosts(
            place, given.host, given.hosts, given.address,
            sizes=list(given.sizes), lease=given.lease, patience=given.patience,
            remind=self._log.remind,
        )  # fmt: skip

    def _one_generation(self, folder: Path) -> int | None:
        """Runs trainers until all have ended; returns launch's status, or None to go on."""
        until = time.monotonic() + self._budget.pause
        while time.monotonic() < until and not self._signal:
            self._hosts.beat()
            time.sleep(_POLL)
        generation = self._hosts.generation
        met = self._hosts.meet(lambda: bool(self._signal))
        if self._hosts.generation > generation + 1:  # the others went on without this host
            self._fault = None
        if met is None:
            return self._stopped()
        if isinstance(met, int):
            self._log.say("too few hosts came" if met == LOST else "another host ended the run")
            return met
        if self._unjudged is not None and self._hosts.inherits:
            self._judge(self._unjudged, self._hosts.gone)
        self._unjudged = None
        self._tell_members(met)
        if self._options.hosts > 1:
            members = listing(map(str, self._hosts.members))
            self._log.say(f"generation {self._hosts.generation} begins on hosts {members}")
        trainers = self._start(folder, met)
        try:
            failed = self._watch(trainers)
            if self._signal or self._resizes:
                self._drain(trainers)
        finally:
            self._kill(trainers)
        statuses = {trainer.process.returncode for trainer in trainers}
        if statuses == {FINISHED} and not failed:
            return FINISHED
        if self._signal:
            return self._stopped()
        self._tell_end(failed)
        if STOPPED in statuses or self._resizes:  # for hosts that come, or for one that goes
            self._resizes = False
            self._hosts.gather([], STOPPED)
            return None if self._hosts.elastic else self._stopped()
        failed = self._hosts.gather(failed)
        leads = self._hosts.leads
        status = self._judge(failed, self._hosts.lost()) if leads else None
        if self._fault is None:  # whoever leads next tells what it cost
            self._fault = self._noticed, self._step
        self._unjudged = None if leads else failed
        if any(end.status == SUSPECT for end in failed if end.rank in {t.rank for t in trainers}):
            self._suspect()
            return SUSPECT
        return status

    # ------------------------------------------------------------ processes

    def _start(self, folder: Path, place: Place) -> list[_Trainer]:
        here = self._options.processes
        count, first = here * place.hosts, here * place.rank
        command = [*self._options.command, *self._options.sizes[place.hosts]]
        trainers = []
        self._moved = -1, time.monotonic()
        address = self._hosts.address() if self._options.hosts > 1 else ""
        self._tell_keeper(self._keeper.ensure(address))
        for rank in range(first, first + here):
            path = folder / f"{self._hosts.generation}.{rank}.progress"
            page = ProgressPage(path)
            page.enter("start", 0)
            environment = {VARIABLE: str(path), JOB: self._hosts.job}
            if self._options.hosts in self._options.sizes:
                # Keepers know hosts by their number in the job: of fewer they only give back.
                full = place.hosts == self._options.hosts
                environment |= self._keeper.environment(takes=full)
            if count > 1:
                environment |= {
                    ADDRESS: address,
                    "JAX_COORDINATOR_ADDRESS": place.coordinator,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(rank),
                }
            process, output = self._loaded.pop(rank, None) or self._load(rank, first)
            try:
                hand_over(process.stdin, command, environment)
            except BrokenPipeError:  # it was killed while it waited
                process.wait()
                process, output = self._load(rank, first)
                hand_over(process.stdin, command, environment)
            trainers.append(_Trainer(rank, process, page, output))
        self._unload()
        return trainers

    def _load(self, rank: int, first: int) -> tuple[subprocess.Popen, TextIO | None]:
        """Starts a process that can become the trainer of `rank`."""
        # What the others say is kept for the stacks of a hang; the first speaks for all.
        output = None if rank == first else self._rank_log(rank)
        environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        process = subprocess.Popen(
            module_command("trainer.recovery.standby"), env=environment,
            stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
        return process, output

    def _unload(self) -> None:
        """Ends the processes that wait to become trainers."""
        for process, output in self._loaded.values():
            process.kill()
            process.wait()
            process.stdin.close()
            if output is not None:
                output.close()
        self._loaded = {}

    def _rank_log(self, rank: int) -> TextIO:
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
            self._noticed = time.monotonic()
            if any(end.status for end in ends):
                self._wait(trainers, _SETTLE)
                return [end for end in (t.end() for t in trainers) if end.status]
            if all(end.status == 0 for end in ends):
                return []
            if self._hosts.over():
                if self._hosts.over_well():
                    self._wait(trainers)
                return []
            self._step = max(end.progress.step for end in ends)
            fastest = max((end.progress for end in ends), key=lambda p: p.step)
            self._recovered(fastest)
            settled = self._step > max(0, self._budget.best, fastest.start)
            if settled and not self._loaded:  # the machine is busy with the start until then
                first = trainers[0].rank
                self._loaded = {t.rank: self._load(t.rank, first) for t in trainers}
            if self._hosts.drains(settled=settled):
                self._resizes = True
                return []
            now = time.monotonic()
            running = [end for end in ends if end.status is None]
            for end in running:
                self._limits.learn(seen[end.rank], end.progress)
                seen[end.rank] = end.progress
            self._tell_keeper(self._keeper.ensure())
            # The others wait for the one that did least, however long that may rightly take.
            slowest = first_cause(running)
            self._hosts.beat(slowest.progress)
            self._tell_waiting(slowest, now)
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
        why = self._signal.name if self._signal else "more hosts are there"
        self._log.say(f"{why}: saving, for at most {self._options.grace:g} s")
        for trainer in trainers:
            with contextlib.suppress(ProcessLookupError):
                trainer.process.send_signal(signal.SIGTERM)
        self._wait(trainers)
        self._step = max(self._step, *(trainer.page.read().step for trainer in trainers))

    def _wait(self, trainers: list[_Trainer], seconds: float | None = None) -> None:
        """Waits for all to end, so long or for the grace, which a second signal makes nothing."""
        began = time.monotonic()
        while any(t.process.poll() is None for t in trainers):
            if time.monotonic() - began > (self._options.grace if seconds is None else seconds):
                return
            self._hosts.beat()  # saving may take longer than a lease
            if (took := time.monotonic() - began) > SILENCE:
                self._log.remind(f"the trainers have been ending for {took:.0f} s")
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

    def _judge(self, failed: list[End], lost: list[int]) -> int | None:
        newest = self._newest()
        found = max((end.progress.start for end in failed), default=0)  # perhaps in memory
        goes_on = self._budget.spend(max(newest, found or newest))
        cause = first_cause(failed) if failed else None
        if cause is None or (lost and cause.status in (None, *COLLATERAL)):
            cut = bool(lost) and set(lost) <= set(self._hosts.cut_off(self._options.lease / 2))
            why = "no network connection" if cut else None
            status, facts = None, {"kind": "host lost", "hosts": lost or None, "cause": why}
        else:
            status = permanent(cause)
            if cause.status == SUSPECT and not self._hosts.elastic:
                status = SUSPECT
            known = is_certain(failed)
            facts = {
                "kind": "hang" if cause.status is None else "crash",
                "rank": cause.rank if known else None, "phase": cause.progress.phase,
                "cause": cause.text if known else f"{cause.text}, not known on which rank",
            }  # fmt: skip
        if status is None and not goes_on:
            status = NO_PROGRESS
        if status is None and not self._writable():
            status = UNWRITABLE
        step = cause.progress.step if cause else self._step
        if self._fault is None:  # a fault before the last one was got over counts from the first
            self._fault = self._noticed, step
        ending = round(time.monotonic() - self._noticed, 2)  # seconds, up to this decision
        self._record(**facts, step=step, checkpoint=newest, ending=ending, exit=status)
        if status == NO_PROGRESS:
            tries = f"{self._options.tries} tries in a row"
            self._log.say(f"{tries} brought no new checkpoint; giving up")
        return status

    def _writable(self) -> bool:
        """Whether the run's folder can be written, at the latest when patience is over."""
        folder = folder_path(self._options.workdir)
        until, told = time.monotonic() + self._options.patience, False
        while not self._signal:
            try:
                if folder.exists():
                    (folder / ".launch").write_bytes(bytes(4096))
                    (folder / ".launch").unlink()
                return True
            except OSError as error:
                wait = f"waiting for at most {self._options.patience:g} s"
                text = f"{self._options.workdir} cannot be written: {error}; {wait}"
                (self._log.remind if told else self._log.say)(text)
                told = True
                if time.monotonic() > until:
                    return False
                self._hosts.beat()
                time.sleep(0.5)
        return True

    def _suspect(self) -> None:
        """Leaves this host's name for a scheduler that can leave the host out."""
        path = folder_path(self._options.workdir) / SUSPECTS
        names = path.read_text().split() if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(dict.fromkeys([*names, socket.gethostname()])) + "\n")

    def _tell_members(self, place: Place) -> None:
        """Records a change of hosts, on the lowest that was there before and is there now."""
        now, before = self._hosts.members, self._members or self._hosts.members
        self._members = now
        if now != before and self._options.host == min(set(now) & set(before)):
            lost, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
            self._record("resized", hosts=place.hosts, lost=lost or None, new=new or None)

    def _recovered(self, now: Progress) -> None:
        """Records what the last fault cost, once the run has passed a first step again."""
        if self._passed == self._hosts.generation or not now.source or now.step <= now.start:
            return
        self._passed = self._hosts.generation
        fault, self._fault = self._fault, None
        if not self._hosts.leads:
            return
        if fault is None and self._options.hosts > 1:
            fault = self._log.open_fault()  # of before this supervisor was started
        if fault is not None:
            self._record(
                "recovered", step=now.step, seconds=round(time.monotonic() - fault[0], 2),
                source=now.source, restored=now.start, lost_steps=max(0, fault[1] - now.start),
            )  # fmt: skip

    def _stopped(self) -> int:
        cause = self._signal.name if self._signal else "another host"
        newest = self._newest()
        lost = max(0, self._step - max(newest, 0))  # could not be saved within the grace
        self._record("stopped", cause=cause, checkpoint=newest, lost_steps=lost or None)
        return _STATUSES[self._signal] if self._signal else PREEMPTED

    def _newest(self) -> int:
        return max(complete_steps(folder_path(self._options.workdir) / "checkpoints"), default=-1)

    def _record(self, kind: str, **facts: Any) -> None:
        self._log.record(kind, self._hosts.generation, **facts)

    def _tell_end(self, failed: list[End]) -> None:
        """Says, on every host, that the generation is over and what is known of it here."""
        if any(end.status is None for end in failed) or not failed:
            self._limits.widen()
        if self._options.hosts == 1 or self._resizes:
            return
        generation = self._hosts.generation
        if failed:
            cause = first_cause(failed)
            why = f"rank {cause.rank} {cause.text} in {cause.progress.phase}"
        elif not self._hosts.current:
            why = "the others gave this host up"
        elif lost := self._hosts.lost():
            why = f"lost host {listing(map(str, lost))}"
        else:
            why = "another host ended it"
        self._log.say(f"generation {generation} is over: {why}")

    def _tell_waiting(self, slowest: End, now: float) -> None:
        """Says what all wait for while no step is done, for longer than is usual."""
        phase, took = slowest.progress.phase, now - slowest.progress.since
        if self._moved[0] != slowest.progress.step > slowest.progress.start:
            self._moved = slowest.progress.step, now
        if now - self._moved[1] > SILENCE and self._limits.unusual(phase, took):
            limit = self._limits.of(phase)
            self._log.remind(f"rank {slowest.rank} is in {phase}, {took:.0f} s of {limit:.0f}")

    def _tell_keeper(self, kind: str) -> None:
        if kind == "no snapshots":
            self._record(kind, cause="the keeper ends as soon as it is started")
        elif kind:
            self._record(kind)


def _die_with_parent() -> None:
    """Run in a new trainer: it must not outlive its supervisor, whatever ends that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
