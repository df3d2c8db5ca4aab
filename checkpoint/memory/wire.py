"""How keepers and trainers talk: a JSON object and raw bytes at a time, over TCP.

Both ends prove that they know the token in the run's folder before either listens to the other; the
token itself is not sent. Nothing received is ever code. What is sent is not encrypted.
"""

import functools
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from checkpoint.steps import folder_path, is_remote

VARIABLE = "TORUS_KEEPER"  # the environment variable that describes the keepers of a run
Message = dict[str, Any]

_NONCE, _PROOF = 16, 32
_LONGEST = 2**28  # bytes of a JSON object
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
    """

    folder: str
    host: int = 0
    hosts: int = 1
    processes: int = 1
    near: str = "127.0.0.1"

    @classmethod
    def of_environment(cls) -> "Directory | None":
        """Returns what the supervisor told this process, None without one."""
        text = os.environ.get(VARIABLE)
        return cls(**json.loads(text)) if text else None

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    def publish(self, port: int) -> None:
        """Says where this host's keeper listens; the first host's makes the token before."""
        if self.host == 0 and not (folder_path(self.folder) / _TOKEN).exists():
            self._write(_TOKEN, secrets.token_hex(32))
        address = own_address(self.near) if self.host else self.near
        if self.hosts == 1:
            address = "127.0.0.1"
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


class Connection:
    """One end of an authenticated connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    def open(cls, address: tuple[str, int], token: bytes, timeout: float = 30.0) -> "Connection":
        """Connects to a keeper. Raises OSError."""
        sock = socket.create_connection(address, timeout=5.0)
        sock.settimeout(timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = cls(sock)
        try:
            mine = secrets.token_bytes(_NONCE)
            sock.sendall(mine)
            theirs, proof = connection.take(_NONCE), connection.take(_PROOF)
            if not hmac.compare_digest(proof, _proof(token, b"keeper", mine, theirs)):
                raise ConnectionError("the keeper does not know this run's token")
            sock.sendall(_proof(token, b"client", mine, theirs))
        except BaseException:
            sock.close()
            raise
        return connection

    @classmethod
    def accept(cls, sock: socket.socket, token: bytes, timeout: float = 30.0) -> "Connection":
        """The keeper's side of `open`. Raises OSError."""
        sock.settimeout(timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = cls(sock)
        try:
            theirs, mine = connection.take(_NONCE), secrets.token_bytes(_NONCE)
            sock.sendall(mine + _proof(token, b"keeper", theirs, mine))
            proof = connection.take(_PROOF)
            if not hmac.compare_digest(proof, _proof(token, b"client", theirs, mine)):
                raise ConnectionError("a client does not know this run's token")
        except BaseException:
            sock.close()
            raise
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, message: Message, content: Iterable[memoryview] = ()) -> None:
        """Sends an object, and bytes that may lie in several places."""
        content = list(content)
        text = json.dumps({**message, "size": sum(map(len, content))}).encode()
        self._socket.sendall(len(text).to_bytes(4, "big") + text)
        for view in content:
            self._socket.sendall(view)

    def receive(self) -> Message:
        """Returns the next object; `size` bytes follow it, for `take` or `take_into`."""
        length = int.from_bytes(self.take(4), "big")
        if length > _LONGEST:
            raise ConnectionError(f"a message of {length} bytes")
        return json.loads(self.take(length))

    def ask(self, message: Message, content: Iterable[memoryview] = ()) -> tuple[Message, int]:
        """Returns the answer and how many bytes follow it. Raises OSError, Refused."""
        self.send(message, content)
        answer = self.receive()
        if "error" in answer:
            raise Refused(answer["error"])
        return answer, answer["size"]

    def take(self, size: int) -> bytearray:
        """Returns the next `size` bytes. Raises OSError."""
        content = bytearray(size)
        self.take_into(memoryview(content))
        return content

    def take_into(self, view: memoryview) -> None:
        """Fills `view` with the next bytes. Raises OSError."""
        done = 0
        while done < len(view):
            count = self._socket.recv_into(view[done:])
            if not count:
                raise ConnectionError("the other end is gone")
            done += count


def _proof(token: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(token, role + first + second, "sha256")


def own_address(near: str) -> str:
    """Returns the address under which this host is seen from where `near` is; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((near, 9))
        return probe.getsockname()[0]
