"""Who may write into a run's folder: one job at a time, and nobody before it holds the lock.

The lock is one small file, `lock`, that names its holder: host, process and job. The holder writes
it anew every few seconds. Whoever comes later is refused if it sees the file change; it takes the
lock over if the holder's process is gone (on the same machine), or if nothing changes for a whole
lease (on another machine). Ages are measured by the clock of the process that waits, so the clocks
of hosts are never compared. `torus launch` gives its trainers the name of their job: they take a
lock of their own job over at once, because their supervisor has ended the trainers before them.

A file is replaced under flock(2), which does not work everywhere (NFS without a lock daemon, Lustre
mounted without it); conditional writes of an object store are not atomic everywhere either. So a
new holder reads the lock again after a moment: of two that came together one finds the other there.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from checkpoint.objects import ObjectPath
from checkpoint.steps import CheckpointError, folder_path
from sharding.errors import StorageError, UsageError

LOCK = "lock"
JOB = "TORUS_JOB"  # the environment variable that names the job of `torus launch`
BEAT, LEASE = 2.0, 30.0  # seconds between signs of life, and without one until the lock is free
REMOTE_BEAT, REMOTE_LEASE = 10.0, 75.0  # in an object store
SETTLE = 1.0  # seconds until a lock that was not taken atomically is read again
_POLL = 0.2
_MOST = 4096  # bytes of a lock that are read
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_FIELDS = {"host": str, "machine": str, "pid": int, "start": str, "job": str, "token": str,
           "since": str, "beat": int}  # fmt: skip


class RunLock:
    """The lock of one run's folder, for one process of its job: entering takes it."""

    def __init__(self, workdir: str | os.PathLike) -> None:
        folder = folder_path(workdir)
        self._workdir, remote = os.fspath(workdir), isinstance(folder, ObjectPath)
        self._store = _Object(folder / LOCK) if remote else _File(folder / LOCK)
        self._beat, self._lease = (REMOTE_BEAT, REMOTE_LEASE) if remote else (BEAT, LEASE)
        self._facts = _own_facts()
        self._stamp: Any = None  # what the store had when this process wrote to it last
        self._lost = ""  # who holds the lock instead
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def take(self) -> None:
        """Takes the lock, and gives signs of life in a thread from then on.

        Raises:
          UsageError: another job holds it; the line names the holder and what to do. Or the folder
            cannot be written.
        """
        try:
            while not self._write(self._wait()):
                pass
        except StorageError:
            raise
        except OSError as error:
            raise UsageError(f"--workdir={self._workdir} cannot be written: {error}") from error
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()

    def give_back(self) -> None:
        """Frees the lock; without `take` nothing happens."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(OSError):  # the next one sees that this process is gone
                self._store.remove(self._stamp)

    def check(self) -> None:
        """Raises CheckpointError if another job has taken the run over; cheap, for every step.

        That happens to a process that was frozen, or cut off from its folder, for a lease.
        """
        if self._lost:
            raise CheckpointError(
                f"{self._workdir} was taken over by {self._lost} while this process was silent; it "
                "ends here and writes nothing more"
            )

    def _wait(self) -> Any:
        """Waits until the lock is free, and returns the stamp of what the store holds then."""
        content, stamp = self._store.read()
        facts, changed, told = _parse(content), time.monotonic(), False
        while True:
            silent = time.monotonic() - changed
            if self._is_free(facts, silent):
                return stamp
            if silent > self._lease:  # a process of this machine that is there, but frozen
                raise UsageError(self._refusal(facts))
            if not told and silent > 2 * self._beat:
                until = f"at most {self._lease:g} s"
                _say(f"{self._workdir} was last used by {_holder(facts)}: waiting {until} for it")
                told = True
            time.sleep(_POLL)
            content, stamp = self._store.read()
            if (latest := _parse(content)) != facts:
                if latest and latest["token"] == facts["token"]:
                    raise UsageError(self._refusal(latest))
                facts, changed = latest, time.monotonic()

    def _is_free(self, facts: dict[str, Any], silent: float) -> bool:
        """Whether the lock may be taken, `silent` seconds after it was last seen to change."""
        if not facts or (facts["job"] and facts["job"] == self._facts["job"]):
            return True
        if facts["machine"] == self._facts["machine"]:
            own = facts["pid"] == os.getpid()
            return (own and silent > self._lease) or not is_running(facts["pid"], facts["start"])
        return silent > self._lease

    def _write(self, stamp: Any) -> bool:
        """Puts this process's name into the lock if the store still holds what `stamp` says."""
        content = self._next()
        self._stamp, atomic = self._store.swap(content, stamp)
        if self._stamp is None or not atomic:
            time.sleep(0 if self._stamp is None else SETTLE)
            content_there, self._stamp = self._store.read()
            return content_there == content
        return True

    def _next(self) -> bytes:
        self._facts["beat"] += 1
        return json.dumps(self._facts).encode()

    def _keep(self) -> None:
        """Gives signs of life, until the lock is given back or another holds it."""
        while not self._ended.wait(self._beat):
            with contextlib.suppress(OSError):  # a store that does not answer: the next beat asks
                stamp, _ = self._store.swap(self._next(), self._stamp)
                if stamp is None:  # another's, or it was written and the answer was lost
                    content, stamp = self._store.read()
                    facts = _parse(content)
                    if not facts or facts["token"] != self._facts["token"]:
                        self._lost = _holder(facts) if facts else "somebody who deleted its lock"
                        return
                self._stamp = stamp

    def _refusal(self, facts: dict[str, Any]) -> str:
        return (
            f"{self._workdir} is in use by {_holder(facts)} since {facts['since']}: wait for it to "
            f"end, stop it (kill {facts['pid']} there), or choose another --workdir"
        )


