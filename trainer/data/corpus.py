"""The built-in corpus: real text on a machine with no network and no files.

Python carries about 12 MB of text: the language reference behind `help()` and the sources of the
standard library. One topic or file is one document, about 1.5% of them held out by a digest of
their content. It depends on the Python version, so losses compare only within one; the manifest
records which. Also the compressors that a model on this corpus should beat.
"""

import gzip
import hashlib
import importlib
import lzma
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sharding.config import cache_folder
from trainer.data.manifest import FILE
from trainer.data.shards import DatasetWriter, TokenShards
from trainer.data.tokenizer import ByteTokenizer, load_tokenizer

TRAIN, HELD_OUT = "train", "val"
_HELD_OUT_PER_MILLE = 15
_EDITION = 1  # part of the folder's name: raise it when the choice of documents changes
_SKIPPED = {"__pycache__", "dist-packages", "site-packages", "test", "tests", "idle_test"}
_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")  # differ between installations


def builtin_folder() -> Path:
    """Returns the folder of the built-in dataset, writing it on first use (about a second)."""
    folder = cache_folder() / f"builtin-{_EDITION}-python-{platform.python_version()}"
    if not (folder / FILE).exists():
        try:
            build(folder)
        except OSError:
            # Another process was faster; anything else is the machine's trouble.
            if not (folder / FILE).exists():
                raise
    return folder


def build(folder: Path) -> None:
    """Writes the built-in corpus as a dataset of bytes to `folder`."""
    tokenizer = ByteTokenizer()
    source = f"pydoc_data.topics and standard library sources of Python {platform.python_version()}"
    with DatasetWriter(folder, tokenizer.spec, source=source) as writer:
        for data in documents():
            digest = hashlib.blake2b(data, digest_size=8).digest()
            held_out = int.from_bytes(digest, "little") % 1000 < _HELD_OUT_PER_MILLE
            tokens = np.concatenate(([tokenizer.BOS], tokenizer.encode(data)))
            writer.add(HELD_OUT if held_out else TRAIN, tokens, len(data))


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


def held_out_bytes(folder: Path) -> bytes:
    """Returns the text of the held-out split, documents end to end."""
    shards = TokenShards(folder, HELD_OUT)
    tokenizer = load_tokenizer(shards.manifest.tokenizer)
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
