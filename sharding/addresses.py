"""Addresses of hosts: which one others reach this host at, and how an address and a port join."""

import socket

ADDRESS = "TORUS_ADDRESS"  # the environment variable with this host's address for the others


def own_address(near: str) -> str:
    """Returns the address under which this host is seen from where `near` is; sends nothing.

    Raises:
      OSError: the name is not known, or no way leads there.
    """
    problem: OSError | None = None
    for family, kind, _, _, address in socket.getaddrinfo(near, 9, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                return probe.getsockname()[0]
        except OSError as error:
            problem = error
    raise problem or OSError(f"{near} has no address")


def is_loopback(address: str) -> bool:
    """Whether only processes of the same host reach this address."""
    return address.startswith("127.") or address == "::1"


def join_port(address: str, port: int) -> str:
    """Returns `address:port`, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def without_port(address: str) -> str:
    """Returns the host of `host:port`, `[v6]:port`, `[v6]` and `host`."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    host, _, port = address.rpartition(":")
    return host if port.isdecimal() and ":" not in host and host else address
