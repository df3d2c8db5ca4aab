"""Files in gs:// and s3:// buckets as paths: whole, in parts, listed, and sent there as a whole.

The home of addresses in object stores; tensorstore's KvStore does the asking, so that nothing else
has to be installed. Credentials are found as Google's and Amazon's own tools find them;
AWS_ENDPOINT_URL and TENSORSTORE_GCS_HTTP_URL name another server than theirs. A folder is what has
objects below it. tensorstore, and with it nothing of JAX, is imported when a store is first asked.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.inflight import MEMORY, InFlight
from sharding.errors import StorageError, UsageError

if TYPE_CHECKING:
    import tensorstore

DRIVERS = {"gs": "gcs", "s3": "s3"}
NO_RETRIES = "ABORTED: All 0 retry attempts failed: "
SENDING = ".converting"  # an object beside those of a target that is not there in full yet
PIECE = 8 * 2**20  # bytes compared at a time
_RETRIES = {"max_retries": 5, "initial_delay": "500ms", "max_delay": "8s"}  # some 15 s


@dataclass(frozen=True, order=True)
class ObjectPath(os.PathLike):
    """An object, or what lies below a name: those methods of pathlib.Path that checkpoints need.

    What a store refuses (no such bucket, no access, no answer) is a StorageError.
    """

    scheme: str
    bucket: str
    key: str = ""

    @classmethod
    def parse(cls, url: str) -> "ObjectPath":
        """Returns the path of an address; raises UsageError for another kind of one."""
        scheme, _, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        if scheme not in DRIVERS or not bucket:
            raise UsageError(f"{url}: choose gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
        return cls(scheme, bucket, "/".join(part for part in key.split("/") if part))

    def __fspath__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    __str__ = __fspath__

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath.parse(f"{self}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return bool(self.key) and self._read(slice(0, 0)).state == "value"

    def is_dir(self) -> bool:
        return bool(self.below())

    def below(self) -> list[str]:
        """Returns the names, relative to this one, of all objects below it."""
        import tensorstore

        prefix = f"{self.key}/" if self.key else ""
        found = self._ask(
            lambda store: store.list(
                tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + "0" if prefix else ""),
                strip_prefix_length=len(prefix.encode()),
            )
        )
        return sorted(name.decode() for name in found)

    def iterdir(self) -> Iterator["ObjectPath"]:
        return self.glob("*")

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Yields what is as far below as `pattern` has parts, and matches them."""
        wanted = pattern.rstrip("/").split("/")
        folders = pattern.endswith("/")
        parts = [name.split("/") for name in self.below()]
        names = {
            "/".join(p[: len(wanted)]) for p in parts if len(p) >= len(wanted) + folders
            and all(map(fnmatchcase, p, wanted))
        }  # fmt: skip
        return (self / name for name in sorted(names))

    def read_bytes(self, part: slice | None = None) -> bytes:
        """Returns an object, or the bytes of it that `part` says, and only they are sent.

        Raises:
          FileNotFoundError: it does not exist. EOFError: it ends before `part` does.
        """
        found = self._read(part)
        if found.state == "missing":
            raise FileNotFoundError(f"{self} is not there")
        return found.value

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Writes an object: all of it appears at once."""
        self._ask(lambda store: store.write(self.key, content))

    def write_text(self, content: str) -> None:
        self.write_bytes(content.encode())

    def touch(self) -> None:
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = True) -> None:
        """Deletes an object; to a store it is all the same whether there was one."""
        self._ask(lambda store: store.write(self.key, None))

    def rmtree(self) -> None:
        """Deletes all objects below."""
        for name in self.below():
            (self / name).unlink()

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Does nothing: a folder is there as soon as there is something in it."""

    def stamp(self) -> str:
        """Returns what changes whenever the object is written, "" if there is none."""
        found = self._read(slice(0, 0))
        return found.stamp.generation.hex() if found.state == "value" else ""

    def read_stamped(self) -> tuple[bytes, bytes]:
        """Returns an object, b"" for none, and a stamp that changes whenever it is written."""
        found = self._read(None)
        return found.value, found.stamp.generation

    def swap(self, content: bytes | None, stamp: bytes) -> bytes | None:
        """Writes an object (None deletes it) if it is still as `stamp` says; returns its new stamp.

        None if it is not. On Amazon's and Google's stores that is atomic; on another S3 server
        two that come at the same moment may both succeed, and the later one stays.
        """
        done = self._ask(lambda store: store.write(self.key, content, if_equal=stamp))
        return done.generation or None

    def _read(self, part: slice | None) -> "tensorstore.KvStore.ReadResult":
        return self._ask(lambda store: store.read(self.key, byte_range=part))

    def _ask(self, question: Callable[["tensorstore.KvStore"], Any]) -> Any:
        try:
            spec = json.dumps(kvstore_spec(self.scheme, self.bucket))
            return question(_store(spec, os.environ.get("TENSORSTORE_GCS_HTTP_URL"))).result()
        # tensorstore's; the text begins with the status. The second is a server's answer of 501.
        except (ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
        if reason.startswith("OUT_OF_RANGE"):
            raise EOFError(f"{self} is shorter")
        if reason.startswith("NOT_FOUND"):
            raise StorageError(f"{self}: there is no bucket {self.scheme}://{self.bucket}")
        if reason.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            raise StorageError(f"{self}: access refused (are credentials set?): {reason[:120]}")
        raise StorageError(f"{self} cannot be reached: {reason[:160]}")


def kvstore_spec(scheme: str, bucket: str, path: str = "", **retries: int) -> dict[str, Any]:
    """Returns tensorstore's description of a bucket's objects whose names begin with `path`."""
    driver = DRIVERS[scheme]
    context = {f"{driver}_request_retries": retries or _RETRIES}
    spec = {"driver": driver, "bucket": bucket, "path": path, "context": context}
    return spec | (_s3_settings() if scheme == "s3" else {})


def folder_spec(folder: Path | ObjectPath) -> dict[str, Any]:
    """Returns tensorstore's description of what lies below a folder, local or not."""
    if isinstance(folder, ObjectPath):
        return kvstore_spec(folder.scheme, folder.bucket, f"{folder.key}/" if folder.key else "")
    return {"driver": "file", "path": f"{folder}/"}


def _s3_settings() -> dict[str, Any]:
    environment, settings = os.environ.get, {}
    if endpoint := environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL"):
        region = environment("AWS_REGION") or environment("AWS_DEFAULT_REGION") or "us-east-1"
        settings = {"endpoint": endpoint, "aws_region": region}
    if environment("AWS_ACCESS_KEY_ID"):  # else its search prints every file that is not there
        settings["aws_credentials"] = {"type": "environment"}
    return settings


@cache
def _store(spec: str, server: str | None) -> "tensorstore.KvStore":
    import tensorstore

    return tensorstore.KvStore.open(json.loads(spec)).result()


# ---------------------------------------------------------------- files, wherever they are


def read_part(path: Path | ObjectPath, start: int, stop: int) -> bytes:
    """Returns some bytes of a file, b"" where it ends before them."""
    if isinstance(path, ObjectPath):
        try:
            return path.read_bytes(slice(start, stop))
        except EOFError:
            return b""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < stop:
            return b""
        file.seek(start)
        return file.read(stop - start)


def reaches(path: Path | ObjectPath, size: int) -> bool:
    """Whether a file has `size` bytes or more; a store does not say how many there are."""
    return size <= 0 or len(read_part(path, size - 1, size)) == 1


def state_of(path: Path | ObjectPath) -> list:
    """Returns what differs once a file, or any file below a folder, was written anew."""
    if isinstance(path, ObjectPath):
        return [[n, (path / n).stamp()] for n in path.below()] or [["", path.stamp()]]
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


# ---------------------------------------------------------------- sending


def check_free(target: ObjectPath) -> None:
    """Raises UsageError if there is something at `target` that no interrupted `send` left there."""
    names = target.below()
    if (names and SENDING not in names) or target.is_file():
        raise UsageError(f"{target} exists already; name a folder that does not")


def send(
    folder: Path,
    target: ObjectPath,
    last: str,
    advance: Callable[[int], None],
    memory: int = MEMORY,
) -> None:
    """Copies all files below a folder and reads them back; `advance` is told bytes, each twice.

    While SENDING is beside them, they are not all there. What an interrupted sending left stays
    where it has the same bytes and goes where it is of no use.

    Args:
      last: the name of the file without which other programs take the rest for nothing.
      memory: bytes that may be in flight; a file is sent as a whole.

    Raises:
      StorageError: the store refuses, or gives back other bytes.
    """
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    crew = InFlight(memory, far=True)

    def put(name: str) -> None:
        (target / name).write_bytes(files[name].read_bytes())
        advance(sizes[name])

    (target / SENDING).touch()
    there = set(target.below()) - {SENDING}
    for name in there - set(files):
        (target / name).unlink()
    kept = there & set(files)
    kept -= _others({n: files[n] for n in kept}, target, crew, lambda nbytes: None)
    advance(2 * sum(sizes[name] for name in kept))
    todo = sorted(set(files) - kept)
    for ending in (False, True):
        names = [name for name in todo if (files[name].name == last) == ending]
        crew.run((2 * sizes[name], partial(put, name)) for name in names)
        if wrong := _others({n: files[n] for n in names}, target, crew, advance):
            raise StorageError(f"{target / min(wrong)} is not what was sent there")
    (target / SENDING).unlink()


def _others(
    files: dict[str, Path], target: ObjectPath, crew: InFlight, advance: Callable[[int], None]
) -> set[str]:
    """Returns the names of the files that have other bytes below `target`, or are not there."""
    found = set()

    def compare(name: str, part: slice) -> None:
        if not _same(files[name], target / name, part):
            found.add(name)
        advance(part.stop - part.start)

    sizes = {name: path.stat().st_size for name, path in files.items()}
    parts = (
        (name, slice(start, min(start + PIECE, size)))
        for name, size in sizes.items()
        for start in range(0, max(1, size), PIECE)
    )
    crew.run((2 * (part.stop - part.start), partial(compare, name, part)) for name, part in parts)
    return found


def _same(path: Path, there: ObjectPath, part: slice) -> bool:
    """Whether a part of a file has the same bytes there, and the end of one is the end there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(part.start)
        content = file.read(part.stop - part.start)
    try:
        if len(content) == size:
            return there.read_bytes() == content
        ends = part.stop < size or not reaches(there, size + 1)
        return ends and there.read_bytes(part) == content
    except (FileNotFoundError, EOFError):
        return False
