"""How keepers and trainers talk: a JSON object and raw bytes at a time, over TCP.

Both ends prove that they know the token in the run's folder before either listens to the other; the
token itself is not sent. Every frame after that carries an HMAC under a key of its connection and
direction, over a counter and the content, so a frame that was changed, repeated, left out or
inserted ends the connection before anything acts on it. Nothing received is ever code. What is sent
is not encrypted.
"""

import contextlib
import functools
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from checkpoint.steps import folder_path, is_remote
from sharding.addresses import own_address

VARIABLE = "TORUS_KEEPER"  # the environment variable that describes the keepers of a run
Message = dict[str, Any]

_NONCE, _PROOF = 32, 32
_LONGEST = 2**28  # bytes of a JSON object
_BLOCK = 2**22  # bytes of content in one frame
_PIECE = 2**18  # bytes handed to the kernel at a time: time-outs are for one of these
_HANDSHAKE = 5.0  # seconds for all of it
_SILENCE = 15.0  # seconds without a byte after which a connection is given up
_TOKEN = "keeper.token"
_PATIENCE = 60.0  # seconds, for the first host to make the token


class Refused(RuntimeError):
    """The other end could not do what it was asked, and why."""


@dataclass(frozen=True)
class Directory:
    """The keepers of a run: where they publish their addresses, and which one is this host's.

    Attributes:
      folder: seen by all hosts.
      host, hosts: this one, of how many.
      processes: trainers on each host.
      near: the address of the first host.
      address: of this host, as the others reach it; "" to find it by the way to `near`.
      takes: whether trainers take snapshots; if not they only restore what the keepers hold.
    """

    folder: str
    host: int = 0
    hosts: int = 1
    processes: int = 1
    near: str = "127.0.0.1"
    address: str = ""
    takes: bool = True

    @classmethod
    def of_environment(cls) -> "Directory | None":
        """Returns what the supervisor told this process, None without one."""
        text = os.environ.get(VARIABLE)
        return cls(**json.loads(text)) if text else None

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    def own_address(self) -> str:
        """Returns the address to listen at. Raises OSError: there is no way to the first host."""
        if self.hosts == 1:
            return "127.0.0.1"
        return self.address or own_address(self.near)

    def make_token(self) -> None:
        """Makes the run's token, on the first host, if there is none."""
        if self.host == 0 and not (folder_path(self.folder) / _TOKEN).exists():
            self._write(_TOKEN, secrets.token_hex(32))

    def publish(self, address: str, port: int) -> None:
        """Tells all hosts where the keeper of this one listens."""
        self._write(f"keeper{self.host}.json", json.dumps([address, port]))

    @functools.cached_property
    def token(self) -> bytes:
        """The run's token, made by the first host; waited for, then an OSError if it is missing."""
        path = folder_path(self.folder) / _TOKEN
        until = time.monotonic() + _PATIENCE
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.05)
        return path.read_text().encode()

    def connect(self, host: int, patience: float = 0.0) -> "Connection":
        """Returns a connection to the keeper of `host`, tried for `patience` seconds.

        Raises:
          OSError: it does not answer, or does not know the token.
        """
        until = time.monotonic() + patience
        while True:
            try:
                text = (folder_path(self.folder) / f"keeper{host}.json").read_text()
                return Connection.open(tuple(json.loads(text)), self.token)
            except (OSError, ValueError) as error:
                if time.monotonic() >= until:
                    raise ConnectionError(f"no keeper of host {host}: {error}") from error
            time.sleep(0.02)

    def ask(self, host: int, message: Message, patience: float = 0.0) -> Message:
        """Connects, asks and returns the answer. Raises OSError, Refused."""
        with self.connect(host, patience) as connection:
            return connection.ask(message)[0]

    def _write(self, name: str, text: str) -> None:
        path = folder_path(self.folder) / name
        if is_remote(self.folder):
            path.write_text(text)
            return
        part = Path(path.with_name(f"{name}.{os.getpid()}"))
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
        part.replace(path)


class _Seal:
    """Authenticates the frames of one direction of a connection, in their order."""

    def __init__(self, key: bytes) -> None:
        self._key, self._count = key, 0

    def tag(self, *parts: memoryview | bytes) -> bytes:
        """Returns the tag of the next frame, which is these parts one after the other."""
        mac = hmac.new(self._key, self._count.to_bytes(8, "big"), "sha256")
        self._count += 1
        for part in parts:
            mac.update(part)
        return mac.digest()


