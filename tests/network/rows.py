"""What is done to the network, row by row, and what the run must make of it."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tests.network.net import address
from tests.network.play import HOSTS, STRIKE, Play
from tests.processes import ROOT

ROWS: dict[str, Callable[[Play, Path], None]] = {}
ELASTIC = ("--mesh", "3", "--mesh", "2")
LATER = "step=0.4"  # for plays that need the run to go on for a while after the fault


def row(name: str) -> Callable[[Callable[[Play, Path], None]], Callable[[Play, Path], None]]:
    def add(play: Callable[[Play, Path], None]) -> Callable[[Play, Path], None]:
        ROWS[name] = play
        return play

    return add


@row("cut of 5 s")
def cut_5(p: Play, calm: Path) -> None:
    """TCP repeats what was lost; nobody notices."""
    p.run_to_fault()
    p.net.cut(2)
    time.sleep(5)
    p.net.faults()
    p.ends(0, 0, 0)
    assert not p.incidents(), f"incidents: {p.incidents()}"
    p.same_bits(calm)


def cut_60(p: Play, calm: Path, slow: str) -> None:
    p.run_to_fault(slow=slow)
    p.net.cut(2)
    time.sleep(60)
    p.net.faults()
    p.ends(0, 0, 0)
    p.blames(hosts=[2])
    p.from_memory()
    p.never_silent()
    p.same_bits(calm)


row("cut of 60 s")(lambda p, calm: cut_60(p, calm, "step=0.15"))
row("cut of 60 s, slow data")(lambda p, calm: cut_60(p, calm, "data=0.15"))


@row("cut for ever")
def cut_for_ever(p: Play, calm: Path) -> None:
    p.run_to_fault(*ELASTIC)
    p.net.cut(2)
    p.until(lambda: p.incidents("resized"), "two hosts", 120)
    assert p.incidents("resized")[0]["lost"] == [2]
    p.ends(0, 0, 0)
    p.blames(hosts=[2])
    p.from_memory()
    p.never_silent(0, 1)
    p.near(calm)


@row("partition around the leader")
def partition(p: Play, calm: Path) -> None:
    p.run_to_fault(*ELASTIC, slow=LATER)
    p.net.cut(0)
    p.until(lambda: p.incidents("resized"), "two hosts", 120)
    assert p.incidents("resized")[0]["lost"] == [0]
    time.sleep(5)
    p.net.faults()
    p.until(lambda: len(p.incidents("resized")) > 1, "three hosts again", 120)
    p.ends(0, 0, 0)
    p.blames(hosts=[0])
    assert len(p.incidents("host lost")) == 1
    p.from_memory()
    p.never_silent(1, 2)
    p.near(calm)


@row("one-way cut")
def one_way(p: Play, calm: Path) -> None:
    """Host 2 is heard and hears nothing."""
    p.run_to_fault()
    p.net.cut(2, sends=False)
    time.sleep(40)
    p.net.faults()
    p.ends(0, 0, 0)
    p.blames(hosts=[2])
    p.from_memory()
    p.never_silent()
    p.same_bits(calm)


def dead_and_back(p: Play, calm: Path, host: int) -> None:
    p.run_to_fault()
    p.net.cut(host)  # no RST tells the others
    p.kill(host)
    time.sleep(20)
    p.net.faults()
    p.start_host(host)
    p.ends(0, 0, 0)
    p.blames(hosts=[host])
    assert p.from_memory()["source"] == "parity"
    p.never_silent(*({0, 1, 2} - {host}))
    p.same_bits(calm)


row("dead host and back")(lambda p, calm: dead_and_back(p, calm, 1))
row("dead leader and back")(lambda p, calm: dead_and_back(p, calm, 0))


@row("dead host, gone for good")
def gone(p: Play, calm: Path) -> None:
    p.run_to_fault(*ELASTIC)
    p.net.cut(1)
    p.kill(1)
    p.ends(0, 0)
    p.blames(hosts=[1])
    p.from_memory()
    p.never_silent(0, 2)
    p.near(calm)


@row("cut of network and folder")
def with_folder(p: Play, calm: Path) -> None:
    p.run_to_fault(*ELASTIC, slow=LATER)
    p.net.cut(2)
    p.cut_folder(2)
    p.until(lambda: p.incidents("resized"), "two hosts", 120)
    p.net.faults()
    p.mend_folder(2)
    p.until(lambda: len(p.incidents("resized")) > 1, "three hosts again", 120)
    p.ends(0, 0, 0)
    p.blames(hosts=[2])
    p.from_memory()
    p.never_silent(0, 1)
    p.near(calm)


@row("50 ms and 1 % loss")
def slow(p: Play, calm: Path) -> None:
    """Steps take some seconds then, for gloo takes many round trips; goes on, without an alarm."""
    p.run_to_fault()
    p.net.faults(delay=0.05, loss=0.01)
    time.sleep(60)
    p.net.faults()
    p.ends(0, 0, 0)
    found = p.incidents()
    assert all("rank" not in i and "hosts" not in i for i in found), f"blamed: {found}"
    p.same_bits(calm)


@row("1 Mb/s between keepers")
def narrow(p: Play, calm: Path) -> None:
    p.start(slow=LATER)
    p.at_step(3)
    files = [p.run / f"launch/keeper{host}.json" for host in range(HOSTS)]
    ports = [json.loads(file.read_text())[1] for file in files]
    p.net.faults(rate=125_000, ports=ports)
    p.at_step(STRIKE + 10)
    p.strike()
    p.recovers(1, calm, lost=STRIKE + 10)


@row("a clock off by hours")
def clock(p: Play, calm: Path) -> None:
    path = f"{ROOT}/tests/chaos/clock{os.pathsep}{ROOT}"
    p.run_to_fault(PYTHONPATH=path, CLOCK_JUMP="1")
    p.recovers(1, calm)


STRANGER = """
import os, socket, sys, time
address, port = sys.argv[1], int(sys.argv[2])
held = []
while True:
    for kind in range(1000):
        try:
            s = socket.create_connection((address, port), timeout=1)
            if kind % 4 == 0: s.sendall(os.urandom(32) + os.urandom(32))  # a wrong proof
            if kind % 4 == 1: s.sendall(os.urandom(1 << 16))
            held.append(s)
        except OSError:
            pass
        for s in held[-1000:][::10]:  # a byte now and then
            try: s.send(b"x")
            except OSError: pass
        held = held[-1000:]
