"""How the supervisors of several hosts agree: through the folder that their run shares anyway.

Each host writes one file, its own: a beat that says it lives, how far its slowest trainer is, the
generation that it is through with, and how its trainers ended. The lowest of those that live reads
all of them and writes the plan: which hosts the next generation has and where its coordinator
listens, or how the run ended. So any host may go; the next one leads, and one that is not in the
plan waits as a spare. A plan has as many hosts as reach each other over the network (`reach.py`),
which is not the way to the folder. It names the supervisors that it is for by tokens of theirs, so
that what an earlier attempt left behind binds nobody, and whoever finds another plan than the one
it started with ends its trainers. Ages are measured by each host's own monotonic clock, between
changes that it has seen.
"""

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from checkpoint.steps import listing, write_whole
from sharding.addresses import is_loopback, join_port, own_address
from trainer.recovery.policy import FINISHED, LOST, STOPPED, End, choose_hosts
from trainer.recovery.progress import Progress
from trainer.recovery.reach import Reach, connected

BEATS = 15  # within a lease: that many may be missing before a host counts as lost
_TRIES = 5  # within a lease: of reaching each other host
_SILENCE, _SPARE = 25.0, 600.0  # seconds between words of one that waits, and of a spare
_SETTLED = 0.6  # of a lease: three tries, after which who reaches whom is known
_PLAN = "plan.json"


@dataclass
class _Seen:
    """What one host's file said last, and when it last changed."""

    facts: dict[str, Any] = field(default_factory=dict)
    at: float = -float("inf")
    changes: int = 0


@dataclass(frozen=True)
class Place:
    """One host's part in a generation: `rank` of `hosts`, joined at the address `coordinator`."""

    coordinator: str
    rank: int
    hosts: int


