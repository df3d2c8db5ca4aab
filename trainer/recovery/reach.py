"""Which hosts reach each other: every launcher listens at a port, and tries those of the others.

A host may live, and write to the run's folder, while the network between the hosts is dead: a
generation with it would never leave its start. So all launchers connect to each other the whole
time (TCP, both ways are needed for that) and tell in their beats how long ago they last did.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Mapping, Sequence

Links = Mapping[int, Mapping[int, float]]  # host → host that it reached → how many seconds ago


class Reach:
    """Tries the other hosts, each in a thread of its own; `every` and time-out are in seconds."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._places: dict[int, tuple[str, int]] = {}
        self._reached: dict[int, float] = {}  # host → when, by the monotonic clock
        self._wakes: dict[int, threading.Event] = {}
        self._closed = False
        if socket.has_dualstack_ipv6():
            self._socket = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256
            )
        else:
            self._socket = socket.create_server(("", 0), backlog=256)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def watch(self, host: int, address: str, port: int) -> None:
        """Tries a host at this place from now on."""
        if self._places.get(host) != (address, port):
            self._places[host] = address, port
            if host not in self._wakes:
                self._wakes[host] = threading.Event()
                threading.Thread(target=self._try, args=(host,), daemon=True).start()
            self._wakes[host].set()

    def hurry(self) -> None:
        """Tries all hosts at once."""
        for wake in self._wakes.values():
            wake.set()

    def ages(self) -> dict[str, float]:
        """Returns, for the hosts that were reached, how many seconds ago they last were.

        Keys are text, as in the JSON that other hosts read.
        """
        now = time.monotonic()
        reached = self._reached.copy()
        return {str(host): round(now - at, 1) for host, at in reached.items()}

    def close(self) -> None:
        """Ends the threads and gives the port back."""
        self._closed = True
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()
        self.hurry()

    def _answer(self) -> None:
        """Says nothing: that a connection is made is the answer."""
        while not self._closed:
            try:
                self._socket.accept()[0].close()
            except OSError:  # it was gone again, or this process may open no more files
                time.sleep(0.1)

    def _try(self, host: int) -> None:
        while not self._closed:
            self._wakes[host].clear()
            try:
                with socket.create_connection(self._places[host], timeout=self._every):
                    self._reached[host] = time.monotonic()
            except OSError:  # not this time; how long that is so already is what counts
                pass
            self._wakes[host].wait(self._every)


def connected(hosts: Sequence[int], links: Links, within: float) -> list[int]:
    """Returns as many of `hosts` as reach each other, both ways and within so many seconds.

    Hosts that miss most of the others are left out one by one, of equal ones the last.
    """
    left = list(hosts)
    if not left:
        return left

    def missed(host: int) -> int:
        return sum(
            max(links.get(a, {}).get(b, float("inf")) for a, b in ((host, n), (n, host))) > within
            for n in left
            if n != host
        )

    while worst := max((missed(host), host) for host in left)[0]:
        left.remove(max(host for host in left if missed(host) == worst))
    return left
