"""Datasets in object storage: shards come whole into a cache on the local disk, ahead of their use.

Manifest, tokenizer and indices are fetched when a dataset is opened, so its plan is that of a local
copy. A shard is fetched when the rows that read it come near, and used only when its sha256 is the
manifest's. An outage is waited out and never changes a row. An object that is gone or wrong is an
error that names it or, within `remote.skip_shards`, padding. A permanent error, such as access that
is refused, ends the reading at once. Bytes come through tensorstore's KvStore; nothing is ever
written to the storage.
"""

import hashlib
import itertools
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Set
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from checkpoint.objects import NO_RETRIES, ObjectPath, kvstore_spec
from checkpoint.steps import write_whole
from sharding.config import cache_folder
from sharding.errors import UsageError
from trainer.data.config import RemoteConfig
from trainer.data.manifest import FILE, Shard, parse_manifest
from trainer.data.shards import ShardError, TokenShards, check_digest, map_tokens, open_index
from trainer.data.tokenizer import definition_files

if TYPE_CHECKING:
    import tensorstore

_BLOCK = 16 << 20  # bytes asked for at a time: what one fetch holds in memory
_ANSWER = 30.0  # seconds that one request may take
_DELAYS = 0.25, 20.0  # seconds between attempts, first and longest
_TRANSIENT = ("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE")
_ABANDONED = 3600.0  # seconds after which a half-written file belongs to nobody


class Bucket:
    """The objects below one gs:// or s3:// address; reads wait out what may pass.

    Credentials are found as Google's and Amazon's own tools find them; AWS_ENDPOINT_URL and
    TENSORSTORE_GCS_HTTP_URL name another server than theirs.
    """

    def __init__(self, url: str, patience: float) -> None:
        """Parses the address; nothing is asked yet. Raises UsageError for another kind of one."""
        place = ObjectPath.parse(url)
        self.url = str(place)
        self._patience = patience
        self._no_bucket = f"; is there a bucket {place.bucket!r}?"
        # No retries of the library's own: `_patiently` waits.
        below = place.key and f"{place.key}/"
        self._spec = kvstore_spec(place.scheme, place.bucket, below, max_retries=0)
        self._store: tensorstore.KvStore | None = None

    def read(self, name: str, part: slice | None = None) -> bytes:
        """Returns an object, or the bytes of it that `part` says.

        Raises:
          ShardError: it does not exist, or ends before `part` does.
          UsageError: access was refused, or the storage gave another permanent error.
          ConnectionError: no answer within the patience.
        """
        import tensorstore

        if self._store is None:
            self._store = self._patiently(name, lambda: tensorstore.KvStore.open(self._spec))
        store = self._store
        result = self._patiently(name, lambda: store.read(name, byte_range=part))
        if result.state == "missing":  # tensorstore says the same of a bucket that does not exist
            raise ShardError(name, f"is not there{self._no_bucket if name == FILE else ''}")
        return result.value

    def mirror(self) -> Path:
        """Returns the local folder that stands for this one, manifest and tokenizer fetched."""
        try:
            text = self.read(FILE)
            manifest = parse_manifest(text, self.url)
            folder = cache_folder() / "shards" / hashlib.sha256(text).hexdigest()[:16]
            folder.mkdir(parents=True, exist_ok=True)
            for name in definition_files(manifest.tokenizer.kind):
                if not (folder / name).exists():
                    write_whole(folder / name, self.read(name))
        except ShardError as error:
            raise UsageError(f"dataset {self.url}: {error}") from None
        write_whole(folder / FILE, text)
        return folder

    def _patiently(self, name: str, ask: Callable[[], "tensorstore.Future"]) -> Any:
        """Returns the answer; transient errors are retried, ever later, with random gaps."""
        give_up = time.monotonic() + self._patience
        for attempt in itertools.count():
            try:
                return ask().result(timeout=_ANSWER)
            except (ValueError, NotImplementedError) as error:  # tensorstore's, by status
                text = " ".join(str(error).split())[:200]
                if not _transient(text):
                    raise self._permanent(name, text) from None
                reason = text.removeprefix(NO_RETRIES)
            except TimeoutError:
                reason = f"no answer within {_ANSWER:.0f} s"
            delay = min(_DELAYS[1], _DELAYS[0] * 2 ** min(attempt, 20)) * random.uniform(0.5, 1.0)
            if time.monotonic() + delay > give_up:
                raise ConnectionError(
                    f"dataset {self.url}: {name} could not be read for "
                    f"config.data.remote.patience = {self._patience:g} s: {reason}"
                )
            logging.warning("%s: %s: %s; again in %.1f s", self.url, name, reason, delay)
            _pause(delay)

    def _permanent(self, name: str, reason: str) -> UsageError:
        if reason.startswith("OUT_OF_RANGE"):
            return ShardError(name, "is shorter than its manifest says (truncated copy?)")
        where = f"dataset {self.url}: "
        if reason.startswith("NOT_FOUND"):
            return UsageError(f"{where}{name} is not there{self._no_bucket}")
        if reason.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            return UsageError(f"{where}{name}: access refused (are credentials set?): {reason}")
        return UsageError(f"{where}{name} cannot be read: {reason}")


