"""Keepers as real processes, their trainers played by this one: no JAX."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from checkpoint.memory.slots import HEADER, Slots
from checkpoint.memory.wire import Connection, Directory, Refused
from torus import module_command
from trainer.recovery.keeper import Keeper, KeeperProcess
from trainer.recovery.server import STRANGERS

pytestmark = pytest.mark.multiprocess
PROCESSES = 2


class Hosts:
    """Several hosts on this machine, each with a keeper and trainers of these sizes."""

    def __init__(self, folder, sizes: list[int], processes: int = PROCESSES) -> None:
        count = len(sizes) // processes
        self.sizes, self.processes = sizes, processes
        self.directories = [Directory(str(folder), n, count, processes) for n in range(count)]
        self.keepers = [KeeperProcess(directory) for directory in self.directories]
        self.slots: dict[int, Slots] = {}
        for keeper in self.keepers:
            keeper.ensure()

    def host(self, rank: int) -> Directory:
        return self.directories[rank // self.processes]

    def reserve(self, rank: int, run: str = "a", committed: int = -1) -> None:
        message = {"op": "reserve", "rank": rank, "sizes": self.sizes, "run": run, "every": 1}
        message |= {"coded": len(self.keepers) > 1, "committed": committed}
        answer = self.host(rank).ask(self.host(rank).host, message, 20)
        self.slots[rank] = Slots.attach(answer["path"])
        self.report(rank, "ready", committed, 0, run)

    def report(self, rank: int, event: str, step: int, at: int, run: str = "a") -> None:
        message = {"op": "report", "event": event, "step": step, "at": at, "run": run}
        self.host(rank).ask(self.host(rank).host, {**message, "ranks": [rank]}, 20)

    def write(self, step: int, content: dict[int, bytes]) -> None:
        for rank, data in content.items():
            slots = self.slots[rank]
            slot = slots.begin(step)
            slots.put(slot, HEADER, memoryview(data))
            slots.commit(slot, step, HEADER + len(data), {"rank": rank})
            self.report(rank, "written", step, step)

    def named(self) -> int:
        """Waits until all trainers know the step that is next; returns it."""
        return wait(lambda: len({s.next for s in self.slots.values()}) == 1 and self.slots[0].next)

    def counted(self, step: int) -> None:
        wait(lambda: all(slots.committed == step for slots in self.slots.values()))

    def close(self) -> None:
        for keeper in self.keepers:
            keeper.__exit__()


def wait(what):
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if (found := what()) and found != -1:
            return found
        time.sleep(0.002)
    raise AssertionError("waited in vain")


@pytest.fixture
def hosts(tmp_path) -> Iterator:
    made = []

    def make(sizes: list[int], processes: int = PROCESSES) -> Hosts:
        made.append(Hosts(tmp_path, sizes, processes))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(
    ("count", "lost"), [(2, 1), (3, 0), (3, 2), (4, 1), (5, 4), (6, 0), (7, 3), (8, 7)]
)
def test_a_host_that_lost_its_memory_gets_it_back(hosts, count, lost):
    """Hosts of two trainers with sizes that do not divide; all of one host's bytes return."""
    sizes = [(1, 3, 2, 5, 1, 7)[rank % 6] * 4096 for rank in range(2 * count)]
    job = hosts(sizes)
    for rank in range(2 * count):
        job.reserve(rank)
    for _ in range(3):
        step = job.named()
        content = {rank: os.urandom(sizes[rank] - 300) for rank in range(2 * count)}
        job.write(step, content)
        job.counted(step)
    keeper, directory = job.keepers[lost], job.directories[lost]
    keeper._process.kill()
    keeper._process.wait()
    assert keeper.ensure()
    with pytest.raises(Refused, match=f"step {step} of process {2 * lost} is not here"):
        directory.ask(lost, {"op": "index", "rank": 2 * lost, "step": step}, 20)
    ask = {"op": "rebuild", "owner": lost, "step": step, "sizes": sizes}
    directory.ask(lost, ask)
    for rank in (2 * lost, 2 * lost + 1):
        job.reserve(rank, "b", step)
        assert job.slots[rank].held() == {step: 0}
        assert job.slots[rank].index(0) == {"rank": rank}
        size = len(content[rank])
        assert bytes(job.slots[rank].data(0)[HEADER : HEADER + size]) == content[rank]
    with pytest.raises(Refused, match=r"no parity of step 999|of process"):
        directory.ask(lost, {**ask, "step": 999})


def test_a_step_counts_only_when_all_have_it(hosts):
    job = hosts([4096] * 4)
    for rank in range(4):
        job.reserve(rank)
    first = job.named()
    job.write(first, {rank: b"first" for rank in range(3)})
    time.sleep(0.2)
    assert all(slots.committed == -1 for slots in job.slots.values())
    job.report(3, "missed", first, first + 5)  # it was too late: another step is named
    wait(lambda: job.slots[0].next > first)
    second = job.named()
    assert second > first + 5
    job.write(second, {rank: b"second" for rank in range(4)})
    job.counted(second)
    third = job.named()
    job.write(third, {0: b"third"})  # a trainer dies here; all begin anew with what counts
    for rank in range(4):
        job.reserve(rank, "b", second)
        assert second in job.slots[rank].held()