class Hosts:
    """One host's view of all of them."""

    def __init__(
        self, folder: Path, index: int, count: int, address: str, *,
        sizes: Sequence[int], lease: float, patience: float,
        remind: Callable[[str, float], None] = lambda text, every: None,
    ) -> None:  # fmt: skip
        """Prepares files in `folder`, and tries to reach the other hosts from now on.

        Args:
          address: of the first host.
          sizes: of how many hosts a generation may be.
          lease: seconds without a beat after which a host counts as lost.
          patience: seconds to wait for enough hosts.
          remind: told all the time what is waited for, to be said every so many seconds.
        """
        self.index, self.generation, self.members = index, -1, [index]
        self._count, self._sizes = count, sorted(sizes, reverse=True)
        self._folder, self._first = folder, address
        self._lease, self._patience, self._remind = lease, patience, remind
        self._reach = Reach(lease / _TRIES) if count > 1 else None
        self._since = 0.0  # when this host last began to meet the others
        self._written = 0.0  # since when the folder cannot be written, 0 if it can
        self._linked = False  # all members of this generation have reached each other
        self._token = secrets.token_hex(8)
        self._own: dict[str, Any] = {
            "index": index, "token": self._token, "beat": 0, "through": -1, "ends": [],
            "port": self._reach.port if self._reach else 0,
        }  # fmt: skip
        self._seen = [_Seen() for _ in range(count)]
        self._plan: dict[str, Any] = {}
        self._joined: dict[str, str] = {}  # tokens of the generation that this host joined last
        self._coordinator = ""
        self.gone: list[int] = []  # members of the generation before that did not come again
        self.inherits = False  # the one that led it is among them, and this host is the next
        self._next = self._looked = 0.0
        self._ready_before: tuple[list[int], float] = [], 0.0  # who was ready, since when

    def close(self) -> None:
        """Stops trying to reach the others."""
        if self._reach:
            self._reach.close()

    @property
    def current(self) -> bool:
        """Whether the plan is still the one that this host joined; else it was given up."""
        plan = self._plan
        return (
            plan.get("coordinator") == self._coordinator
            or plan.get("generation", -1) < self.generation  # an old view through a cache
        )

    @property
    def job(self) -> str:
        """The name of the job that the plan belongs to, for the lock of the run's folder."""
        return self._plan.get("job", "")

    @property
    def leads(self) -> bool:
        """Whether this host is the lowest of its generation that lives.

        Not so when another led because this one was silent, and has gathered all ends already.
        """
        judged = (self._seen[n].facts.get("judged", -1) for n in self._peers() if self._stays(n))
        return (
            self.current
            and self.generation not in judged
            and not any(self._stays(n) for n in self.members if n < self.index)
        )

    @property
    def elastic(self) -> bool:
        """Whether the run may go on with other hosts than these."""
        return len(self._sizes) > 1 or self._count > self._sizes[0]

    def meet(self, stop: Callable[[], bool]) -> Place | int | None:
        """Waits for the next generation and returns this host's place, or a status to end with.

        None is for `stop`, asked all the time; LOST when too few hosts came within patience.
        """
        with contextlib.suppress(OSError):  # it is away, and may come back
            self._folder.mkdir(parents=True, exist_ok=True)
        self._own["through"] = self.generation
        self._next, since = 0.0, time.monotonic()
        self._prepare(since)
        while not stop():
            self.beat()
            self._next = min(self._next, time.monotonic() + self._lease / BEATS / 3)
            plan, waited = self._plan, time.monotonic() - since
            if time.monotonic() - self._since > _SETTLED * self._lease:
                self._tell_waiting(plan, waited)
            if self._named(self.index, plan):
                if "status" in plan:
                    return plan["status"]
                if self.index in plan["members"] and plan["generation"] > self._own["through"]:
                    return self._join(plan)
            if any(self._busy(n, plan) for n in self._others()):
                since = time.monotonic()  # the others are at work: this one is a spare
                self._ready_before = [], since
            elif not any(self._alive(n) for n in range(self.index)):
                self._lead(plan, waited)
                if waited > self._patience and self._plan is plan:
                    return LOST
            elif waited > self._patience + 2 * self._lease:
                return LOST
            time.sleep(min(0.05, self._lease / BEATS))
        return None

    def beat(self, slowest: Progress | None = None) -> None:
        """Says that this host lives and looks at the others: every so often, when called more."""
        if slowest is not None:
            self._own["slowest"] = [slowest.step, slowest.changes]
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._lease / BEATS
            self._own["beat"] += 1
            if self._reach:
                self._own["reached"] = self._reach.ages()
                self._own["meets"] = round(time.monotonic() - self._since, 1)
                self._own["linked"] = self._own.get("linked") or bool(self._own["reached"])
            self._write(f"host{self.index}.json", self._own)
            self._look()
            self._linked |= len(self._connected(self.members, self._lease)) == len(self.members)

    def over(self) -> bool:
        """Whether this generation has ended elsewhere: a host is through, anew, gone or lost.

        Also when another plan stands: this host was given up, as one that was frozen may be.
        """
        return (
            not self.current
            or any(not self._alive(n) or self._through(n) for n in self._peers())
            or bool(self.cut_off(self._lease))
        )

    def cut_off(self, within: float) -> list[int]:
        """Returns the members without a way over the network to most others for so many seconds.

        None where the members did not all reach each other before: then nothing is known.
        """
        if not self._linked:
            return []
        there = [n for n in self.members if n == self.index or self._stays(n)]
        return sorted(set(there) - set(self._connected(there, within)))

    def over_well(self) -> bool:
        """Whether the others' trainers ended by themselves, so that this host's soon will."""
        hows = {self._seen[n].facts.get("how") for n in self._peers() if self._through(n)}
        return bool(hows & {FINISHED, STOPPED})

    def drains(self, *, settled: bool) -> bool:
        """Whether all should save and meet again, because there are hosts for a larger mesh.

        The host that leads finds it out, once the run is `settled`, and writes it for the others.
        """
        plan = self._plan
        if settled and self.elastic and "drain" not in plan and self.leads and not self.over():
            spare = [n for n in self._others() if n not in self.members and self._ready(n, plan)]
            together = self._connected([*self.members, *spare], self._lease)
            more = choose_hosts(self._sizes, len(together))
            if more is not None and more > len(self.members):
                self._put({**plan, "drain": True})
        return "drain" in self._plan and self._plan["coordinator"] == self._coordinator

    def waits_for(self, slowest: Progress) -> bool:
        """Whether a trainer on another host has done less than `slowest`, so that it waits."""
        told = [self._seen[n].facts.get("slowest") for n in self._peers()]
        return any(them is not None and them < [slowest.step, slowest.changes] for them in told)

    def gather(self, ends: list[End], how: int | None = None) -> list[End]:
        """Tells how this host's trainers ended; the one that leads waits for all, and returns all.

        `how` is FINISHED or STOPPED if they ended by themselves.
        """
        self._own["ends"] = [
            [e.rank, e.status, e.stopped, e.progress.phase, e.progress.step, e.progress.changes]
            for e in ends
        ]
        self._own["how"] = how
        until = time.monotonic() + self._lease
        if not self.leads:
            self._own["through"] = self.generation
        self._next = 0.0
        while self.leads and time.monotonic() < until:
            if all(self._through(n) or not self._alive(n) for n in self._peers()):
                break
            self.beat()
            time.sleep(min(0.05, self._lease / BEATS))
        if self.leads:
            self._own["judged"] = self.generation
        self._next = 0.0
        self.beat()
        found = list(ends)
        for facts in (self._seen[n].facts for n in self._peers() if self._through(n)):
            if facts["token"] == self._plan.get("tokens", {}).get(str(facts["index"])):
                found += [
                    End(rank, status, Progress(phase, step, 0.0, changes), stopped)
                    for rank, status, stopped, phase, step, changes in facts["ends"]
                ]
        return found

    def lost(self) -> list[int]:
        """Returns the members of this generation that no longer live, also if they are back.

        And those whose network is dead, perhaps this host: half a lease shows that.
        """
        gone = {n for n in self._peers() if not self._stays(n)}
        return sorted(gone | set(self.cut_off(self._lease / 2)))

    def address(self) -> str:
        """Returns where the other hosts reach this one: by the way that leads to them.

        The first host's name may mean to itself that it is this machine, as 127.0.1.1 does on
        Debian; then the way to any other host tells. "" if nothing is known.
        """
        found = ""
        for near in (self._first, *(seen.facts.get("address") for seen in self._seen)):
            with contextlib.suppress(OSError):  # not known, or no way there: perhaps the next is
                if near and not is_loopback(found := own_address(near)):
                    break
        return found

    def leave(self, status: int, how: int | None, *, all_end: bool) -> None:
        """Takes leave; with `all_end` the others learn that the run ended with `status`.

        `how` is as in `gather`.
        """
        self._own |= {"gone": True, "through": self.generation, "how": how}
        if self._folder.is_dir():
            self._look()
            if all_end and self.leads and self._coordinator:
                self._put({**self._plan, "tokens": self._tokens(range(self._count)),
                           "status": status})  # fmt: skip
            self._next = 0.0
            self.beat()

    # ------------------------------------------------------------ the plan

    def _lead(self, plan: dict[str, Any], waited: float) -> None:
        """Writes the next generation's plan once the hosts for it are there."""
        ready = [n for n in range(self._count) if self._ready(n, plan)]
        together, settled = self._together(ready)
        hosts = choose_hosts(self._sizes, len(together))
        if hosts is None:
            return
        coming = any(self._alive(n) and n not in ready for n in self._others())
        coming |= len(together) < len(ready) and not settled
        told = (self._own if n == self.index else self._seen[n].facts for n in ready)
        begun = any(facts["through"] >= 0 for facts in told)  # with some of these hosts
        hoped = not begun and waited <= self._patience  # that all come for the first generation
        if hosts == self._sizes[0] or not (coming or hoped):
            members = together[:hosts]
            first = self._seen[members[0]].facts if members[0] != self.index else self._own
            # While one supervisor stays it is the same job, which holds the lock of the run.
            job = plan.get("job") if any(self._named(n, plan) for n in ready) else None
            self._put({
                "generation": max(plan.get("generation", -1), self.generation) + 1,
                "job": job or secrets.token_hex(8),
                "coordinator": first["coordinator"],
                "members": members,
                "tokens": self._tokens(members),
            })  # fmt: skip

    def _join(self, plan: dict[str, Any]) -> Place:
        before, now = self._joined, plan["tokens"]
        stayed = [n for n in self.members if now.get(str(n)) == before.get(str(n))]
        self.gone = sorted(set(self.members) - set(stayed))
        led = self._seen[self.members[0]].facts
        judged = led.get("judged", -1) >= self.generation  # before it was left out
        self.inherits = self.members[0] in self.gone and stayed[:1] == [self.index] and not judged
        self._joined = now
        self.generation, self.members = plan["generation"], plan["members"]
        self._coordinator = plan["coordinator"]
        self._linked = False
        self._own |= {"ends": [], "how": None, "slowest": None}
        return Place(self._coordinator, self.members.index(self.index), len(self.members))

    def _prepare(self, now: float) -> None:
        """Says where this host can be reached and a coordinator may listen; tries the others."""
        address = self._first if self.index == 0 else self.address() or socket.gethostname()
        self._own |= {"address": address, "coordinator": join_port(address, _free_port())}
        self._since, self._ready_before = now, ([], now)
        if self._reach:
            self._reach.hurry()

    def _together(self, ready: list[int]) -> tuple[list[int], bool]:
        """Returns those of the hosts that reach each other, and whether that will not change.

        Where none ever reached another, the way to the launchers' ports is closed: all count then.
        """
        now = time.monotonic()
        if ready != self._ready_before[0]:
            self._ready_before = ready, now
        settled = now - self._ready_before[1] > _SETTLED * self._lease
        facts = [self._facts(n) for n in ready]
        # What was reached before they met says nothing of what ended the last generation.
        found = self._connected(ready, min(self._lease, *(f.get("meets", 0.0) for f in facts)))
        if settled and len(ready) > 1 and not any(f.get("linked") for f in facts):
            return ready, True
        return found, settled

    def _connected(self, hosts: Sequence[int], within: float) -> list[int]:
        links = {n: self._facts(n).get("reached") or {} for n in hosts}
        known = {n: {int(host): age for host, age in to.items()} for n, to in links.items()}
        return connected(hosts, known, within)

    def _facts(self, number: int) -> dict[str, Any]:
        return self._own if number == self.index else self._seen[number].facts

    def _tell_waiting(self, plan: dict[str, Any], waited: float) -> None:
        """Says what this host waits for; a spare says so rarely."""
        until = f"{waited:.0f} s of {self._patience:g}"
        if any(self._busy(n, plan) for n in self._others()):
            text = "the other hosts train; this one waits until it is needed"
            return self._remind(text, _SPARE)
        missing = [n for n in self._others() if not self._ready(n, plan)]
        ready = [n for n in range(self._count) if n not in missing]
        apart = sorted(set(ready) - set(self._connected(ready, self._lease)))
        if missing:
            text = f"waiting for host {listing(map(str, missing))} to join"
        elif apart:
            text = f"waiting for host {listing(map(str, apart))}, which the others do not reach"
        else:
            text = f"waiting for host {min(ready)} to begin"
        self._remind(f"{text}, {until}", _SILENCE)

    def _tokens(self, numbers: Sequence[int]) -> dict[str, str]:
        facts = {n: self._own if n == self.index else self._seen[n].facts for n in numbers}
        return {str(n): told["token"] for n, told in facts.items() if told}

    # ------------------------------------------------------------ the other hosts

    def _others(self) -> list[int]:
        return [n for n in range(self._count) if n != self.index]

    def _peers(self) -> list[int]:
        return [n for n in self.members if n != self.index]

    def _alive(self, number: int) -> bool:
        seen = self._seen[number]
        # As of the last look: after a time without any, all would seem to have been silent.
        return self._looked - seen.at <= self._lease and not seen.facts.get("gone")

    def _stays(self, number: int) -> bool:
        """Whether the supervisor that joined this generation lives, not one that took its place."""
        return self._alive(number) and self._named(number, self._plan)

    def _named(self, number: int, plan: dict[str, Any]) -> bool:
        facts = self._own if number == self.index else self._seen[number].facts
        return bool(facts) and plan.get("tokens", {}).get(str(number)) == facts["token"]

    def _busy(self, number: int, plan: dict[str, Any]) -> bool:
        """Whether a host lives and is at work in the generation of `plan`."""
        return (
            self._alive(number) and self._named(number, plan) and "status" not in plan
            and self._seen[number].facts["through"] < plan["generation"]
        )  # fmt: skip

    def _ready(self, number: int, plan: dict[str, Any]) -> bool:
        """Whether a host lives and waits for the next generation."""
        if number == self.index:
            return True
        enough = self._seen[number].changes >= 2  # a file of the past does not change
        return enough and self._alive(number) and not self._busy(number, plan)

    def _through(self, number: int) -> bool:
        facts = self._seen[number].facts
        return bool(facts) and (
            facts["through"] >= self.generation or not self._named(number, self._plan)
        )

    # ------------------------------------------------------------ files

    def _look(self) -> None:
        self._looked = time.monotonic()
        for number in self._others():
            facts, seen = self._read(f"host{number}.json"), self._seen[number]
            if facts and facts != seen.facts:
                # One that is known by its file alone may be of the past: it lives when it changes.
                self._seen[number] = _Seen(facts, self._looked, seen.changes + 1)
                if self._reach and facts.get("port"):
                    self._reach.watch(number, facts["address"], facts["port"])
        self._plan = self._read(_PLAN) or self._plan

    def _put(self, plan: dict[str, Any]) -> None:
        if self._write(_PLAN, plan):
            self._plan = plan

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self._folder / name)
        except (OSError, ValueError):  # not there yet, or half seen through a network's cache
            return {}

    def _write(self, name: str, facts: dict[str, Any]) -> bool:
        """Returns whether it is written: a folder that is away may come back within patience."""
        try:
            write_whole(self._folder / name, json.dumps(facts).encode())
        except OSError as error:
            self._written = self._written or time.monotonic()
            away = time.monotonic() - self._written
            if away > self._patience:
                raise
            text = f"{self._folder} cannot be written: {error}, {away:.0f} s of {self._patience:g}"
            self._remind(text, _SILENCE)
            return False
        self._written = 0.0
        return True


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]
