"""How the supervisors of several hosts agree: through the folder that their run shares anyway.

Each host writes one file, its own: a beat that says it lives, how far its slowest trainer is, the
generation that it is through with, and how its trainers ended. The first host reads all of them and
writes the plan: which generation starts and where its coordinator listens, or how the run ended. A
plan names the supervisors that it is for by tokens of theirs, so that what an earlier attempt left
behind binds nobody. Ages are measured by each host's own clock, between changes that it has seen.
"""

import json
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.recovery.policy import LOST, End
from trainer.recovery.progress import Progress

LEASE = 15.0  # beats that may be missing before a host counts as lost
_PLAN = "plan.json"


@dataclass
class _Seen:
    """What one host's file said last, and when it last changed."""

    facts: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0
    changes: int = 0


class Hosts:
    """One host's view of all of them; `index` 0 leads."""

    def __init__(
        self, folder: Path, index: int, count: int, address: str, *, every: float, patience: float
    ) -> None:
        """Prepares files in `folder`.

        Args:
          address: of the first host, where it gives the coordinator a port.
          every: seconds between beats.
          patience: seconds to wait for the others before a generation.
        """
        self.index, self.count, self.generation = index, count, -1
        self._folder, self._address = folder, address
        self._every, self._patience = every, patience
        self._token = secrets.token_hex(8)
        self._own: dict[str, Any] = {"token": self._token, "beat": 0, "through": -1, "ends": []}
        self._seen = [_Seen() for _ in range(count)]
        self._tokens: list[str] = []  # of the supervisors of this generation
        self._next = 0.0

    def meet(self, stop: Callable[[], bool]) -> str | int | None:
        """Waits for all hosts and returns the coordinator's address, a status to end with, or None.

        None is for `stop`, asked all the time; LOST for hosts that did not come within patience.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        give_up = time.monotonic() + self._patience
        while time.monotonic() < give_up:
            if stop():
                return None
            self.beat()
            plan = self._read(_PLAN)
            mine = _names(plan, self.index, self._token)
            if mine and "status" in plan:
                return plan["status"]
            if self.index == 0 and all(self._ready(n, plan) for n in range(self.count)):
                generation = plan.get("generation", -1) + 1
                plan = {
                    "generation": generation,
                    "coordinator": f"{self._address}:{_free_port()}",
                    "tokens": [self._token, *(s.facts["token"] for s in self._seen[1:])],
                }
                self._write(_PLAN, plan)
                mine = True
            if mine and plan["generation"] > self._own["through"]:
                self.generation = plan["generation"]
                self._tokens = plan["tokens"]
                return plan["coordinator"]
            time.sleep(min(0.05, self._every))
        return LOST

    def beat(self, slowest: Progress | None = None) -> None:
        """Says that this host lives and looks at the others: every so often, when called more."""
        if slowest is not None:
            self._own["slowest"] = [slowest.step, slowest.changes]
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._own["beat"] += 1
            self._write(f"host{self.index}.json", self._own)
            self._look()

    def others_ended(self) -> bool:
        """Whether another host is through with this generation, was started anew, or is lost."""
        return any(self._ended(n) or self._silent(n) for n in self._others())

    def waits_for(self, slowest: Progress) -> bool:
        """Whether a trainer on another host has done less than `slowest`, so that it waits."""
        told = [self._seen[n].facts.get("slowest") for n in self._others()]
        return any(them is not None and them < [slowest.step, slowest.changes] for them in told)

    def gather(self, ends: list[End]) -> list[End]:
        """Tells how this host's trainers ended; the first host waits for all, and returns all."""
        self._own["through"] = self.generation
        self._own["ends"] = [
            [e.rank, e.status, e.progress.phase, e.progress.step, e.progress.changes] for e in ends
        ]
        self._next = 0.0
        self.beat()
        until = time.monotonic() + LEASE * self._every
        while self.index == 0 and time.monotonic() < until:
            if all(self._ended(n) or self._silent(n) for n in self._others()):
                break
            self.beat()
            time.sleep(min(0.05, self._every))
        found = list(ends)
        for number in self._others():
            told = self._seen[number].facts
            if told.get("through") == self.generation and told["token"] == self._tokens[number]:
                found += [
                    End(rank, status, Progress(phase, step, 0.0, changes))
                    for rank, status, phase, step, changes in told["ends"]
                ]
        return found

    def conclude(self, status: int) -> None:
        """Tells the others, if this host leads, how the run ended."""
        if self.index == 0:
            self._write(_PLAN, {**self._read(_PLAN), "status": status})

    # ------------------------------------------------------------ files

    def _others(self) -> list[int]:
        return [n for n in range(self.count) if n != self.index]

    def _ready(self, number: int, plan: dict[str, Any]) -> bool:
        """Whether a host lives and waits for the next generation."""
        if number == self.index:
            return True
        seen = self._seen[number]
        if seen.changes < 2 or self._silent(number):  # a file of the past does not change
            return False
        known = _names(plan, number, seen.facts["token"])
        return not known or seen.facts["through"] >= plan["generation"]

    def _ended(self, number: int) -> bool:
        told = self._seen[number].facts
        return bool(told) and (
            told["token"] != self._tokens[number] or told["through"] >= self.generation
        )

    def _silent(self, number: int) -> bool:
        return time.monotonic() - self._seen[number].at > LEASE * self._every

    def _look(self) -> None:
        for number in self._others():
            facts, seen = self._read(f"host{number}.json"), self._seen[number]
            if facts and facts != seen.facts:
                self._seen[number] = _Seen(facts, time.monotonic(), seen.changes + 1)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self._folder / name).read_text())
        except (OSError, ValueError):  # not there yet, or half seen through a network's cache
            return {}

    def _write(self, name: str, facts: dict[str, Any]) -> None:
        path = self._folder / name
        part = path.with_name(f"{name}.{self._token}")
        part.write_text(json.dumps(facts))
        part.replace(path)


def _names(plan: dict[str, Any], number: int, token: str) -> bool:
    """Whether a plan, perhaps of an attempt on fewer hosts, is for this supervisor."""
    return plan.get("tokens", [])[number : number + 1] == [token]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]
