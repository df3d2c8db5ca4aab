"""The keeper: a process per host that owns the memory of snapshots and outlives trainers.

`KeeperProcess` is what a supervisor holds; run as a module, this is the process itself. It
allocates slots for the trainers of its host, exchanges parity with the keepers of the other hosts
once all of them have written, and gives back what is asked of it: to trainers that restore, and to
a keeper that has to compute what a lost host held. The first host's keeper also leads the agreement
on which step counts. Never imports JAX; ends with its supervisor.
"""

import contextlib
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from checkpoint.memory import parity
from checkpoint.memory.agreement import Agreement
from checkpoint.memory.slots import HEADER, Slots
from checkpoint.memory.wire import Connection, Directory, Message, Refused
from sharding.errors import UsageError
from torus import module_command

_BLOCK = 2**22  # bytes received at once
_PARITY_INDEX = 64  # bytes of room after a parity
Answer = tuple[Message, Iterable[memoryview]]


class KeeperProcess:
    """The keeper of this host as its supervisor sees it: started, and started again if it ends."""

    def __init__(
        self, directory: Directory | None, before_start: Callable[[], None] | None = None
    ) -> None:
        """before_start: called in the new process. Without a directory there is no keeper."""
        self._directory, self._before = directory, before_start
        self.environment = directory.environment() if directory else {}
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "KeeperProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def ensure(self) -> bool:
        """Starts the keeper if it does not run; returns whether one ended that had run."""
        ended = self._process is not None and self._process.poll() is not None
        if self._directory is not None and (self._process is None or ended):
            self._process = subprocess.Popen(
                module_command("trainer.recovery.keeper"),
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=self._before,
            )  # fmt: skip
        return ended


