"""What supervisors agree on through their folder: threads stand in for hosts."""

import threading
import time
from pathlib import Path

import pytest

from trainer.recovery.hosts import Hosts, Place
from trainer.recovery.policy import FINISHED, LOST, NO_PROGRESS, PREEMPTED, STOPPED, End
from trainer.recovery.progress import Progress
from trainer.recovery.reach import connected

LEASE = 1.0


class Host:
    """One supervisor's conversation with the others: beats until told to do something else."""

    def __init__(self, folder: Path, index: int, count: int, sizes=(3, 1), patience=20.0) -> None:
        self.hosts = Hosts(
            folder, index, count, "127.0.0.1", sizes=sizes, lease=LEASE, patience=patience,
            remind=self.reminded,
        )  # fmt: skip
        self.reminders: set[str] = set()
        self.met: list[Place | int | None] = []
        self.ended = threading.Event()
        self.frozen = threading.Event()
        self.failing: list[End] = []
        self.status: int | None = None  # to end the run with
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.ended.is_set():
            self.met.append(met := self.hosts.meet(self.pauses))
            if not isinstance(met, Place):
                return
            how = None
            while not self.pauses() and not self.hosts.over():
                self.hosts.beat(Progress("step", 5, 0.0, 9))
                if self.failing or self.status is not None:
                    break
                if self.hosts.drains(settled=True):
                    how = STOPPED
                    break
                time.sleep(0.01)
            if self.status is not None:
                return self.hosts.leave(self.status, None, all_end=True)
            if not self.ended.is_set():
                self.gathered = self.hosts.gather(self.failing, how)
                self.led, self.lost = self.hosts.leads, self.hosts.lost()
                self.failing = []

    def pauses(self) -> bool:
        while self.frozen.is_set():
            time.sleep(0.01)
        return self.ended.is_set()

    def reminded(self, text: str, _: float) -> None:
        self.reminders.add(text.rpartition(",")[0] or text)

    def lose_network(self) -> None:
        """Nobody reaches this host any more; it sees the folder and the others as before."""
        self.hosts._reach.close()

    def die(self) -> None:
        self.ended.set()
        self.thread.join()

    def leave(self, status: int) -> None:
        self.die()
        self.hosts.leave(status, STOPPED, all_end=False)


@pytest.fixture
def meeting(tmp_path):
    made = []

    def start(*indices: int, count: int, **options) -> list[Host]:
        new = [Host(tmp_path / "launch", index, count, **options) for index in indices]
        made.extend(new)
        return new

    yield start
    for host in made:
        host.frozen.clear()
        host.die()
        host.hosts.close()


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def agreed(hosts: list[Host], members: list[int]) -> bool:
    """Whether all of these are in one generation of these members, each at its own rank."""
    places = [host.met[-1] if host.met else None for host in hosts]
    if not all(isinstance(place, Place) for place in places):
        return False
    own = [host.hosts for host in hosts]
    return (
        {tuple(host.members) for host in own} == {tuple(members)}
        and len({(host.generation, p.coordinator) for host, p in zip(own, places, strict=True)})
        == 1
        and [p.rank for p in places] == [members.index(host.index) for host in own]
        and {p.hosts for p in places} == {len(members)}
    )


def test_a_lost_host_is_replaced_by_a_spare_and_comes_back_as_one(meeting):
    hosts = meeting(0, 1, 2, count=4)
    until(lambda: agreed(hosts, [0, 1, 2]))
    hosts += meeting(3, count=4)
    time.sleep(LEASE)  # until it waits
    hosts[1].die()
    until(lambda: agreed([hosts[0], hosts[2], hosts[3]], [0, 2, 3]))
    (again,) = meeting(1, count=4)
    time.sleep(LEASE)
    assert agreed([hosts[0], hosts[2], hosts[3]], [0, 2, 3]) and not again.met


def test_fewer_hosts_go_on_and_grow_when_one_is_back(meeting):
    hosts = meeting(0, 1, count=2, sizes=(2, 1))
    until(lambda: agreed(hosts, [0, 1]))
    hosts[0].die()  # the one that led
    until(lambda: agreed(hosts[1:], [1]))
    assert (hosts[1].hosts.inherits, hosts[1].hosts.gone) == (True, [0])
    hosts[0] = meeting(0, count=2, sizes=(2, 1))[0]
    until(lambda: agreed(hosts, [0, 1]))
    assert hosts[1].hosts.generation == 2
    assert not any(host.hosts.inherits for host in hosts)


