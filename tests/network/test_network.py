"""Launchers and keepers on three hosts in network namespaces: what trainers are not needed for.

`python -m tests.network` plays whole runs.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from checkpoint.memory.wire import VARIABLE, Directory
from tests.network.net import Net, address, missing
from tests.processes import ROOT

pytestmark = [pytest.mark.multiprocess, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def net():
    with Net(3) as made:
        yield made


class Launchers:
    """A launcher on each host, and what it said."""

    def __init__(self, net: Net, folder, first: str, sizes: str) -> None:
        self.said: list[list[str]] = [[], [], []]
        self.jobs: list[subprocess.Popen] = []
        self.listeners: list[threading.Thread] = []
        for host in range(3):
            line = [sys.executable, "-m", "tests.network.hosts"]
            line += [str(folder), str(host), "3", first, sizes]
            job = net.popen(host, line, cwd=ROOT, text=True, stdout=subprocess.PIPE)
            self.jobs.append(job)
            listener = threading.Thread(target=self._listen, args=(host, job))
            listener.start()
            self.listeners.append(listener)

    def _listen(self, host: int, job: subprocess.Popen) -> None:
        for line in job.stdout:
            self.said[host].append(line.strip())

    def until(self, *wanted: tuple[int, str], seconds: float = 30.0) -> None:
        """Waits until each host's last generation has these members."""
        deadline = time.monotonic() + seconds

        def members(host: int) -> str:
            return next((s.split()[1] for s in self.said[host][::-1] if s[0].isdigit()), "")

        while not all(members(host) == found for host, found in wanted):
            assert time.monotonic() < deadline, f"said: {self.said}"
            time.sleep(0.05)

    def close(self) -> None:
        for job, listener in zip(self.jobs, self.listeners, strict=True):
            job.kill()
            job.wait()
            listener.join()
            job.stdout.close()


@pytest.fixture
def launchers(net, tmp_path):
    made = []

    def start(first: str, sizes: str) -> Launchers:
        made.append(Launchers(net, tmp_path / "launch", first, sizes))
        return made[-1]

    yield start
    net.faults()
    for each in made:
        each.close()


@pytest.mark.parametrize(
    ("cut", "members"),
    [
        pytest.param({"host": 2}, "0+1", marks=pytest.mark.soak),
        ({"host": 0}, "1+2"),
        pytest.param({"host": 1, "sends": False}, "0+2", marks=pytest.mark.soak),
    ],
)
def test_a_host_without_network_is_left_out_and_taken_again(net, launchers, cut, members):
    """Its folder lives. The one that leads, and one that is heard but hears nothing, too."""
    job = launchers("torus0", "3,2")
    job.until((0, "0+1+2"), (1, "0+1+2"), (2, "0+1+2"))
    net.cut(**cut)
    job.until(*((int(host), members) for host in members.split("+")))
    assert f"lost {cut['host']}" in [line for said in job.said for line in said]
    net.faults()
    job.until((0, "0+1+2"), (1, "0+1+2"), (2, "0+1+2"))


def test_addresses_are_those_that_others_reach(net, launchers):
    """Also of a first host whose name is 127.0.1.1 to itself, and in IPv6."""
    net.hosts_file(0, {"torus0": "127.0.1.1"})
    job = launchers("torus0", "3")
    job.until((0, "0+1+2"), (1, "0+1+2"), (2, "0+1+2"))
    assert [said[0].split()[2] for said in job.said] == [address(host) for host in range(3)]


def test_hosts_meet_in_ipv6(net, launchers, tmp_path):
    job = launchers(address(0, six=True), "3")
    job.until((0, "0+1+2"), (1, "0+1+2"), (2, "0+1+2"))
    found = [said[0].split()[2] for said in job.said]
    assert found == [address(host, six=True) for host in range(3)]
    plan = json.loads((tmp_path / "launch/plan.json").read_text())
    assert plan["coordinator"].startswith(f"[{address(0, six=True)}]:")


@pytest.mark.parametrize("six", [pytest.param(False, marks=pytest.mark.soak), True])
def test_keepers_listen_at_the_address_of_their_host_and_talk(net, tmp_path, six):
    """Another address of the same host is not answered; over the network a keeper is."""
    directories = [
        Directory(str(tmp_path), host, 3, 1, address(0, six=six), address(host, six=six))
        for host in range(3)
    ]
    with contextlib.ExitStack() as stack:
        for host, directory in enumerate(directories[:2]):
            job = net.popen(
                host, [sys.executable, "-m", "trainer.recovery.keeper"], cwd=ROOT,
                env={**os.environ, **directory.environment()},
            )  # fmt: skip
            stack.callback(job.wait)
            stack.callback(job.kill)
        ask = (
            "from checkpoint.memory.wire import Directory\n"
            "print(Directory.of_environment().ask(0, {'op': 'survey'}, 20)['parity'])\n"
        )
        for host in (0, 1):
            env = {**os.environ, VARIABLE: directories[host].environment()[VARIABLE]}
            done = net.popen(
                host, [sys.executable, "-c", ask], cwd=ROOT, env=env, text=True,
                stdout=subprocess.PIPE,
            )  # fmt: skip
            assert done.communicate(timeout=40)[0] == "[]\n"
        where, port = json.loads((tmp_path / "keeper0.json").read_text())
        assert where == address(0, six=six)
        probe = f"import socket; socket.create_connection(('localhost', {port}), timeout=5)"
        done = net.popen(0, [sys.executable, "-c", probe], stderr=subprocess.PIPE, text=True)
        assert "ConnectionRefusedError" in done.communicate(timeout=40)[1]