def _transient(error: str) -> bool:
    """Whether asking again may help, by the text of one of tensorstore's errors.

    tensorstore marks what it would have retried itself; conflicts and failures of the transport
    that it does not know are retried as well. What a server refuses (status 3xx or 4xx) is
    permanent, as is a bucket's name that its driver rejects.
    """
    status = error.partition(":")[0]
    unknown = status == "UNKNOWN" and "http_response_code" not in error
    return error.startswith(NO_RETRIES) or unknown or status in _TRANSIENT


def _pause(seconds: float) -> None:
    """Sleeps, in a background thread not beyond the end of the program."""
    until = time.monotonic() + seconds
    while True:
        if not threading.main_thread().is_alive():
            raise CancelledError("the program ended")
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(left, 0.2))


def _reserve(path: Path, size: int, root: Path, budget: int, keep: Set[Path]) -> Path | None:
    """Returns a new file of `size` bytes that is to become `path`, or None while there is no room.

    The longest unused shards below `root` make room, none of `keep` and none that is being written.
    The files and their times are all the state that the cache has: processes and datasets share its
    budget, and a run that starts again finds what it had.
    """
    files = []
    for file in (file for file in root.rglob("*") if file.suffix in (".bin", ".part")):
        try:
            files.append((file.stat().st_mtime, file.stat().st_size, file))
        except FileNotFoundError:  # another process made room
            continue
    free = budget - sum(bytes_ for _, bytes_, _ in files)
    doomed = []
    for used, bytes_, file in sorted(files):
        arriving = file.suffix == ".part" and time.time() - used < _ABANDONED
        if free < size and file not in keep and not arriving:
            doomed.append(file)
            free += bytes_
    if free < size:
        return None
    for file in doomed:
        file.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    with open(part, "wb") as stream:
        stream.truncate(size)  # counts from now on
    return part