def test_one_that_is_back_and_leads_does_not_wait_for_all(meeting):
    hosts = meeting(0, 1, 2, count=3, sizes=(3, 2, 1))
    until(lambda: agreed(hosts, [0, 1, 2]))
    hosts[2].die()
    until(lambda: agreed(hosts[:2], [0, 1]))
    hosts[0].die()
    until(lambda: agreed(hosts[1:2], [1]))
    hosts[0] = meeting(0, count=3, sizes=(3, 2, 1))[0]
    until(lambda: agreed(hosts[:2], [0, 1]), seconds=15.0)  # less than patience


def test_a_host_that_takes_leave_is_not_waited_for(meeting):
    hosts = meeting(0, 1, count=2, sizes=(2, 1))
    until(lambda: agreed(hosts, [0, 1]))
    began = time.monotonic()
    hosts[0].leave(PREEMPTED)
    until(lambda: agreed(hosts[1:], [1]))
    assert time.monotonic() - began < LEASE


def test_a_host_without_network_is_left_out_though_its_folder_lives(meeting):
    hosts = meeting(0, 1, 2, count=3, sizes=(3, 2))
    until(lambda: agreed(hosts, [0, 1, 2]))
    hosts[2].lose_network()
    until(lambda: agreed(hosts[:2], [0, 1]))
    assert hosts[0].lost == [2] and hosts[0].led
    time.sleep(2 * LEASE)
    assert agreed(hosts[:2], [0, 1]) and hosts[1].hosts.generation == 1  # and stays out


def test_the_one_that_leads_leaves_itself_out_when_its_network_is_dead(meeting):
    hosts = meeting(0, 1, 2, count=3, sizes=(3, 2))
    until(lambda: agreed(hosts, [0, 1, 2]))
    hosts[0].lose_network()
    until(lambda: agreed(hosts[1:], [1, 2]))
    assert not hosts[1].hosts.inherits  # the first one has judged before
    assert (hosts[0].led, hosts[0].lost) == (True, [0])
    until(lambda: "the other hosts train; this one waits until it is needed" in hosts[0].reminders)


def test_where_all_are_needed_a_dead_network_is_waited_for_and_named(meeting):
    hosts = meeting(0, 1, 2, count=3, sizes=(3,), patience=4.0)
    until(lambda: agreed(hosts, [0, 1, 2]))
    hosts[2].lose_network()
    until(lambda: [host.met[-1] for host in hosts] == [LOST] * 3)
    assert all(
        "waiting for host 2, which the others do not reach" in host.reminders for host in hosts
    )


def test_hosts_whose_ports_are_closed_to_each_other_begin_all_the_same(meeting):
    """A firewall may be around the launchers' ports, and not around the collectives'."""
    hosts = meeting(0, 1, count=2, sizes=(2, 1))
    for host in hosts:
        host.lose_network()
        host.hosts._own["port"] = 0
    until(lambda: agreed(hosts, [0, 1]))
    time.sleep(2 * LEASE)
    assert agreed(hosts, [0, 1]) and hosts[0].hosts.generation == 0


@pytest.mark.parametrize(
    ("links", "left"),
    [
        ({}, [0]),
        ({(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)}, [0, 1, 2]),
        ({(0, 1), (1, 0), (1, 2), (0, 2)}, [0, 1]),  # 2 is heard by nobody
        ({(0, 1), (1, 0), (2, 1), (2, 0)}, [0, 1]),  # 2 hears nobody
        ({(1, 2), (2, 1)}, [1, 2]),
        ({(1, 2), (2, 1), (0, 2), (2, 0)}, [0, 2]),  # one link is down
    ],
)
def test_as_many_as_reach_each_other_stay(links, left):
    ages = {a: {b: 1.0 for (x, b) in links if x == a} for a in range(3)}
    assert connected([0, 1, 2], ages, within=2.0) == left
    assert connected([0, 1, 2], ages, within=0.5) == [0]
    assert connected([], {}, within=1.0) == []


def test_a_folder_that_is_away_for_a_while_ends_nobody(meeting, tmp_path):
    hosts = meeting(0, 1, count=2, sizes=(2,), patience=30.0)
    until(lambda: agreed(hosts, [0, 1]))
    (tmp_path / "file").write_text("")
    (tmp_path / "launch").rename(tmp_path / "away")
    for name, target in (("gone", "file"), ("back", "away")):
        (tmp_path / name).symlink_to(tmp_path / target)
    (tmp_path / "gone").rename(tmp_path / "launch")
    time.sleep(2 * LEASE)
    assert all(host.thread.is_alive() for host in hosts)
    assert all(any("cannot be written" in t for t in host.reminders) for host in hosts)
    (tmp_path / "back").replace(tmp_path / "launch")
    until(lambda: agreed(hosts, [0, 1]) and hosts[0].hosts.generation > 0)


