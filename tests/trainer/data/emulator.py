"""An S3 server on loopback, in a process of its own: moto, holding the files of a folder.

Arguments: port, folder, bucket. Every file is in the bucket before the port opens, so a server that
was killed and started again answers as if it had only been away.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def serve(port: int, folder: Path, bucket: str) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple
    from werkzeug.test import Client

    app = DomainDispatcherApplication(create_backend_app)
    client = Client(app)
    kind = "application/octet-stream"
    assert client.put(f"/{bucket}", content_type=kind).status_code == 200
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = path.relative_to(folder).as_posix()
            answer = client.put(f"/{bucket}/{key}", data=path.read_bytes(), content_type=kind)
            assert answer.status_code == 200, key
    run_simple("127.0.0.1", port, app, threaded=True)


class Emulator:
    """The server's process, to be killed and started again on the same port."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._folder, self._log = folder, log
        self._process: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What makes an S3 client of this process ask the emulator."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
        }

    def start(self, timeout: float = 30) -> None:
        command = [sys.executable, __file__, str(self.port), str(self._folder), "bucket"]
        with open(self._log, "a") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "MOTO_PORT": str(self.port)}
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"the emulator did not start:\n{self._log.read_text()[-2000:]}")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def requests(self, name: str) -> int:
        """Returns how many requests for an object it has answered."""
        return self._log.read_text().count(f"/{name} HTTP")


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