class Connection:
    """One end of an authenticated connection."""

    def __init__(self, sock: socket.socket, sends: bytes, receives: bytes) -> None:
        """sends, receives: keys of the two directions."""
        self._socket = sock
        self.status: dict[str, int] = {}  # how far the answer is that is being worked at
        self._sealing, self._checking = _Seal(sends), _Seal(receives)

    @classmethod
    def open(
        cls, address: tuple[str, int], token: bytes, timeout: float = _SILENCE
    ) -> "Connection":
        """Connects to a keeper. Raises OSError.

        timeout: seconds that may pass without a byte.
        """
        until = time.monotonic() + _HANDSHAKE
        sock = socket.create_connection(address, timeout=_HANDSHAKE)
        with _closing_on_error(sock):
            mine = secrets.token_bytes(_NONCE)
            sock.sendall(mine)
            answer = _receive(sock, _NONCE + _PROOF, until)
            theirs, proof = answer[:_NONCE], answer[_NONCE:]
            if not hmac.compare_digest(proof, _derive(token, b"keeper", mine, theirs)):
                raise ConnectionError("the keeper does not know this run's token")
            sock.sendall(_derive(token, b"client", mine, theirs))
            return cls._proven(sock, token, mine, theirs, timeout, (b"to keeper", b"to client"))

    @classmethod
    def accept(cls, sock: socket.socket, token: bytes, timeout: float = _SILENCE) -> "Connection":
        """The keeper's side of `open`; the stranger has 5 s in all. Raises OSError."""
        until = time.monotonic() + _HANDSHAKE
        with _closing_on_error(sock):
            theirs, mine = _receive(sock, _NONCE, until), secrets.token_bytes(_NONCE)
            sock.sendall(mine + _derive(token, b"keeper", theirs, mine))
            proof = _receive(sock, _PROOF, until)
            if not hmac.compare_digest(proof, _derive(token, b"client", theirs, mine)):
                raise ConnectionError("a client does not know this run's token")
            return cls._proven(sock, token, theirs, mine, timeout, (b"to client", b"to keeper"))

    @classmethod
    def _proven(
        cls, sock: socket.socket, token: bytes, client: bytes, keeper: bytes, timeout: float,
        directions: tuple[bytes, bytes],
    ) -> "Connection":  # fmt: skip
        sock.settimeout(timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock, *(_derive(token, name, client, keeper) for name in directions))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, message: Message, content: Iterable[memoryview] = ()) -> None:
        """Sends an object, and bytes that may lie in several places. Raises OSError."""
        content = list(content)
        text = json.dumps({**message, "size": sum(map(len, content))}).encode()
        self._send_frame(len(text).to_bytes(4, "big"), text)
        for frame in _frames(content):
            self._send_frame(*frame)

    def receive(self) -> Message:
        """Returns the next object; `size` bytes follow it, for `take` or `blocks`."""
        header = self._take(4)
        length = int.from_bytes(header, "big")
        if length > _LONGEST:
            raise ConnectionError(f"a message of {length} bytes")
        text = self._take(length)
        self._check(header, text)
        return json.loads(text)

    def ask(
        self,
        message: Message,
        content: Iterable[memoryview] = (),
        progress: Callable[[Message], None] = lambda _: None,
    ) -> tuple[Message, int]:
        """Returns the answer and how many bytes follow it.

        progress: told what the other end sends to show that it is still at work.

        Raises:
          OSError: the connection ended, or nothing came for as long as its time-out.
          Refused: the other end could not do it.
        """
        self.send(message, content)
        while "progress" in (answer := self.receive()):
            progress(answer)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer, answer["size"]

    def blocks(self, size: int) -> Iterator[tuple[int, memoryview]]:
        """Yields (place, content) of the `size` bytes that follow a message; one buffer for all."""
        buffer = memoryview(bytearray(min(size, _BLOCK)))
        for start in range(0, size, _BLOCK):
            block = buffer[: min(_BLOCK, size - start)]
            self._fill(block)
            self._check(block)
            yield start, block

    def take(self, size: int) -> bytearray:
        """Returns the `size` bytes that follow a message. Raises OSError."""
        content = bytearray(size)
        for start, block in self.blocks(size):
            content[start : start + len(block)] = block
        return content

    def _send_frame(self, *parts: memoryview | bytes) -> None:
        for part in (*parts, self._sealing.tag(*parts)):
            view = memoryview(part)
            while len(view):  # not `sendall`, whose time-out is for all of it
                view = view[self._socket.send(view[:_PIECE]) :]

    def _check(self, *parts: memoryview | bytes) -> None:
        """Raises ConnectionError unless the tag that comes next is that of these parts."""
        if not hmac.compare_digest(self._take(_PROOF), self._checking.tag(*parts)):
            raise ConnectionError("a frame that the other end did not send so")

    def _take(self, size: int) -> bytearray:
        """Returns the next bytes; takes memory only for those that came."""
        content = bytearray()
        while len(content) < size:
            content += self._some(min(size - len(content), _BLOCK))
        return content

    def _fill(self, view: memoryview) -> None:
        while len(view):
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError("the other end is gone")
            view = view[count:]

    def _some(self, most: int) -> bytes:
        if not (found := self._socket.recv(most)):
            raise ConnectionError("the other end is gone")
        return found


@contextlib.contextmanager
def _closing_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def _receive(sock: socket.socket, size: int, until: float) -> bytes:
    """Returns the next bytes, by a time of the monotonic clock. Raises OSError."""
    content = b""
    while len(content) < size:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the handshake takes too long")
        sock.settimeout(left)
        if not (found := sock.recv(size - len(content))):
            raise ConnectionError("the other end is gone")
        content += found
    return content


def _frames(content: list[memoryview]) -> Iterator[list[memoryview]]:
    """Yields the parts of `content` that go into each frame: _BLOCK bytes, the last one fewer."""
    frame, room = [], _BLOCK
    for view in content:
        while len(view):
            frame.append(view[:room])
            view, room = view[room:], room - len(frame[-1])
            if not room:
                yield frame
                frame, room = [], _BLOCK
    if frame:
        yield frame


def _derive(token: bytes, purpose: bytes, client: bytes, keeper: bytes) -> bytes:
    """Returns a proof or a key that only those who know the token can compute."""
    return hmac.digest(token, purpose + client + keeper, "sha256")