def test_other_sizes_take_the_place_of_the_old(hosts):
    job = hosts([4096, 4096])
    for rank in (0, 1):
        job.reserve(rank)
    job.write(job.named(), {0: b"x", 1: b"x"})
    job.sizes = [8192, 8192]
    job.reserve(0, "b")
    assert job.slots[0].capacity == 8192 and not job.slots[0].held()


def test_a_stranger_is_not_heard(hosts, tmp_path):
    """Whoever does not know the token is told nothing, and the keeper goes on."""
    job = hosts([4096, 4096])
    job.reserve(0)
    _, port = json.loads((tmp_path / "keeper0.json").read_text())
    with pytest.raises(ConnectionError, match="token"):
        Connection.open(("127.0.0.1", port), b"guess")
    job.reserve(1)
    assert job.named() > 0


def test_a_keeper_listens_at_its_own_address_only(hosts, tmp_path):
    job = hosts([4096, 4096], processes=1)
    job.reserve(0)
    for host in (0, 1):
        wait(lambda host=host: (tmp_path / f"keeper{host}.json").exists())
        address, port = json.loads((tmp_path / f"keeper{host}.json").read_text())
        assert address == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)


def test_many_strangers_do_not_close_a_keeper(hosts, tmp_path):
    """Three hundred are silent or send a byte at a time; it holds a few dozen of them."""
    job = hosts([4096], processes=1)
    job.reserve(0)
    _, port = json.loads((tmp_path / "keeper0.json").read_text())
    pid = job.keepers[0]._process.pid
    with contextlib.ExitStack() as stack:
        for number in range(300):
            stranger = socket.create_connection(("127.0.0.1", port), timeout=5)
            stack.enter_context(stranger)
            if number % 2:
                stranger.send(b"x")
        assert len(os.listdir(f"/proc/{pid}/fd")) < STRANGERS + 30
        step = job.named()
        job.write(step, {0: b"x"})
        job.counted(step)


def test_a_lost_connection_between_keepers_costs_no_minute(hosts, tmp_path):
    """A chunk does not reach the other host: another step is named, and that one counts."""
    job = hosts([4096, 4096], processes=1)
    for rank in (0, 1):
        job.reserve(rank)
    first = job.named()
    place = tmp_path / "keeper1.json"
    kept = place.read_text()
    place.write_text(json.dumps(["127.0.0.1", 9]))
    job.write(first, {0: b"first"})
    wait(lambda: job.slots[0].next > first)
    place.write_text(kept)
    began, second = time.monotonic(), job.named()
    assert second > first
    job.write(second, {0: b"second", 1: b"second"})
    job.counted(second)
    assert time.monotonic() - began < 15


def test_a_keeper_that_cannot_start_is_told_of_once_and_tried_ever_more_rarely(tmp_path):
    directory = Directory(str(tmp_path), 0, 2, 1, address="203.0.113.1")  # no host's (RFC 5737)
    starts, told = [], []
    with KeeperProcess(directory) as keeper:
        until = time.monotonic() + 6
        while time.monotonic() < until:
            told += filter(None, [keeper.ensure()])
            starts += [keeper._process] * (keeper._process not in (*starts, None))
            time.sleep(0.02)
    assert told == ["no snapshots"]
    assert 2 <= len(starts) <= 4  # not once a second


def test_a_keeper_says_why_it_cannot_start(tmp_path):
    directory = Directory(str(tmp_path), 0, 2, 1, address="203.0.113.1")
    line, env = module_command("trainer.recovery.keeper"), {**os.environ, **directory.environment()}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "keeper: no snapshots: " in done.stderr
    assert "Cannot assign requested address" in done.stderr


def test_what_goes_wrong_in_a_thread_of_a_keeper_is_told(tmp_path, capsys):
    keeper = Keeper(Directory(str(tmp_path)))
    keeper._submit(lambda: 1 // 0)
    keeper._work.shutdown()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_parts_are_computed_with_signs_of_life_and_given_back(hosts, monkeypatch):
    job = hosts([2**20] * 3, processes=1)
    for rank in range(3):
        job.reserve(rank)
    step = job.named()
    job.write(step, {rank: os.urandom(2**20 - 300) for rank in range(3)})
    job.counted(step)
    job.keepers[2].__exit__()
    directory = job.directories[0]
    ask = {"op": "rebuild", "owner": 2, "step": step, "sizes": job.sizes}
    directory.ask(0, ask)
    assert directory.ask(0, {"op": "survey"})["ranks"].keys() == {"0", "2"}
    directory.ask(0, {"op": "release"})
    assert directory.ask(0, {"op": "survey"})["ranks"].keys() == {"0"}


def test_more_than_the_memory_there_is_is_refused(hosts):
    job = hosts([2**45, 2**45])
    with pytest.raises(Refused, match=r"32768\.00 GiB do not fit into .* of free memory; use more"):
        job.reserve(0)