class Keeper:
    """What a keeper knows and does; every `do_` method answers one kind of message."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._lock = threading.RLock()
        self._slots: dict[int, Slots] = {}  # by rank
        self._facts: Message = {}  # what its trainers said last: `run`, `every`, `sizes`, `coded`
        self._written: dict[int, set[int]] = {}  # step → ranks of this host
        self._parity: Slots | None = None
        self._adding: tuple[str, int] = "", -1  # run and step that the parity is being made for
        self._added: set[int] = set()  # hosts whose chunk is in it
        self._led: tuple[str, Agreement | None] = "", None  # on the first host: run and agreement
        self._work = ThreadPoolExecutor(4, thread_name_prefix="keeper")

    def answer(self, connection: Connection) -> None:
        """Answers the messages of one connection until it ends."""
        while True:
            message = connection.receive()
            try:
                reply, content = getattr(self, f"do_{message['op']}")(connection, message)
            except (UsageError, Refused) as error:
                reply, content = {"error": str(error)}, []
            connection.send(reply, content)

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
                self._parity = Slots.create(HEADER + self._chunk_size() + _PARITY_INDEX)
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
                    self._work.submit(self._secure, {**message, "ranks": sorted(ranks)})
                return {}, []
        self._tell_leader(message)
        return {}, []

    # ------------------------------------------------------------ agreement

    def _tell_leader(self, message: Message) -> None:
        facts = {name: self._facts[name] for name in ("every", "sizes")}
        self._work.submit(self._ask, 0, {**message, **facts, "op": "heard"})

    def do_heard(self, _: Connection, message: Message) -> Answer:
        """The first host's keeper hears what happened, and tells all of them what follows."""
        run, step, at = message["run"], message["step"], message["at"]
        with self._lock:
            if self._led[0] != run:
                self._led = run, Agreement(len(message["sizes"]), message["every"])
            agreement = self._led[1]
            if message["event"] == "ready":
                changed = agreement.ready(message["ranks"], at, step)
            elif message["event"] == "missed":
                changed = agreement.missed(step, at)
            else:
                changed = agreement.done(message["ranks"], step, at)
            news = {"op": "decided", "run": run, "next": agreement.next}
            news["committed"] = agreement.committed
        for host in range(self._directory.hosts) if changed else ():
            self._work.submit(self._ask, host, news)
        return {}, []

    def do_decided(self, _: Connection, message: Message) -> Answer:
        """Tells the trainers of this host, through their memory."""
        with self._lock:
            if message["run"] == self._facts.get("run"):
                for slots in (*self._slots.values(), *filter(None, [self._parity])):
                    slots.committed = max(slots.committed, message["committed"])
                    slots.next = max(slots.next, message["next"])
        return {}, []

    def _ask(self, host: int, message: Message, content: Iterable[memoryview] = ()) -> bool:
        """Asks a keeper, also this one; without an answer the snapshot does not count."""
        try:
            with self._directory.connect(host) as connection:
                connection.ask(message, content)
        except (OSError, Refused) as error:
            print(f"keeper: host {host}: {message['op']}: {error}", file=sys.stderr, flush=True)
            return False
        return True

    # ------------------------------------------------------------ parity

    def _secure(self, message: Message) -> None:
        """Sends each other host its chunk of what this one's trainers wrote, then says so."""
        add = {name: message[name] for name in ("run", "step")}
        add |= {"op": "add", "host": self._directory.host}
        others = self._others() if self._facts["coded"] else []
        if all([self._ask(host, add, self._chunk(message["step"], host)) for host in others]):
            self._tell_leader({**message, "event": "done"})

    def do_add(self, connection: Connection, message: Message) -> Answer:
        """Adds another host's chunk of a step to the parity that this host keeps."""
        adding, host = (message["run"], message["step"]), message["host"]
        with self._lock:
            welcome = self._parity is not None and adding[0] == self._facts["run"]
            if welcome and adding != self._adding:
                self._adding, self._added = adding, set()
                self._parity_slot = self._parity.begin(adding[1])
                np.frombuffer(self._parity.data(self._parity_slot), np.uint8)[:] = 0
        for start, block in _blocks(connection, message["size"]):
            with self._lock:
                if welcome and adding == self._adding:
                    target = self._parity.data(self._parity_slot)
                    parity.add([target], HEADER + start, block)
        with self._lock:
            if not welcome or adding != self._adding:
                raise Refused(f"step {adding[1]} is not being coded")
            self._added.add(host)
            if self._added == set(self._others()):
                end = HEADER + self._chunk_size()
                self._parity.commit(self._parity_slot, adding[1], end, {})
        return {}, []

    def do_rebuild(self, _: Connection, message: Message) -> Answer:
        """Computes what the trainers of host `owner` had written of `step`, from all other hosts.

        Afterwards this keeper holds it; it is not compared with anything here.
        """
        owner, step, sizes = message["owner"], message["step"], message["sizes"]
        ranks = self._ranks(owner)
        with self._lock:
            self._facts = {**message, "coded": True, "run": ""}
            found = {rank: Slots.create(sizes[rank]) for rank in ranks}
            parts = [found[rank].data(0) for rank in ranks]
            hosts = [host for host in range(self._directory.hosts) if host != owner]
            for keeper in hosts:
                start = parity.chunk_number(owner, keeper) * self._chunk_size()
                asked = [(keeper, "parity")]
                asked += [(other, "chunk") for other in hosts if other != keeper]
                for host, op in asked:
                    with self._directory.connect(host) as connection:
                        ask = {"op": op, "step": step, "keeper": keeper, "sizes": sizes}
                        _, size = connection.ask(ask)
                        for at, block in _blocks(connection, size):
                            parity.add(parts, start + at, block)
            self._forget(set(ranks))
            self._slots |= found
        return {}, []

    def do_parity(self, _: Connection, message: Message) -> Answer:
        """Gives the parity of a step that this host keeps."""
        slot = self._parity.held().get(message["step"]) if self._parity else None
        if slot is None:
            raise Refused(f"no parity of step {message['step']}")
        return {}, [self._parity.data(slot)[HEADER : HEADER + self._chunk_size()]]

    def do_chunk(self, _: Connection, message: Message) -> Answer:
        """Gives the chunk of a step that `keeper` has in its parity."""
        return {}, self._chunk(message["step"], message["keeper"])

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

    def _chunk(self, step: int, keeper: int) -> list[memoryview]:
        size = self._chunk_size()
        start = parity.chunk_number(self._directory.host, keeper) * size
        return parity.cut([self._view(rank, step) for rank in self._own()], start, size)

    def _chunk_size(self) -> int:
        sizes = self._facts["sizes"]
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


def _blocks(connection: Connection, size: int) -> Iterator[tuple[int, memoryview]]:
    """Yields (place, content) of the `size` bytes that follow a message."""
    buffer = memoryview(bytearray(min(size, _BLOCK)))
    for start in range(0, size, _BLOCK):
        block = buffer[: min(_BLOCK, size - start)]
        connection.take_into(block)
        yield start, block


def main() -> None:
    """Runs the keeper that the environment describes, until it is killed."""
    directory = Directory.of_environment()
    keeper = Keeper(directory)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):  # whoever was there is gone, or was never welcome
                keeper.answer(Connection.accept(self.request, directory.token))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1" if directory.hosts == 1 else "", 0), Handler) as server:
        directory.publish(server.server_address[1])
        server.serve_forever()


if __name__ == "__main__":
    main()
