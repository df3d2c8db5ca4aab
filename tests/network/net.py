"""Hosts as network namespaces, and the switch between them, which runs in user space.

    with Net(3) as net:
        net.popen(0, ["torus", ...])
        net.faults(cut=[(2, 0), (2, 1)])     # what host 2 sends is lost

Each host has a tap device in a namespace of its own; this module, run as a process, reads frames
from all taps and writes each to the one that it is for. What is lost, late or slow is read from a
file again whenever that changes:

    cut     [from, to] pairs of hosts: that direction loses everything
    delay   seconds each way
    loss    share of frames
    rate    bytes per second towards each host, for TCP from or to these `ports` only

Hosts have addresses 10.89.0.10, … and fd89::10, …, and names that /etc/netns gives them. One more,
"x", is a stranger's. Root, `ip` and /dev/net/tun are needed.
"""

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

PREFIX = "torus"  # of hosts' names
_SPACES = "torus-net-"  # of namespaces' names: then comes the process that uses them
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_MTU, _BUFFER = 9000, 3.0  # seconds of a slow link that the switch holds


def missing() -> str:
    """Returns why no such network can be made here, "" if it can."""
    if os.geteuid() != 0:
        return "not root"
    if shutil.which("ip") is None:
        return "no `ip` (iproute2)"
    if not os.path.exists("/dev/net/tun"):
        return "no /dev/net/tun"
    name = f"{_SPACES}{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made.stderr.strip()


def address(host: int, *, six: bool = False) -> str:
    return f"fd89::{10 + host}" if six else f"10.89.0.{10 + host}"


class Net:
    """A network of `count` hosts and a stranger, for as long as the context lasts."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._folder = Path(tempfile.mkdtemp(prefix="torus-net-"))
        self._faults = self._folder / "faults.json"
        self._prefix = f"{_SPACES}{os.getpid()}-"

    def __enter__(self) -> Self:
        _remove_stale()
        line = [sys.executable, "-m", "tests.network.net"]
        line += [str(self.count), str(self._faults), self._prefix]
        self._switch = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        if self._switch.stdout.readline() != "up\n":
            self.__exit__()
            raise OSError("the switch does not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._switch.kill()
        self._switch.wait()
        self._switch.stdout.close()
        _remove(self._prefix)
        shutil.rmtree(self._folder)

    def faults(self, **given: Any) -> None:
        """Has the switch do this from now on; nothing mends the network."""
        part = self._faults.with_suffix(".part")
        part.write_text(json.dumps(given))
        part.rename(self._faults)

    def cut(self, host: int, *, sends: bool = True, hears: bool = True) -> None:
        """Takes a host's network away, or one direction of it."""
        others = [n for n in range(self.count) if n != host]
        pairs = [(host, n) for n in others] * sends + [(n, host) for n in others] * hears
        self.faults(cut=pairs)

    def popen(self, host: int | str, line: Sequence[str], **options: Any) -> subprocess.Popen:
        """Starts a process on a host."""
        line = ["ip", "netns", "exec", self.space(host), *line]
        return subprocess.Popen(line, **options)

    def space(self, host: int | str) -> str:
        """Returns the name of a host's namespace."""
        return f"{self._prefix}{host}"

    def hosts_file(self, host: int | str, names: dict[str, str]) -> None:
        """Gives a host these names → addresses, for processes that start later."""
        lines = ["127.0.0.1 localhost", *(f"{where} {name}" for name, where in names.items())]
        Path(f"/etc/netns/{self.space(host)}/hosts").write_text("\n".join(lines) + "\n")


def _spaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(_SPACES)]


def _remove_stale() -> None:
    """Removes what tests left behind that were killed."""
    for owner in {name.removeprefix(_SPACES).split("-")[0] for name in _spaces()}:
        if not os.path.exists(f"/proc/{owner}"):
            _remove(f"{_SPACES}{owner}-")


def _remove(prefix: str) -> None:
    for name in [name for name in _spaces() if name.startswith(prefix)]:
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


