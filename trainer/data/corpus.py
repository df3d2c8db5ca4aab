"""The built-in corpus: real text on a machine with no network and no files.

Python carries about 9 MB of text: the language reference behind `help()` and the sources of the
standard library. One topic or file is one document, about 1.5% of them held out by a digest of
their content. It depends on the Python version, so losses compare only within one; the manifest
records which. `builtin` is its bytes; `builtin:4096` is the same documents in a BPE vocabulary of
4,096 ids learned from a quarter of the training split. Also the compressors that a model here
should beat.
"""

import gzip
import importlib
import lzma
import os
import platform
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checkpoint.steps import is_remote
from sharding.config import cache_folder
from sharding.errors import UsageError
from trainer.data.clean import digest
from trainer.data.config import RemoteConfig
from trainer.data.manifest import FILE
from trainer.data.shards import DatasetWriter, TokenShards
from trainer.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

BUILTIN = "builtin"  # in `data.path`
TRAIN, HELD_OUT = "train", "val"
FEW_HELD_OUT = 10  # documents: with fewer a held-out loss says little
_HELD_OUT_PER_MILLE = 15
_LEARNED = 4  # a vocabulary is learned from one document in so many: 1% more ids, a quarter of time
_EDITION = 3  # part of the folder's name: raise it when the choice of documents changes
_SKIPPED = {
    *("__pycache__", "dist-packages", "site-packages", "test", "tests"),  # not the library's text
    *("distutils", "idlelib", "lib2to3", "turtledemo"),  # not in every Python
    "encodings",  # tables
}
_BUILDING = threading.Lock()
_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")  # differ between installations


def dataset_folder(path: str, patience: float = RemoteConfig.patience) -> Path:
    """Returns the folder behind `data.path`, writing the built-in corpus on first use (seconds).

    For object storage it is a local folder with manifest and tokenizer, but without shards; an
    outage is waited out for `patience` seconds.

    Raises:
      UsageError: `builtin:` with something else than a vocabulary size; no dataset in the storage.
      ConnectionError: the storage did not respond within the patience.
    """
    if is_remote(path):
        from trainer.data.remote import Bucket

        return Bucket(path, patience).mirror()
    return builtin_folder(path) if is_builtin(path) else Path(path).expanduser()


def is_builtin(path: str) -> bool:
    """Whether `path` names the built-in corpus."""
    return path == BUILTIN or path.startswith(f"{BUILTIN}:")


def builtin_folder(path: str) -> Path:
    """Returns the folder of the built-in corpus that `path` names; threads may ask at once.

    Raises:
      UsageError: `builtin:` with something else than a vocabulary size.
    """
    _, _, vocab = path.partition(":")
    if path != BUILTIN and not (vocab.isdecimal() and int(vocab) <= 1 << 16):
        raise UsageError(
            f"config.data.path = {path!r}: `{BUILTIN}` for bytes, or `{BUILTIN}:N` for a BPE "
            "vocabulary of N ids, at most 65,536"
        )
    name = f"builtin-{_EDITION}-python-{platform.python_version()}{vocab and '-bpe-' + vocab}"
    folder = cache_folder() / name
    with _BUILDING:
        if not (folder / FILE).exists():
            try:
                build(folder, int(vocab) if vocab else None)
            except OSError:
                # Another process was faster; anything else is the machine's trouble.
                if not (folder / FILE).exists():
                    raise
    return folder


def build(folder: Path, bpe: int | None = None) -> None:
    """Writes the built-in corpus to `folder`, in bytes or in a BPE of `bpe` ids of its own."""
    texts: dict[str, list[bytes]] = {TRAIN: [], HELD_OUT: []}
    for data in documents():
        held_out = digest(data) % 1000 < _HELD_OUT_PER_MILLE
        texts[HELD_OUT if held_out else TRAIN].append(data)
    tokenizer: Tokenizer = ByteTokenizer()
    if bpe is not None:
        sample = texts[TRAIN][::_LEARNED]
        tokenizer = train_bpe((data.decode() for data in sample), bpe)
    source = f"pydoc_data.topics and standard library sources of Python {platform.python_version()}"
    with DatasetWriter(folder, tokenizer, source=source) as writer:
        for split, documents_ in texts.items():
            encoded = tokenizer.encode_batch([data.decode() for data in documents_])
            for data, tokens in zip(documents_, encoded, strict=True):
                writer.add(split, tokenizer.spec.document(tokens), len(data))


def documents() -> Iterator[bytes]:
    """Yields the documents of the built-in corpus, in an order that only Python decides."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name].strip().encode() + b"\n"
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in _sources(root)}
    for name in sorted(files):
        if data := files[name].read_bytes().strip():
            yield data + b"\n"


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _SKIPPED and not name.startswith("config-")
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(_MACHINE):
                path = Path(folder, name)
                if path.relative_to(root).parts[0] != "pydoc_data":  # its topics are in already
                    yield path


def split_bytes(shards: TokenShards) -> bytes | None:
    """Returns the text of a split, documents end to end; None if part of it cannot be read.

    Shards in object storage are fetched.
    """
    if not shards.readable(np.arange(len(shards))).all():
        return None
    tokenizer = load_tokenizer(shards.manifest.tokenizer, shards.folder)
    return b"".join(
        tokenizer.decode_bytes(shards.document(number)) for number in range(len(shards))
    )


def compression_baselines(data: bytes) -> dict[str, float]:
    """Returns bits per byte of gzip -9 and xz -9 on `data`, each started from nothing."""
    if not data:
        raise ValueError("no bytes to compress")
    sizes = {
        "gzip": len(gzip.compress(data, compresslevel=9, mtime=0)),
        "xz": len(lzma.compress(data, preset=9)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}
