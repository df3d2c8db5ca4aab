"""Where hosts reach each other, in both families."""

import socket

import pytest
from jax._src import xla_bridge

from sharding import runtime
from sharding.addresses import ADDRESS, is_loopback, join_port, own_address, without_port


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node7:1234", "node7"), ("node7", "node7"), ("10.0.0.3:1", "10.0.0.3"),
        ("[fd77::10]:1234", "fd77::10"), ("[fd77::10]", "fd77::10"), ("fd77::10", "fd77::10"),
        ("::1", "::1"), ("a.b.c:x", "a.b.c:x"),
    ],
)  # fmt: skip
def test_the_port_is_taken_off(text, host):
    assert without_port(text) == host


def test_an_address_and_a_port_join_in_both_families():
    assert join_port("10.0.0.3", 7) == "10.0.0.3:7" and join_port("n", 7) == "n:7"
    assert join_port("fd77::10", 7) == "[fd77::10]:7"
    for address in ("10.0.0.3", "fd77::10", "::1"):
        assert without_port(join_port(address, 7)) == address


def test_the_own_address_is_that_of_the_way_there():
    assert own_address("127.0.0.1") == own_address("localhost") == "127.0.0.1"
    assert is_loopback("127.0.1.1") and is_loopback("::1") and not is_loopback("10.0.0.3")
    with pytest.raises(OSError, match=r"not known|resolution"):
        own_address("no-such-host.invalid")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_the_own_address_may_be_of_ipv6():
    assert own_address("::1") == "::1"


@pytest.mark.parametrize(
    ("told", "coordinator", "hostname"),
    [
        ("10.1.2.3", "node0:1", "10.1.2.3"),  # the launcher knows
        ("", "127.0.0.1:1", "127.0.0.1"),
        ("", "localhost:1", "127.0.0.1"),
        ("", "[::1]:1", "::1"),
        ("", "me:1", None),  # a name that means this machine to itself alone
        ("", "no-such-host.invalid:1", None),
    ],
)
def test_collectives_listen_where_others_reach_this_host(monkeypatch, told, coordinator, hostname):
    asked = []
    monkeypatch.setattr(xla_bridge._jax, "make_gloo_tcp_collectives", lambda **k: asked.append(k))
    if coordinator == "me:1":
        monkeypatch.setattr(runtime, "own_address", lambda near: "127.0.1.1")
    if told:
        monkeypatch.setenv(ADDRESS, told)
    else:
        monkeypatch.delenv(ADDRESS, raising=False)
    runtime._name_this_host(coordinator)
    xla_bridge._jax.make_gloo_tcp_collectives(distributed_client=1)
    assert asked == [{"distributed_client": 1} | ({"hostname": hostname} if hostname else {})]


def test_without_that_function_of_jax_nothing_breaks(monkeypatch):
    monkeypatch.setattr(xla_bridge, "_jax", object())
    runtime._name_this_host("127.0.0.1:1")