class RemoteShards(TokenShards):
    """One split of a dataset in object storage, read through the cache on the local disk.

    `pieces` returns copies and waits for the shards that it reads; those of announced documents
    (`expect`) are fetched meanwhile, as far as they fit beside what was not read yet.

    Attributes:
      fits: whether the cache can hold the whole split.
    """

    def __init__(self, url: str, split: str, config: RemoteConfig) -> None:
        """Fetches manifest, tokenizer and indices; errors as TokenShards and Bucket.read.

        Raises:
          UsageError: a cache too small for the shards.
        """
        self.ahead = config.ahead
        self._config = config
        self._bucket = Bucket(url, config.patience)
        self._lock = threading.Lock()
        self._running: dict[int, Future[None]] = {}  # shards that are being fetched
        self._announced: dict[int, None] = {}  # shards in order of use, not being fetched yet
        self._unread: set[int] = set()  # shards that announced documents wait in
        self._good: set[int] = set()  # shards that this process has read
        self._cancelled = threading.Event()
        super().__init__(self._bucket.mirror(), split, name=self._bucket.url)
        self._budget = int(config.cache_gb * 1e9)
        sizes = [shard.bytes for shard in self._shards]
        self.fits = sum(sizes) <= self._budget
        if (config.workers + 1) * max(sizes) > self._budget:
            raise UsageError(
                f"config.data.remote.cache_gb = {config.cache_gb:g}: shards of "
                f"{max(sizes) / 1e9:.3g} GB, one being read and {config.workers} arriving, need "
                f"{(config.workers + 1) * max(sizes) / 1e9:.3g}"
            )

    def _open(self) -> list[np.ndarray]:
        with ThreadPoolExecutor(self._config.workers) as pool:
            list(pool.map(self._fetch_index, self._shards))
        # Here, not in the threads: NumPy parses headers with `ast`, which Python 3.11 does in one
        # thread at a time or fails by chance.
        return [open_index(self.folder, shard) for shard in self._shards]

    def _fetch_index(self, shard: Shard) -> None:
        path = self.folder / shard.index_file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, self._bucket.read(shard.index_file))
        try:
            check_digest(path, shard.index_file, shard.index_sha256)
        except ShardError:
            path.unlink()  # the next start asks for it again
            raise

    def readable(self, documents: np.ndarray) -> np.ndarray:
        """Returns which documents can be read, waiting for the shards that were never read."""
        for owner in self._announce_first(self._owners(documents)):
            shard = self._shards[owner]
            if owner not in self._good and shard.file not in self.skipped:
                try:
                    self._tokens(owner)
                except ShardError as error:
                    self._skip_or_raise(shard, error)
        return super().readable(documents)

    def _cut(self, owners: np.ndarray, begins: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        out = [np.zeros(0)] * len(owners)
        for owner in self._announce_first(owners):
            try:
                tokens = self._tokens(owner)
            except ShardError as error:  # it was good before
                raise UsageError(f"dataset {self.name}: {error}") from None
            for k in np.flatnonzero(owners == owner).tolist():
                # A copy: a view would hold the disk space of a shard that made room.
                out[k] = np.array(tokens[begins[k] : begins[k] + counts[k]])
            with self._lock:
                self._unread.discard(owner)
                self._fetch_announced()
        return out

    def _announce_first(self, owners: np.ndarray) -> list[int]:
        """Puts shards before all that were announced; returns each of them once, in order."""
        self._cancelled.clear()
        needed = dict.fromkeys(owners.tolist())
        with self._lock:
            self._announced = needed | self._announced
            self._fetch_announced()
        return list(needed)

    def expect(self, documents: np.ndarray) -> None:
        """Fetches in the background, in their order, the shards that hold `documents`."""
        with self._lock:
            self._announced |= dict.fromkeys(self._owners(documents).tolist())
            self._fetch_announced()

    def cancel(self) -> None:
        """Ends a `pieces` that waits in another thread: it raises CancelledError."""
        self._cancelled.set()
        with self._lock:
            self._announced.clear()

    def _tokens(self, owner: int) -> np.ndarray:
        """Returns the tokens of a shard as soon as they are on the disk."""
        shard = self._shards[owner]
        path = self.folder / shard.file
        while True:
            with self._lock:
                future = None if path.exists() else self._start(owner, frozenset())
            try:
                if path.exists():
                    os.utime(path)
                    self._good.add(owner)
                    return map_tokens(self.folder, shard, self.manifest.dtype)
                self._wait(future)
            except FileNotFoundError:
                continue  # another process made room

    def _wait(self, future: "Future[None] | None") -> None:
        """Waits for a shard or, without one, a moment: what is arriving takes all the room."""
        while not self._cancelled.is_set():
            if future is None:
                return time.sleep(0.1)
            if wait([future], 0.1).done:
                return future.result()
        raise CancelledError("the reader was closed")

    def _skip_or_raise(self, shard: Shard, error: ShardError) -> None:
        allowed, text = self._config.skip_shards, f"its {shard.tokens:,} tokens"
        if len(self.skipped) >= allowed:
            raise UsageError(
                f"dataset {self.name}: {error}; to go on without it would make padding of {text}, "
                f"and config.data.remote.skip_shards = {allowed} does not allow it"
            )
        self.skip(shard.file)
        found = len(self.skipped)
        logging.warning(
            "%s: %s; %d of %d skipped: %s are padding", self.name, error, found, allowed, text
        )

    def _fetch_announced(self) -> None:
        """Starts what was announced, as far as workers and room go. Called with the lock held."""
        while self._announced and len(self._running) < self._config.workers:
            if not threading.main_thread().is_alive():
                return
            owner = next(iter(self._announced))
            path = self.folder / self._shards[owner].file
            skipped = self._shards[owner].file in self.skipped
            if not skipped and not path.exists():
                keep = {self.folder / self._shards[number].file for number in self._unread}
                if self._start(owner, keep) is None:
                    return
            self._unread.add(owner)
            del self._announced[owner]

    def _start(self, owner: int, keep: Set[Path]) -> "Future[None] | None":
        """Begins to fetch a shard; None while there is no room. Called with the lock held."""
        if owner not in self._running:
            shard = self._shards[owner]
            path = self.folder / shard.file
            part = _reserve(path, shard.bytes, self.folder.parent, self._budget, keep)
            if part is None:
                return None
            future = self._running[owner] = Future()
            threading.Thread(target=self._run, args=(owner, part, future)).start()
        return self._running[owner]

    def _run(self, owner: int, part: Path, future: Future[None]) -> None:
        shard, error = self._shards[owner], None
        try:
            self._fetch(shard, part)
            with self._lock:  # who looks for room must see one of the two names
                part.replace(self.folder / shard.file)
        except BaseException as caught:
            error = caught  # raised by whoever waits for the shard
        with self._lock:
            part.unlink(missing_ok=True)
            del self._running[owner]
            self._fetch_announced()
        future.set_exception(error) if error else future.set_result(None)

    def _fetch(self, shard: Shard, part: Path) -> None:
        for last in (False, True):  # once more, in case it was damaged on the way
            with open(part, "r+b") as stream:
                for begin in range(0, shard.bytes, _BLOCK):
                    _pause(0)
                    block = slice(begin, min(begin + _BLOCK, shard.bytes))
                    stream.write(self._bucket.read(shard.file, block))
                os.fsync(stream.fileno())
            try:
                return check_digest(part, shard.file, shard.sha256)
            except ShardError:
                if last:
                    raise