"""


@row("strangers")
def strangers(p: Play, calm: Path) -> None:
    """A thousand connections with wrong proofs, garbage, silence and a byte at a time."""
    p.start(slow=LATER)
    p.at_step(5)
    port = json.loads((p.run / "launch/keeper0.json").read_text())[1]
    other = p.net.popen("x", ["python3", "-c", STRANGER, address(0), str(port)])
    try:
        p.at_step(STRIKE)
        p.strike()
        p.recovers(1, calm, lost=12)
    finally:
        other.kill()
        other.wait()


def names(p: Play, calm: Path, own: str) -> None:
    """Every host's own name, and that of the machine, lead to `own` as it sees them."""
    for host in range(HOSTS):
        known = {f"torus{n}": address(n) for n in range(HOSTS) if n != host}
        ours = own.format(host)
        p.net.hosts_file(host, {**known, f"torus{host}": ours, socket.gethostname(): ours})
    p.run_to_fault()
    p.recovers(1, calm)


row("Debian's 127.0.1.1")(lambda p, calm: names(p, calm, "127.0.1.1"))


@row("a name of another network")
def two_networks(p: Play, calm: Path) -> None:
    for host in range(HOSTS):
        known = {f"torus{n}": address(n) for n in range(HOSTS)}
        p.net.hosts_file(host, {**known, socket.gethostname(): f"10.98.0.{host}"})
    p.run_to_fault()
    p.recovers(1, calm)


@row("ipv6")
def ipv6(p: Play, calm: Path) -> None:
    p.first = f"[{address(0, six=True)}]:1"
    p.run_to_fault()
    p.recovers(1, calm)


@row("relays")
def relays(p: Play, calm: Path) -> None:
    """One who relays what goes to the first keeper adds a message of its own, and holds the line.

    A process waits 15 s for an answer, some 36 steps, before it asks again.
    """
    p.start(slow=LATER)
    p.at_step(5)
    path = p.run / "launch/keeper0.json"
    kept = path.read_text()
    where = json.loads(kept)
    relay = p.net.popen("x", ["python3", "-c", RELAY, str(where[0]), str(where[1]), "4000"])
    try:
        path.write_text(json.dumps([address(HOSTS), 4000]))
        time.sleep(5)
        path.write_text(kept)
        p.at_step(STRIKE + 29)
        p.strike()
        p.recovers(1, calm, lost=12)
    finally:
        with contextlib.suppress(OSError):
            relay.kill()
        relay.wait()


RELAY = """
import json, socket, sys, threading
keeper, listening = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
evil = json.dumps({"op": "decided", "run": "0", "next": 10**9, "committed": -1, "size": 0}).encode()
def pump(a, b, inject):
    count = 0
    try:
        while data := a.recv(1 << 16):
            count += len(data)
            if inject and count > 64:  # the handshake is over: first say something of our own
                b.sendall(len(evil).to_bytes(4, "big") + evil)
                inject = False
            b.sendall(data)
    except OSError: pass
    for s in (a, b): s.close()
server = socket.create_server(("", listening))
while True:
    client, _ = server.accept()
    other = socket.create_connection(keeper)
    threading.Thread(target=pump, args=(client, other, True), daemon=True).start()
    threading.Thread(target=pump, args=(other, client, False), daemon=True).start()
"""