# ------------------------------------------------------------ the switch, a process of its own


def _mac(number: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, 10 + number])


def _make_host(space: str, number: int, names: Iterable[tuple[int, str]]) -> int:
    """Makes a namespace with a tap device; returns the device's other end."""
    subprocess.run(["ip", "netns", "add", space], check=True)
    folder = Path(f"/etc/netns/{space}")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{address(n)} {PREFIX}{each}" for n, each in names]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
    (folder / "resolv.conf").write_text("")
    back, there = (os.open(p, os.O_RDONLY) for p in ("/proc/self/ns/net", f"/run/netns/{space}"))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(there, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP | _IFF_NO_PI))
    libc.setns(back, _CLONE_NEWNET)
    for line in (
        f"link set eth0 address {_mac(number).hex(':')} mtu {_MTU}",
        "link set lo up",
        f"addr add {address(number)}/24 dev eth0",
        f"addr add {address(number, six=True)}/64 dev eth0 nodad",
        "link set eth0 up",
    ):
        subprocess.run(["ip", "-n", space, *line.split()], check=True)
    return tap


class _Switch:
    def __init__(self, taps: list[int], faults: Path) -> None:
        self._taps, self._path = taps, faults
        self._seen = 0
        self._faults: dict[str, Any] = {}
        self._cut: set[tuple[int, int]] = set()
        self._late: list[tuple[float, int, int, bytes]] = []  # when, order, to, frame
        self._order = 0
        self._busy = [0.0] * len(taps)  # until when a slow link is

    def run(self) -> None:
        poll = select.poll()
        for tap in self._taps:
            poll.register(tap, select.POLLIN)
        while True:
            self._look()
            now = time.monotonic()
            while self._late and self._late[0][0] <= now:
                _, _, to, frame = heapq.heappop(self._late)
                self._write(to, frame)
            wait = min(0.05, self._late[0][0] - now) if self._late else 0.05
            for tap, _ in poll.poll(1000 * wait):
                for _ in range(64):
                    try:
                        frame = os.read(tap, _MTU + 100)
                    except BlockingIOError:
                        break
                    self._forward(self._taps.index(tap), frame)

    def _look(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            stamp = self._path.stat().st_mtime_ns
            if stamp != self._seen:
                self._faults, self._seen = json.loads(self._path.read_text()), stamp
                self._cut = {(a, b) for a, b in self._faults.get("cut", [])}

    def _forward(self, source: int, frame: bytes) -> None:
        macs = [_mac(number) for number in range(len(self._taps))]
        known = frame[:6] in macs
        targets = [macs.index(frame[:6])] if known else range(len(self._taps))
        for to in targets:
            if to == source or (source, to) in self._cut:
                continue
            if random.random() < self._faults.get("loss", 0):
                continue
            at = time.monotonic() + self._faults.get("delay", 0)
            if self._is_slow(frame):
                begins = max(time.monotonic(), self._busy[to])
                if begins - time.monotonic() > _BUFFER:
                    continue
                self._busy[to] = begins + len(frame) / self._faults["rate"]
                at += self._busy[to] - time.monotonic()
            self._order += 1
            heapq.heappush(self._late, (at, self._order, to, frame))

    def _is_slow(self, frame: bytes) -> bool:
        if "rate" not in self._faults or frame[12:14] != b"\x08\x00" or frame[23] != 6:
            return False
        return bool(set(struct.unpack("!HH", frame[34:38])) & set(self._faults["ports"]))

    def _write(self, to: int, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # its queue is full: lost, as in a real switch
            os.write(self._taps[to], frame)


def main() -> None:
    names = list(enumerate([*map(str, range(int(sys.argv[1]))), "x"]))
    taps = [_make_host(f"{sys.argv[3]}{name}", number, names) for number, name in names]
    print("up", flush=True)
    _Switch(taps, Path(sys.argv[2])).run()


if __name__ == "__main__":
    main()
