"""Object stores on loopback: a stand-in for Google's JSON API, as far as tensorstore asks it."""

import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Google:
    """Buckets in memory: their objects by name, and what was sent of them."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.sent: dict[str, int] = {}  # bytes of each object that went out
        self.written: list[str] = []  # names, in order
        self.generations: dict[str, int] = {}  # of the objects of all buckets
        self.refuse = 0  # a status to answer with
        self.pause = 0.0  # seconds before each answer
        self.waiting, self.most = 0, 0  # requests that wait for one, and the most at once
        self.url = ""

    def fill(self, bucket: str, folder: Path) -> None:
        """Puts the files of a folder into a bucket."""
        objects = self.buckets.setdefault(bucket, {})
        for path in folder.rglob("*"):
            if path.is_file():
                objects[path.relative_to(folder).as_posix()] = path.read_bytes()


class _Handler(http.server.BaseHTTPRequestHandler):
    """objects.get with alt=media, list, insert with uploadType=media, and delete."""

    store: Google
    counting = threading.Lock()
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and data in one packet

    def do_GET(self) -> None:
        objects, name, query = self._place()
        if objects is None or (name and name not in objects):
            return self._answer(self.store.refuse or 404, b'{"error": {"code": 404}}')
        if not name:
            prefix, first, end = (query.get(k, "") for k in ("prefix", "startOffset", "endOffset"))
            items = [{"name": n} for n in sorted(objects)
                     if n.startswith(prefix) and n >= first and (not end or n < end)]  # fmt: skip
            return self._answer(200, json.dumps({"items": items}).encode())
        data, asked = objects[name], self.headers.get("Range")
        if query.get("alt") != "media":
            return self._answer(200, self._metadata(name))
        if not asked:
            return self._send(name, 200, data, {})
        begin, end = (int(n) if n else None for n in asked.removeprefix("bytes=").split("-"))
        if begin is None:
            begin, end = max(0, len(data) - end), None
        if begin >= len(data):
            return self._answer(416)
        part = data[begin : None if end is None else end + 1]
        where = f"bytes {begin}-{begin + len(part) - 1}/{len(data)}"
        return self._send(name, 206, part, {"Content-Range": where})

    def do_POST(self) -> None:
        objects, _, query = self._place()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if objects is None:
            return self._answer(self.store.refuse or 404)
        with self.counting:
            if not self._matches(objects, query["name"], query):
                return self._answer(412)
            objects[query["name"]] = content
            self.store.written.append(query["name"])
            self.store.generations[query["name"]] = len(self.store.written) + 1
        return self._answer(200, self._metadata(query["name"]))

    def do_DELETE(self) -> None:
        objects, name, query = self._place()
        with self.counting:
            if objects is not None and not self._matches(objects, name, query):
                return self._answer(412)
            found = objects is not None and objects.pop(name, None) is not None
        return self._answer(self.store.refuse or (204 if found else 404))

    def _matches(self, objects: dict[str, bytes], name: str, query: dict[str, str]) -> bool:
        """Whether an object has the generation that a request is conditional on, 0 for none."""
        there = self.store.generations.get(name, 1) if name in objects else 0
        return int(query.get("ifGenerationMatch", there)) == there

    def _place(self) -> tuple[dict[str, bytes] | None, str, dict[str, str]]:
        path, _, query = self.path.partition("?")
        bucket, _, name = path.partition("/b/")[2].partition("/o")
        objects = None if self.store.refuse else self.store.buckets.get(bucket)
        return objects, urllib.parse.unquote(name[1:]), dict(urllib.parse.parse_qsl(query))

    def _metadata(self, name: str) -> bytes:
        generation = self.store.generations.get(name, 1)
        return json.dumps({"name": name, "generation": str(generation)}).encode()

    def _send(self, name: str, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.store.sent[name] = self.store.sent.get(name, 0) + len(data)
        generation = str(self.store.generations.get(name, 1))
        self._answer(status, data, {"x-goog-generation": generation} | headers)

    def _answer(
        self, status: int, data: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        if self.store.pause:
            self._wait()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def _wait(self) -> None:
        with self.counting:
            self.store.waiting += 1
            self.store.most = max(self.store.most, self.store.waiting)
        time.sleep(self.store.pause)
        with self.counting:
            self.store.waiting -= 1

    def log_message(self, format: str, *args) -> None:
        """Says nothing."""


@contextmanager
def google() -> Iterator[Google]:
    """Serves empty buckets; TENSORSTORE_GCS_HTTP_URL has to be set to `url`."""
    store = Google()
    handler = type("Handler", (_Handler,), {"store": store})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        store.url = f"http://127.0.0.1:{server.server_port}"
        yield store
        server.shutdown()
