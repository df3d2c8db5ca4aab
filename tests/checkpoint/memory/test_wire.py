"""Who is heard over the wire, and how long it is waited for: no keepers, both ends are here."""

import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from checkpoint.memory import wire
from checkpoint.memory.wire import Connection, Refused

TOKEN = b"secret"
Alter = Callable[[list[bytes]], list[bytes]]


@contextmanager
def pair(token: bytes = TOKEN, timeout: float = 5.0) -> Iterator[list]:
    """Yields what the keeper's and the client's end are: connections, or errors."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = [None, None]

        def accept() -> None:
            try:
                found[0] = Connection.accept(server.accept()[0], TOKEN, timeout)
            except OSError as error:
                found[0] = error

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            found[1] = Connection.open(server.getsockname(), token, timeout)
        except OSError as error:
            found[1] = error
        thread.join()
        yield found
        for end in found:
            if isinstance(end, Connection):
                end.__exit__()


def test_only_who_knows_the_token_is_heard():
    with pair(b"guess") as (keeper, client):
        assert isinstance(keeper, OSError) and isinstance(client, OSError)
        assert "token" in str(client)
    with pair() as (keeper, client):
        content = np.arange(10**6, dtype=np.uint8)
        client.send({"op": "add"}, [memoryview(content[:3]), memoryview(content[3:])])
        assert keeper.receive() == {"op": "add", "size": 10**6}
        assert keeper.take(10**6) == content.tobytes()
        client._socket.sendall(struct.pack(">I", 2**31))
        with pytest.raises(OSError, match="message of 2147483648 bytes"):
            keeper.receive()


@pytest.mark.parametrize("size", [0, 1, wire._BLOCK - 1, wire._BLOCK, 2 * wire._BLOCK + 5])
def test_content_in_any_parts_arrives_as_it_was(size):
    content = os.urandom(size)
    cuts = sorted({0, size // 3, size // 2, size})
    parts = [memoryview(content)[a:b] for a, b in itertools.pairwise(cuts)]
    with pair() as (keeper, client):
        thread = threading.Thread(target=client.send, args=({"n": 1}, parts))
        thread.start()
        assert keeper.take(keeper.receive()["size"]) == content
        thread.join()


class Frames:
    """What one end would send, as the wire sees it: the frames of two messages with content."""

    def __init__(self, seal: wire._Seal) -> None:
        self.sent: list[bytes] = []
        end = Connection(self, b"", b"")
        end._sealing = seal
        for number in (1, 2):
            end.send({"op": f"message {number}"}, [memoryview(os.urandom(100))])

    def send(self, view: memoryview) -> int:
        self.sent.append(bytes(view))
        return len(view)


def flip(place: int) -> Alter:
    def alter(parts: list[bytes]) -> list[bytes]:
        part = bytearray(parts[place])
        part[-1] ^= 1
        return [*parts[:place], bytes(part), *parts[place + 1 :]]

    return alter


@pytest.mark.parametrize(
    "alter",
    [
        flip(1),  # of the object
        flip(2),  # of its tag
        flip(3),  # of the content
        flip(4),
        lambda parts: parts[:5] + parts[:5],  # the first message once more
        lambda parts: parts[5:],  # it is missing
        lambda parts: parts[5:] + parts[:5],  # the other order
        lambda parts: [*parts[:3], parts[8], parts[4]],  # content of another message
        lambda parts: [struct.pack(">I", 2), b"{}", bytes(32), *parts],  # a stranger's
    ],
)
def test_a_frame_that_was_not_sent_so_ends_the_connection(alter):
    with pair() as (keeper, client):
        parts = Frames(client._sealing).sent  # length, object, tag, content, tag; twice
        assert len(parts) == 10
        client._socket.sendall(b"".join(alter(parts)))
        with pytest.raises(ConnectionError, match="did not send"):
            for _ in range(2):
                keeper.take(keeper.receive()["size"])


def test_what_one_end_said_cannot_be_said_back_to_it():
    with pair() as (keeper, client):
        parts = Frames(client._sealing).sent
        keeper._socket.sendall(b"".join(parts))
        with pytest.raises(ConnectionError, match="did not send"):
            client.receive()


def test_a_stranger_has_a_few_seconds_in_all(monkeypatch):
    """A byte at a time does not give more."""
    monkeypatch.setattr(wire, "_HANDSHAKE", 0.4)
    ours, theirs = socket.socketpair()
    done = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):  # the keeper hung up, as it should
            while not done.wait(0.1):
                theirs.send(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    began = time.monotonic()
    with pytest.raises(OSError, match=r"timed out|too long"):
        Connection.accept(ours, TOKEN)
    assert time.monotonic() - began < 2.0
    done.set()
    thread.join()
    theirs.close()


def test_a_slow_reader_is_not_given_up_while_it_reads():
    """4 MiB in 1.5 s with a time-out of 0.5 s: what counts is that bytes go, not all of them."""
    with pair(timeout=0.5) as (keeper, client):
        for end, option in ((client, socket.SO_SNDBUF), (keeper, socket.SO_RCVBUF)):
            end._socket.setsockopt(socket.SOL_SOCKET, option, 2**16)
        content = os.urandom(wire._BLOCK)
        thread = threading.Thread(target=client.send, args=({}, [memoryview(content)]))
        thread.start()
        size, found = keeper.receive()["size"], b""
        while len(found) < size:
            time.sleep(0.1)
            found += keeper._take(min(size // 15, size - len(found)))
        assert found == content
        thread.join()


def test_an_answer_that_takes_long_is_waited_for_as_long_as_it_is_worked_at():
    with pair(timeout=0.4) as (keeper, client):

        def work() -> None:
            keeper.receive()
            for number in range(5):
                time.sleep(0.2)
                keeper.send({"progress": {"done": number}})
            keeper.send({"error": "no room"})

        thread = threading.Thread(target=work)
        thread.start()
        heard = []
        with pytest.raises(Refused, match="no room"):
            client.ask({"op": "rebuild"}, progress=heard.append)
        assert [message["progress"]["done"] for message in heard] == [0, 1, 2, 3, 4]
        thread.join()
    with pair(timeout=0.2) as (keeper, client), pytest.raises(TimeoutError):
        client.ask({"op": "rebuild"})
