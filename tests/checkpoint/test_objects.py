"""Paths in buckets: what they have of pathlib, and steps that are told by their marker."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from etils import epath

from checkpoint import steps
from checkpoint.objects import ObjectPath, reaches, read_part
from sharding.errors import StorageError, UsageError
from tests.buckets import google


@pytest.fixture
def store(monkeypatch):
    with google() as found:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", found.url)
        found.buckets["bucket"] = {
            "run/a.bin": b"hello", "run/checkpoints/1/state/d/x": b"1",
            "run/checkpoints/1/commit_success.txt": b"", "run/checkpoints/2/state/d/x": b"2",
            "runs/other": b"3",
        }  # fmt: skip
        yield found


def test_names(store):
    path = ObjectPath.parse("gs://bucket//run/")
    assert str(path) == "gs://bucket/run" and (path / "a.bin").suffix == ".bin"
    assert (path / "a/b").parent == path / "a" and path.parent.parent == path.parent
    assert [p.name for p in path.iterdir()] == ["a.bin", "checkpoints"]
    assert [str(p) for p in path.glob("*/*/state")] == [
        f"gs://bucket/run/checkpoints/{step}/state" for step in (1, 2)
    ]
    assert list(path.glob("a.bin/")) == []
    assert path.is_dir() and not path.is_file() and (path / "a.bin").is_file()
    assert not (path / "a").exists() and not ObjectPath.parse("gs://bucket/ru").exists()
    assert steps.folder_path(path) == path == ObjectPath.parse(str(epath.Path(path)))  # for Orbax


@pytest.mark.parametrize("url", ["ftp://host/x", "gs:/x", "s3://", "gs:///x/"])
def test_other_addresses_are_refused(url):
    with pytest.raises(UsageError, match=r"choose gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"):
        ObjectPath.parse(url)


def test_parts_and_ends(store):
    path = ObjectPath.parse("gs://bucket/run/a.bin")
    assert path.read_bytes(slice(1, 3)) == read_part(path, 1, 3) == b"el"
    assert read_part(path, 3, 6) == read_part(path, 90, 95) == b""
    assert reaches(path, 5) and not reaches(path, 6)
    with pytest.raises(EOFError):
        path.read_bytes(slice(3, 6))
    with pytest.raises(FileNotFoundError):
        (path.parent / "none").read_text()
    path.write_text("new")
    assert path.read_text() == "new"
    path.unlink()
    path.unlink()
    assert "run/a.bin" not in store.buckets["bucket"]


def test_steps_are_told_by_their_marker(store):
    folder = "gs://bucket/run/checkpoints"
    assert steps.complete_steps(folder) == [1] and steps.interrupted_saves(folder) == ["2"]
    assert steps.clean_interrupted(folder) == ["2"]
    steps.delete_step(folder, 1)
    assert list(store.buckets["bucket"]) == ["run/a.bin", "runs/other"]
    with pytest.raises(UsageError, match=r"no complete step in gs://.*; the folder does not exist"):
        steps.pick_step(folder)


def test_refusals(store):
    store.refuse = 403
    with pytest.raises(StorageError, match=r"gs://bucket/run: access refused .*PERMISSION_DENIED"):
        ObjectPath.parse("gs://bucket/run").exists()


def test_a_server_that_cannot_do_what_is_asked_is_named(monkeypatch):
    """501, which tensorstore tells by an exception of another kind."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(501)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        with pytest.raises(StorageError, match=r"^s3://bucket/run/x cannot be reached: "):
            ObjectPath.parse("s3://bucket/run/x").read_bytes()
        server.shutdown()
