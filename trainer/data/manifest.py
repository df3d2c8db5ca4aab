"""The manifest: what a dataset folder holds, with the digests that tell when it no longer does.

One `manifest.json` per folder, written last. Each shard is `NAME.bin` (little-endian token ids, no
header, uint16 when the vocabulary fits, else uint32) and `NAME.idx.npy` (int64 offsets of the
documents in tokens, docs + 1 of them). Reading and checking the shards is shards.py.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath

import numpy as np

from checkpoint.files import parse_json, read_bytes
from checkpoint.steps import write_whole
from sharding.errors import UsageError, shown
from trainer.data.tokenizer import TokenizerSpec

FILE = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One pair of files of one split."""

    file: str  # the .bin, relative to the folder
    split: str
    docs: int
    tokens: int  # with specials
    text_bytes: int  # of the documents before tokenising: what bits per byte divides by
    bytes: int  # size of the .bin
    sha256: str  # of the .bin
    index_sha256: str  # of the .idx.npy
    max_token: int

    @property
    def index_file(self) -> str:
        return self.file.removesuffix(".bin") + ".idx.npy"


@dataclass(frozen=True)
class Manifest:
    """All shards of a dataset and the tokenizer that wrote them."""

    tokenizer: TokenizerSpec
    shards: tuple[Shard, ...]
    source: str = ""  # where the text came from, for people
    python: str = ""  # version of the Python that wrote it
    complete: bool = False
    version: int = VERSION
    preparation: dict = field(default_factory=dict)  # inputs, settings, rejections; for people

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.tokenizer.vocab_size < 1 << 16 else "<u4")

    def split(self, name: str) -> tuple[Shard, ...]:
        """Returns the shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == name)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def fingerprint(self) -> str:
        """Returns "sha256:…" over all that decides the tokens; source and python do not count.

        Runs resume by it: a field that is added later has a default, and counts only where a
        dataset differs from that.
        """
        content = {
            "tokenizer": _without_defaults(self.tokenizer),
            "shards": [_without_defaults(shard) for shard in self.shards],
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Writes manifest.json whole or not at all."""
        write_whole(folder / FILE, (json.dumps(asdict(self), indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest of `folder`; the shards themselves are not touched.

    Raises:
      UsageError: no manifest, broken JSON, another version, missing or mistyped fields, a
        preparation that did not finish, a shard outside the folder, ids beyond the vocabulary.
    """
    try:
        text = read_bytes(folder / FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"dataset {folder}: no {FILE} there, so it is not a dataset") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"dataset {folder}: {FILE} cannot be read: {error}") from None
    return parse_manifest(text, str(folder))


def parse_manifest(text: str | bytes, folder: str) -> Manifest:
    """Checks the text of a manifest as `read_manifest` does; `folder` is for the errors."""
    try:
        content = parse_json(text if isinstance(text, bytes) else text.encode(), FILE)
    except ValueError as error:
        raise UsageError(f"dataset {folder}: {FILE} cannot be read: {error}") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise UsageError(
            f"dataset {folder}: {FILE} has version {shown(version)}, this reads {VERSION}"
        )
    try:
        manifest = Manifest(
            **{
                **content,
                "tokenizer": _typed(TokenizerSpec, content["tokenizer"]),
                "shards": tuple(_typed(Shard, shard) for shard in content["shards"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"dataset {folder}: {FILE} is malformed: {error}") from None
    _check(manifest, folder)
    return manifest


def _without_defaults(part: Shard | TokenizerSpec) -> dict[str, int | str]:
    values = {known.name: (getattr(part, known.name), known.default) for known in fields(part)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _typed(kind: type, content: dict) -> object:
    """Builds a flat dataclass of int and str fields, refusing any other type."""
    for part in fields(kind):
        if part.name not in content and part.default is not MISSING:
            continue
        value = content[part.name]
        if type(value) is not part.type or (part.type is int and value < 0):
            raise TypeError(f"{kind.__name__}.{part.name} = {shown(value)}")
    return kind(**content)


def _check(manifest: Manifest, folder: str) -> None:
    if manifest.complete is not True:
        raise UsageError(
            f"dataset {folder}: {FILE} says complete: false, its preparation did not finish; "
            "prepare it again"
        )
    for shard in manifest.shards:
        path = PurePosixPath(shard.file)
        if path.is_absolute() or ".." in path.parts or "\\" in shard.file or ":" in shard.file:
            raise UsageError(
                f"dataset {folder}: shard {shard.file!r} lies outside the dataset folder"
            )
        if not shard.file.endswith(".bin"):
            raise UsageError(f"dataset {folder}: shard {shard.file!r} does not end in .bin")
        if shard.tokens and shard.max_token >= manifest.tokenizer.vocab_size:
            raise UsageError(
                f"dataset {folder}: {shard.file} holds token {shard.max_token}, the tokenizer has "
                f"{manifest.tokenizer.vocab_size}"
            )
        if shard.tokens * manifest.dtype.itemsize != shard.bytes:
            raise UsageError(
                f"dataset {folder}: {shard.file} is said to hold {shard.tokens:,} tokens in "
                f"{shard.bytes:,} bytes, at {manifest.dtype.itemsize} bytes a token"
            )
