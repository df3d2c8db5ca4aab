"""Who may talk to a keeper: accepts connections at one address and has each of them prove itself.

A stranger, who does not know the run's token, gets one thread for the seconds of a handshake, and
there are never more than a few dozen of them: when another comes the oldest is sent away. A client
that knows the token needs a round trip, so it is through long before its turn would come.
"""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable

from checkpoint.memory.wire import Connection

STRANGERS = 64  # connections that have not proven themselves yet, at most


class Server:
    """Listens at `address`, any free port; `answer` is called in a thread for each connection."""

    def __init__(self, address: str, token: bytes, answer: Callable[[Connection], None]) -> None:
        """Raises OSError: the address is none of this host's."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self._token, self._answer = token, answer
        self._lock = threading.Lock()
        self._strangers: dict[socket.socket, None] = {}  # the oldest first

    def serve(self) -> None:
        """Accepts connections for ever."""
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError as error:  # it was gone again, or this process may open no more files
                print(f"keeper: a connection is not accepted: {error}", file=sys.stderr, flush=True)
                time.sleep(0.1)
                continue
            with self._lock:
                if len(self._strangers) >= STRANGERS:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    with contextlib.suppress(OSError):  # it has just ended by itself
                        oldest.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it
                self._strangers[sock] = None
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        try:
            connection = Connection.accept(sock, self._token)
        except OSError:  # a stranger, or one that is gone
            return
        finally:
            with self._lock:
                self._strangers.pop(sock, None)
        with connection, contextlib.suppress(OSError):  # the client has ended
            self._answer(connection)
