"""One job at a time writes into a run's folder; the dead, the silent and its own job give way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoint.objects import ObjectPath
from checkpoint.steps import CheckpointError, folder_path
from sharding.errors import StorageError, UsageError
from tests.buckets import google
from tests.processes import ROOT
from tests.trainer.data.emulator import Emulator
from trainer import lock
from trainer.lock import RunLock, check_unlocked

HOLDER = """
import sys, time
from trainer import lock
lock.BEAT = 0.1
lock.RunLock(sys.argv[1]).take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"BEAT": 0.1, "REMOTE_BEAT": 0.1, "LEASE": 1.0, "REMOTE_LEASE": 1.0,
                          "SETTLE": 0.2, "_POLL": 0.02}.items():  # fmt: skip
        monkeypatch.setattr(lock, name, seconds)
    monkeypatch.delenv(lock.JOB, raising=False)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Addresses of a folder on a disk and in the two kinds of object stores."""
    source = tmp_path_factory.mktemp("bucket")
    (source / "other").write_text("")
    emulator = Emulator(source, tmp_path_factory.mktemp("log") / "log")
    with pytest.MonkeyPatch.context() as patch, google() as gcs:
        gcs.buckets["bucket"] = {}
        emulator.start()
        for name, value in emulator.environment.items():
            patch.setenv(name, value)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", gcs.url)
        yield {"disk": tmp_path_factory.mktemp("disk"), "gs": "gs://bucket", "s3": "s3://bucket"}
        emulator.kill()


@pytest.fixture(params=["disk", "gs", "s3"])
def run(request, stores) -> str:
    return f"{stores[request.param]}/{request.node.name}"


@contextmanager
def holder(folder):
    """A process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def content(run) -> bytes:
    path = folder_path(run) / lock.LOCK
    return path.read_bytes() if path.exists() else b""


def pretend(run, **facts) -> None:
    """Makes the lock say something else of its holder."""
    path = folder_path(run) / lock.LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(lock._own_facts() | facts).encode())


def test_a_second_job_is_refused_in_one_line_and_leaves_no_trace(run):
    with RunLock(run) as first:
        with pytest.raises(UsageError, match="is in use by process") as refused, RunLock(run):
            pass
        text = str(refused.value)
        assert f"process {os.getpid()} on host" in text and "choose another --workdir" in text
        assert "\n" not in text
        with pytest.raises(UsageError, match="is in use by process"):
            check_unlocked(run)
        first.check()
        assert json.loads(content(run))["token"] == first._facts["token"]
    assert content(run) == b""
    with RunLock(run):  # given back
        pass


def test_a_lock_from_a_silent_machine_is_taken_over_after_the_lease(run, capfd):
    pretend(run, machine="another", pid=1)
    began = time.monotonic()
    with RunLock(run):
        assert 1.0 <= time.monotonic() - began < 10
    assert "waiting at most 1 s" in capfd.readouterr().err


def test_a_job_takes_over_its_own_lock_and_the_process_before_it_ends(run, monkeypatch):
    monkeypatch.setenv(lock.JOB, "job")
    with RunLock(run) as before, RunLock(run) as after:  # no lease passes
        deadline = time.monotonic() + 10
        while not before._lost and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(CheckpointError, match=r"was taken over by process \d+ on host"):
            before.check()
        after.check()
        before.give_back()  # which leaves the other's lock alone
        assert json.loads(content(run))["token"] == after._facts["token"]


def test_of_several_that_come_together_one_gets_it(run):
    pretend(run, machine="another", pid=1)
    taken, refused, locks = [], [], [RunLock(run) for _ in range(4)]

    def take(own):
        try:
            own.take()
            taken.append(own)
        except UsageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take, args=(own,)) for own in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    time.sleep(0.3)  # a few beats
    assert len(taken) == 1 and len(refused) == 3, refused
    taken[0].check()
    taken[0].give_back()


def test_without_flock_too_one_gets_it(tmp_path, monkeypatch):
    def unsupported(file, kind):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    test_of_several_that_come_together_one_gets_it(tmp_path / "run")


def test_a_dead_process_gives_way_at_once_and_a_live_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 600.0)
    with holder(tmp_path) as process:
        with pytest.raises(UsageError, match=f"process {process.pid} on host"), RunLock(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        while lock.is_running(process.pid, json.loads(content(tmp_path))["start"]):
            time.sleep(0.01)  # then a zombie
        with RunLock(tmp_path):
            pass


def test_another_process_with_the_number_of_a_dead_one_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 600.0)
    pretend(tmp_path, pid=os.getppid(), start="12")
    with RunLock(tmp_path):
        pass


def test_a_frozen_process_keeps_its_lock(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(UsageError, match=f"kill {process.pid} there"), RunLock(tmp_path):
            pass


@pytest.mark.parametrize("text", [b"{", b"[1]", b"null", b"\xff", b'{"pid": "1"}', b"[" * 4000])
def test_a_lock_that_cannot_be_read_is_somebodys_until_the_lease_is_over(tmp_path, text):
    (tmp_path / lock.LOCK).write_bytes(text)
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began >= 1.0


def test_what_is_no_file_is_no_lock(tmp_path):
    os.mkfifo(tmp_path / lock.LOCK)
    with pytest.raises(UsageError, match="is not a file"), RunLock(tmp_path):
        pass
    (tmp_path / lock.LOCK).unlink()
    (tmp_path / lock.LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="cannot be written"), RunLock(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_text_of_a_lock_is_escaped(tmp_path):
    pretend(tmp_path, machine="another", host="\x1b[2J\nhost", since="\x1b[0m\u202e")
    assert RunLock(tmp_path)._refusal(lock._parse(content(tmp_path))).isprintable()


def test_folders_that_were_made_for_the_lock_alone_go_with_it(tmp_path):
    with RunLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / lock.LOCK).is_file()
    assert not (tmp_path / "a").exists()
    with RunLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_store_that_refuses_is_told(stores):
    with pytest.raises(StorageError, match="there is no bucket"), RunLock("gs://elsewhere/run"):
        pass


def test_a_beat_whose_answer_was_lost_loses_nothing(stores, monkeypatch):
    swap, lose = ObjectPath.swap, threading.Event()

    def losing(path, written, stamp):
        done = swap(path, written, stamp)
        return None if lose.is_set() else done  # the server's answer to a retry of the same

    monkeypatch.setattr(ObjectPath, "swap", losing)
    with RunLock("gs://bucket/lost") as held:
        lose.set()
        time.sleep(0.5)
        lose.clear()
        time.sleep(0.3)
        held.check()
    assert not (Path("gs:") / "bucket").exists() and content("gs://bucket/lost") == b""
