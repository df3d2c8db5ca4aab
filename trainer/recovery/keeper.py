"""The keeper: a process per host that owns the memory of snapshots and outlives trainers.

`KeeperProcess` is what a supervisor holds; run as a module, this is the process itself. It
allocates slots for the trainers of its host, exchanges parity with the keepers of the other hosts
once all of them have written, and gives back what is asked of it: to trainers that restore, and to
a keeper that has to compute what a lost host held. The first host's keeper also decides which step
counts. Never imports JAX; ends with its supervisor.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from checkpoint.memory import parity
from checkpoint.memory.rounds import Rounds
from checkpoint.memory.slots import HEADER, Slots
from checkpoint.memory.wire import Connection, Directory, Message, Refused
from sharding.errors import UsageError
from torus import module_command
from trainer.recovery.server import Server
from trainer.terminal import escaped_streams

_ALIVE = 5.0  # seconds between signs that an answer is still being worked at
_TOLD = (0.2, 1.0, 3.0)  # seconds before news that did not get through are told again
_STREAMS = 8  # hosts' chunks that are computed at the same time
_SETTLED = 10.0  # seconds that a keeper runs when it was started well
_LONGEST_PAUSE = 60.0  # between starts of a keeper that ends at once
_PARITY_INDEX = 64  # bytes of room after a parity
Answer = tuple[Message, Iterable[memoryview]]


class KeeperProcess:
    """The keeper of this host as its supervisor sees it: started, and started again if it ends."""

    def __init__(
        self, directory: Directory | None, before_start: Callable[[], None] | None = None
    ) -> None:
        """before_start: called in the new process. Without a directory there is no keeper."""
        self._directory, self._before = directory, before_start
        self._process: subprocess.Popen | None = None
        self._started = self._next = 0.0
        self._failures = 0  # in a row

    def __enter__(self) -> "KeeperProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def environment(self, *, takes: bool = True) -> dict[str, str]:
        """Returns what tells a trainer of the keepers; without `takes` it only restores."""
        if self._directory is None:
            return {}
        return dataclasses.replace(self._directory, takes=takes).environment()

    def ensure(self, address: str = "") -> str:
        """Starts the keeper if it does not run; returns what is to be told of one that ended.

        One that ends again at once is started ever more rarely, and told of only once.

        Args:
          address: of this host, where the keeper listens; "" if it is not known.
        """
        if self._directory is None or (self._process and self._process.poll() is None):
            return ""
        told = self._ended() if self._process else ""
        if address:
            self._directory = dataclasses.replace(self._directory, address=address)
        if time.monotonic() < self._next:
            return told
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            module_command("trainer.recovery.keeper"),
            env={**os.environ, **self.environment()},
            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=self._before,
        )  # fmt: skip
        return told

    def _ended(self) -> str:
        status, self._process = self._process.returncode, None
        now, killed = time.monotonic(), status < 0
        self._failures = 1 if now - self._started >= _SETTLED else self._failures + 1
        once = self._failures == 1
        pause = 0.0 if killed and once else min(_LONGEST_PAUSE, 0.5 * 2**self._failures)
        self._next = now + pause
        return ("keeper lost" if killed else "no snapshots") if once else ""


class Keeper:
    """What a keeper knows and does; every `do_` method answers one kind of message."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._lock = threading.RLock()
        self._slots: dict[int, Slots] = {}  # by rank
        self._facts: Message = {}  # what its trainers said last: `run`, `every`, `sizes`, `coded`
        self._written: dict[int, set[int]] = {}  # step → ranks of this host
        self._securing = ""  # the run of which a step is being sent to the other hosts
        self._parity: Slots | None = None
        self._adding: tuple[str, int] = "", -1  # run and step that the parity is being made for
        self._parity_slot, self._cleared = 0, 0  # the slot for it, and bytes that began at zero
        self._added: set[int] = set()  # hosts whose chunk is in it
        self._led: tuple[str, Rounds | None] = "", None  # on the first host: run and rounds
        self._work = ThreadPoolExecutor(4, thread_name_prefix="keeper")

    def answer(self, connection: Connection) -> None:
        """Answers the messages of one connection until it ends."""
        while True:
            message = connection.receive()
            try:
                with _signs_of_life(connection):
                    reply, content = getattr(self, f"do_{message['op']}")(connection, message)
            except (UsageError, Refused) as error:
                reply, content = {"error": str(error)}, []
            connection.send(reply, content)

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Does something in a thread; an exception in it is told."""
        self._work.submit(work, *arguments).add_done_callback(_tell_exception)

    # ------------------------------------------------------------ what trainers of this host say

    def do_reserve(self, _: Connection, message: Message) -> Answer:
        """Gives a trainer its slots; what they hold stays if the sizes have."""
        rank, sizes = message["rank"], message["sizes"]
        with self._lock:
            if self._facts.get("sizes") != sizes or self._facts["coded"] != message["coded"]:
                self._forget(set(self._slots))
            self._forget(set(self._slots) - set(self._own()))
            if self._facts.get("run") != message["run"]:
                self._written.clear()
            self._facts = {name: message[name] for name in ("run", "every", "sizes", "coded")}
            if rank not in self._slots:
                self._slots[rank] = Slots.create(sizes[rank])
            if message["coded"] and self._parity is None:
                self._parity = Slots.create(HEADER + self._chunk_size(sizes) + _PARITY_INDEX)
            for slots in (self._slots[rank], *filter(None, [self._parity])):
                slots.committed, slots.next = message["committed"], -1
            return {"path": self._slots[rank].path}, []

    def do_report(self, _: Connection, message: Message) -> Answer:
        """Hears that a trainer of this host is ready, missed a step, or has written one."""
        with self._lock:
            if message["run"] != self._facts.get("run"):
                raise Refused("this keeper has no memory reserved for the run")
            if message["event"] == "written":
                ranks = self._written.setdefault(message["step"], set())
                ranks.update(message["ranks"])
                if len(ranks) == self._directory.processes:
                    del self._written[message["step"]]
                    self._securing = message["run"]
                    self._submit(self._secure, {**message, "ranks": sorted(ranks)})
                return {}, []
            if message["event"] == "ready" and self._securing == message["run"]:
                return {}, []  # a large snapshot is on its way to the others: no news are missing
        self._tell_leader(message)
        return {}, []

    # ------------------------------------------------------------ rounds

    def _tell_leader(self, message: Message) -> None:
        facts = {name: self._facts[name] for name in ("every", "sizes")}
        self._submit(self._tell, 0, {**message, **facts, "op": "heard"})

    def do_heard(self, _: Connection, message: Message) -> Answer:
        """The first host's keeper hears what happened, and tells all of them what follows."""
        run, step, at = message["run"], message["step"], message["at"]
        with self._lock:
            if self._led[0] != run:
                self._led = run, Rounds(len(message["sizes"]), message["every"])
            rounds = self._led[1]
            if message["event"] == "ready":
                changed = rounds.ready(message["ranks"], at, step)
            elif message["event"] == "missed":
                changed = rounds.missed(step, at)
            elif message["event"] == "failed":
                changed = rounds.failed(step, at)
            else:
                changed = rounds.done(message["ranks"], step, at)
            news = {"op": "decided", "run": run, "next": rounds.next}
            news["committed"] = rounds.committed
        for host in range(self._directory.hosts) if changed else ():
            self._submit(self._tell, host, news)
        return {}, []

    def do_decided(self, _: Connection, message: Message) -> Answer:
        """Tells the trainers of this host, through their memory."""
        with self._lock:
            if message["run"] == self._facts.get("run"):
                for slots in (*self._slots.values(), *filter(None, [self._parity])):
                    slots.committed = max(slots.committed, message["committed"])
                    slots.next = max(slots.next, message["next"])
        return {}, []

    def _tell(self, host: int, message: Message) -> bool:
        """Tells a keeper, also this one, news that do no harm when they come twice."""
        for pause in (*_TOLD, None):
            if self._ask(host, message, tells=pause is None):
                return True
            if pause is not None:
                time.sleep(pause)
        return False

    def _ask(
        self, host: int, message: Message, content: Iterable[memoryview] = (), *,
        tells: bool = True,
    ) -> bool:  # fmt: skip
        """Asks a keeper; without an answer the snapshot does not count, which `tells` prints."""
        try:
            with self._directory.connect(host) as connection:
                connection.ask(message, content)
        except (OSError, Refused) as error:
            if tells:
                text = f"keeper: host {host}: {message['op']}: {error}"
                print(text, file=sys.stderr, flush=True)
            return False
        return True

    # ------------------------------------------------------------ parity

    def _secure(self, message: Message) -> None:
        """Sends each other host its chunk of what this one's trainers wrote, then says so."""
        add = {name: message[name] for name in ("run", "step")}
        add |= {"op": "add", "host": self._directory.host}
        others = self._others() if self._facts["coded"] else []
        try:
            chunks = [(host, self._chunk(message["step"], host, self._facts)) for host in others]
            done = all([self._ask(host, add, chunk) for host, chunk in chunks])
        finally:
            self._securing = ""
        # A chunk that came in part is in the parity already: another step is taken instead.
        self._tell_leader({**message, "event": "done" if done else "failed"})

    def do_add(self, connection: Connection, message: Message) -> Answer:
        """Adds another host's chunk of a step to the parity that this host keeps."""
        adding, host = (message["run"], message["step"]), message["host"]
        with self._lock:
            welcome = self._parity is not None and adding[0] == self._facts["run"]
            if welcome and adding != self._adding:
                self._adding, self._added = adding, set()
                self._parity_slot, self._cleared = self._parity.begin(adding[1]), 0
        for start, block in connection.blocks(message["size"]):
            with self._lock:
                if welcome and adding == self._adding:
                    self._clear_parity(start + len(block))
                    target = self._parity.data(self._parity_slot)
                    parity.add([target], HEADER + start, block)
        with self._lock:
            if not welcome or adding != self._adding:
                raise Refused(f"step {adding[1]} is not being coded")
            self._added.add(host)
            if self._added == set(self._others()):
                size = self._chunk_size(self._facts["sizes"])
                self._clear_parity(size)
                self._parity.commit(self._parity_slot, adding[1], HEADER + size, {})
        return {}, []

    def _clear_parity(self, end: int) -> None:
        """Zeroes the parity up to `end`: as chunks come in, for all at once takes long at size."""
        if self._cleared < end:
            view = self._parity.data(self._parity_slot)[HEADER + self._cleared : HEADER + end]
            np.frombuffer(view, np.uint8)[:] = 0
            self._cleared = end

    def do_rebuild(self, connection: Connection, message: Message) -> Answer:
        """Computes what the trainers of host `owner` had written of `step`, from all other hosts.

        Afterwards this keeper holds it; it is not compared with anything here. Every other host
        has the parity of another part of it, and these parts are computed at the same time.
        """
        owner, sizes = message["owner"], message["sizes"]
        found: dict[int, Slots] = {}
        hosts = [host for host in range(self._directory.hosts) if host != owner]
        status = connection.status
        status.update(done=0, of=len(hosts) ** 2 * self._chunk_size(sizes))
        try:
            for rank in self._ranks(owner):
                found[rank] = Slots.create(sizes[rank])
            parts = [slots.data(0) for slots in found.values()]
            with ThreadPoolExecutor(min(_STREAMS, len(hosts))) as pool:
                streams = [
                    pool.submit(self._rebuild_chunk, message, keeper, hosts, parts, status)
                    for keeper in hosts
                ]
                try:
                    for stream in as_completed(streams):
                        stream.result()
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
        except BaseException:
            for slots in found.values():
                slots.close()
            raise
        with self._lock:
            self._facts = {"every": 1, "run": "", "coded": True, "sizes": sizes}
            self._forget(set(found))
            self._slots |= found
        return {}, []

    def _rebuild_chunk(
        self, message: Message, keeper: int, hosts: list[int], parts: list[memoryview],
        status: dict[str, int],
    ) -> None:  # fmt: skip
        """Computes the chunk of which `keeper` has the parity, in place.

        The others are asked in an order of its own, so that no host is asked for all at once.
        """
        start = parity.chunk_number(message["owner"], keeper) * self._chunk_size(message["sizes"])
        place = hosts.index(keeper)
        for host in hosts[place:] + hosts[:place]:
            ask = {"op": "parity" if host == keeper else "chunk", "step": message["step"]}
            try:
                with self._directory.connect(host) as connection:
                    _, size = connection.ask({**ask, "keeper": keeper, "sizes": message["sizes"]})
                    for at, block in connection.blocks(size):
                        parity.add(parts, start + at, block)
                        status["done"] += len(block)
            except OSError as error:
                raise Refused(f"host {host} does not give its part: {error}") from error

    def do_release(self, _: Connection, message: Message) -> Answer:
        """Gives back the memory of what was computed here for another host."""
        with self._lock:
            self._forget(set(self._slots) - set(self._own()))
        return {}, []

    def do_parity(self, _: Connection, message: Message) -> Answer:
        """Gives the parity of a step that this host keeps."""
        slot = self._parity.held().get(message["step"]) if self._parity else None
        if slot is None:
            raise Refused(f"no parity of step {message['step']}")
        size = self._chunk_size(message["sizes"])
        return {}, [self._parity.data(slot)[HEADER : HEADER + size]]

    def do_chunk(self, _: Connection, message: Message) -> Answer:
        """Gives the chunk of a step that `keeper` has in its parity."""
        return {}, self._chunk(message["step"], message["keeper"], message)

    # ------------------------------------------------------------ what is held

    def do_survey(self, _: Connection, message: Message) -> Answer:
        """Tells what is held here: steps by rank, steps of the parity, and the sizes of ranks."""
        with self._lock:
            ranks = {
                rank: {"path": slots.path, "steps": sorted(slots.held())}
                for rank, slots in self._slots.items()
            }
            coded = sorted(self._parity.held()) if self._parity else []
            return {"ranks": ranks, "parity": coded, "sizes": self._facts.get("sizes")}, []

    def do_read(self, _: Connection, message: Message) -> Answer:
        """Gives `count` bytes of a rank's step from `start` on."""
        view = self._view(message["rank"], message["step"])
        return {}, [view[message["start"] : message["start"] + message["count"]]]

    def do_index(self, _: Connection, message: Message) -> Answer:
        """Tells which pieces of arrays a rank's step is."""
        slots, slot = self._find(message["rank"], message["step"])
        index = slots.index(slot)
        if index is None:
            raise Refused(f"the index of process {message['rank']} is damaged")
        return {"index": index}, []

    def _find(self, rank: int, step: int) -> tuple[Slots, int]:
        """Returns where a step of a rank is. Raises Refused."""
        slots = self._slots.get(rank)
        if slots is None or step not in slots.held():
            raise Refused(f"step {step} of process {rank} is not here")
        return slots, slots.held()[step]

    def _view(self, rank: int, step: int) -> memoryview:
        slots, slot = self._find(rank, step)
        return slots.data(slot)

    def _chunk(self, step: int, keeper: int, facts: Message) -> list[memoryview]:
        size = self._chunk_size(facts["sizes"])
        start = parity.chunk_number(self._directory.host, keeper) * size
        return parity.cut([self._view(rank, step) for rank in self._own()], start, size)

    def _chunk_size(self, sizes: list[int]) -> int:
        hosts = range(self._directory.hosts)
        return parity.chunk_size([sum(sizes[r] for r in self._ranks(host)) for host in hosts])

    def _ranks(self, host: int) -> range:
        count = self._directory.processes
        return range(host * count, host * count + count)

    def _own(self) -> range:
        return self._ranks(self._directory.host)

    def _others(self) -> list[int]:
        return [host for host in range(self._directory.hosts) if host != self._directory.host]

    def _forget(self, ranks: set[int]) -> None:
        """Gives memory back; without ranks left also that of the parity."""
        for rank in ranks & set(self._slots):
            self._slots.pop(rank).close()
        if not self._slots and self._parity is not None:
            self._parity.close()
            self._parity = None


@contextlib.contextmanager
def _signs_of_life(connection: Connection) -> Iterator[None]:
    """Sends the connection's status every few seconds while an answer is being worked at."""
    connection.status = {}
    done = threading.Event()

    def tell() -> None:
        with contextlib.suppress(OSError):  # the answer finds that out too
            while not done.wait(_ALIVE):
                connection.send({"progress": dict(connection.status)})

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tell_exception(work: Future) -> None:
    if not work.cancelled() and (error := work.exception()):
        print("keeper: a snapshot does not count:", file=sys.stderr)
        traceback.print_exception(error)


def main() -> int:
    """Runs the keeper that the environment describes, until it is killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # of a whole job: trainers are saving, and need this
    directory = Directory.of_environment()
    keeper = Keeper(directory)
    try:
        address = directory.own_address()
        directory.make_token()
        server = Server(address, directory.token, keeper.answer)
        directory.publish(address, server.port)
    except OSError as error:
        print(f"keeper: no snapshots: {error}", file=sys.stderr, flush=True)
        return 1
    server.serve()
    return 0


if __name__ == "__main__":
    with escaped_streams():  # what other hosts say is told there
        sys.exit(main())