def test_a_folder_that_stays_away_ends_the_launcher(tmp_path):
    hosts = Hosts(tmp_path / "x/y", 0, 1, "127.0.0.1", sizes=[1], lease=0.1, patience=0.3)
    hosts.beat()
    time.sleep(0.4)
    with pytest.raises(FileNotFoundError):
        hosts.beat()


def test_one_that_was_frozen_finds_that_it_was_given_up(meeting):
    hosts = meeting(0, 1, count=2, sizes=(2, 1))
    until(lambda: agreed(hosts, [0, 1]))
    hosts[0].frozen.set()
    until(lambda: agreed(hosts[1:], [1]))
    hosts[0].frozen.clear()
    until(lambda: agreed(hosts, [0, 1]))
    assert hosts[1].hosts.generation == 2


def test_one_that_was_frozen_judges_nobody(meeting):
    """Another did so meanwhile; and it has not seen the others because it did not look."""
    hosts = meeting(0, 1, count=2, sizes=(2,))
    until(lambda: agreed(hosts, [0, 1]))
    hosts[0].frozen.set()
    until(lambda: hasattr(hosts[1], "led"))
    assert (hosts[1].led, hosts[1].lost) == (True, [0])
    hosts[0].frozen.clear()
    until(lambda: agreed(hosts, [0, 1]) and hosts[0].hosts.generation == 1)
    assert (hosts[0].led, hosts[0].lost) == (False, [])


def test_the_first_cause_is_told_to_the_one_that_leads(meeting):
    hosts = meeting(0, 1, count=2, sizes=(2,))
    until(lambda: agreed(hosts, [0, 1]))
    hosts[1].failing = [End(1, -9, Progress("step", 5, 0.0, 9))]
    until(lambda: hosts[0].hosts.generation == 1)
    assert hosts[0].gathered == [End(1, -9, Progress("step", 5, 0.0, 9))]


def test_when_the_one_that_leads_is_back_at_once_another_judges(meeting):
    """The new supervisor knows nothing of what failed, and its host counts as lost."""
    hosts = meeting(0, 1, count=2, sizes=(2,))
    until(lambda: agreed(hosts, [0, 1]))
    hosts[0].die()
    hosts[0] = meeting(0, count=2, sizes=(2,))[0]
    until(lambda: agreed(hosts, [0, 1]))
    assert hosts[1].hosts.generation == 1
    assert (hosts[1].led, hosts[1].lost) == (True, [0])


def test_a_wall_clock_that_jumps_means_nothing(meeting, monkeypatch):
    jumps = iter(range(10**9, -(10**9), -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    hosts = meeting(0, 1, count=2, sizes=(2, 1))
    until(lambda: agreed(hosts, [0, 1]))
    time.sleep(LEASE)
    assert agreed(hosts, [0, 1]) and hosts[0].hosts.generation == 0


@pytest.mark.parametrize("status", [FINISHED, NO_PROGRESS])
def test_the_end_is_told_to_all(meeting, status):
    hosts = meeting(0, 1, count=3, sizes=(2,))
    until(lambda: agreed(hosts, [0, 1]))
    hosts += meeting(2, count=3, sizes=(2,))
    time.sleep(LEASE)  # until it waits
    hosts[0].status = status
    until(lambda: hosts[1].met[-1] == status and hosts[2].met[-1:] == [status])


def test_an_earlier_attempt_binds_nobody(meeting):
    hosts = meeting(0, 1, count=2, sizes=(2,))
    until(lambda: agreed(hosts, [0, 1]))
    hosts[0].status = NO_PROGRESS
    until(lambda: hosts[1].met[-1] == NO_PROGRESS)
    again = meeting(0, 1, count=2, sizes=(2,))
    until(lambda: agreed(again, [0, 1]))
    assert again[0].hosts.generation == 1


def test_too_few_hosts_give_up(meeting):
    hosts = meeting(0, 1, count=3, sizes=(3,), patience=0.5)
    until(lambda: [host.met for host in hosts] == [[LOST], [LOST]])


def test_one_that_was_given_up_ends_nothing(meeting):
    """A stale supervisor's verdict does not reach the generation that goes on without it."""
    hosts = meeting(0, 1, count=2, sizes=(2, 1))
    until(lambda: agreed(hosts, [0, 1]))
    hosts[0].frozen.set()
    until(lambda: agreed(hosts[1:], [1]))
    stale = hosts[0].hosts
    assert not stale.leads or stale.current  # it has not looked yet
    stale.leave(NO_PROGRESS, None, all_end=True)
    assert "status" not in hosts[1].hosts._read("plan.json")
    assert stale.over() and not stale.leads