@contextlib.contextmanager
def job_lock(workdir: str | os.PathLike) -> Iterator[RunLock]:
    """Holds the lock of a run's folder for all processes of a JAX job: the first one takes it.

    Raises:
      UsageError: in all processes, if the first is refused.
    """
    from checkpoint.agreement import first  # JAX, which a refused command line does not load

    lock = RunLock(workdir)
    first(lock.take)
    try:
        yield lock
    finally:
        lock.give_back()


def check_unlocked(workdir: str | os.PathLike) -> None:
    """Refuses a folder in which another job trains; a lock that nobody holds is removed.

    Raises:
      UsageError: naming the holder.
    """
    lock = RunLock(workdir)
    if lock._store.read()[0]:
        with lock:
            pass


class _File:
    """A lock on a disk. Its stamp is its content, b"" for none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: list[Path] = []  # folders that were created for it, innermost first

    def read(self) -> tuple[bytes, bytes]:
        try:
            file = self._open(os.O_RDONLY)
        except FileNotFoundError:
            return b"", b""
        with os.fdopen(file, "rb") as opened:
            content = opened.read(_MOST)
        return content, content

    def swap(self, content: bytes, stamp: bytes) -> tuple[bytes | None, bool]:
        """Writes `content` if the file is still as `stamp` says; None if not. And: atomically?"""
        if not stamp:
            folders = (self._path.parent, *self._path.parent.parents)
            self._made = [folder for folder in folders if not folder.exists()] or self._made
            self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._exclusive() as (file, atomic):
            if os.pread(file, _MOST, 0) != stamp:
                return None, atomic
            os.pwrite(file, content, 0)
            os.ftruncate(file, len(content))
            return content, atomic

    def remove(self, stamp: bytes) -> None:
        """Deletes the file if it is still as `stamp` says, and folders that hold nothing else."""
        with self._exclusive() as (file, _):
            if os.pread(file, _MOST, 0) == stamp:
                self._path.unlink()
        with contextlib.suppress(OSError):  # not empty: the run has written something
            for folder in self._made:
                folder.rmdir()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[tuple[int, bool]]:
        """Yields the file, open, and whether no other process is here at the same time."""
        file, atomic = self._locked()
        while not self._is_current(file):  # it was removed between opening and locking
            os.close(file)
            file, atomic = self._locked()
        try:
            yield file, atomic
        finally:
            os.close(file)

    def _locked(self) -> tuple[int, bool]:
        file = self._open(os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                os.close(file)
                raise
            return file, False
        return file, True

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(file))
        except FileNotFoundError:
            return False

    def _open(self, flags: int) -> int:
        """Opens a regular file only: a pipe would block, and a link lead elsewhere."""
        file = os.open(self._path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(f"{self._path} is not a file")
        return file


class _Object:
    """A lock in an object store. Its stamp is the object's generation."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path

    def read(self) -> tuple[bytes, bytes]:
        return self._path.read_stamped()

    def swap(self, content: bytes, stamp: bytes) -> tuple[bytes | None, bool]:
        return self._path.swap(content, stamp), False

    def remove(self, stamp: bytes) -> None:
        self._path.swap(None, stamp)


def is_running(pid: int, start: str) -> bool:
    """Whether the process of this machine that began at `start` (see `_started`) still runs."""
    if (now := _started(pid)) is not None:
        return now == start
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user, and hidden from this one
        return True
    return not os.path.exists("/proc/self/stat")  # else a zombie, or gone a moment later


def _started(pid: int) -> str | None:
    """Returns when a process began, in clock ticks since the machine did; None for none."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if state in "ZX" else rest[18]


def _own_facts() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "start": _started(pid) or "",
        "job": os.environ.get(JOB, ""),
        "token": secrets.token_hex(8),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "beat": 0,
    }


def _machine() -> str:
    """Returns what processes share that see one another by number: a boot, and a container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _parse(content: bytes) -> dict[str, Any]:
    """Returns what a lock says: {} for a free one, of an unknown holder what cannot be read."""
    if not content:
        return {}
    with contextlib.suppress(ValueError, RecursionError):
        facts = json.loads(content)
        if isinstance(facts, dict) and all(type(facts.get(k)) is t for k, t in _FIELDS.items()):
            shown = {name: _plain(facts[name]) for name in ("host", "since")}
            return {name: facts[name] for name in _FIELDS} | shown
    unknown = {name: kind() for name, kind in _FIELDS.items()}
    return unknown | {"host": "?", "since": "?", "token": content.hex()}


def _plain(text: str) -> str:
    """Returns text from a file without what would move a terminal's cursor."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


def _holder(facts: dict[str, Any]) -> str:
    return f"process {facts['pid']} on host {facts['host']}"


def _say(text: str) -> None:
    print(f"torus: {text}", file=sys.stderr, flush=True)
