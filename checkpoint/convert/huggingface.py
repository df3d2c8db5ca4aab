"""Folders of Hugging Face: config.json, safetensors in one file or many, tokenizer files."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.convert.folders import inside
from checkpoint.convert.safetensors import Stored, Tensors, create, read_header
from checkpoint.files import read_bytes, read_json
from sharding.errors import MismatchError, UnsafeInputError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXTRA = 2**28  # bytes of such a file
EXTRAS = (  # copied as they are, where there are any
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """Returns config.json; raises UnsafeInputError or MismatchError if it cannot be read."""
    return read_json(inside(folder, CONFIG))


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Returns every tensor of a folder by name.

    Raises:
      UnsafeInputError: damaged or hostile files. MismatchError: index and shards disagree.
    """
    if not (folder / INDEX).exists():
        return read_header(inside(folder, SINGLE))[0]
    where = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UnsafeInputError(f"{folder / INDEX}: weight_map does not name files")
    tensors: dict[str, Stored] = {}
    for file in sorted(set(where.values())):
        found = read_header(inside(folder, file))[0]
        for name in found:
            if where.get(name) != file:
                raise MismatchError(
                    f"{folder}: {file} holds `{name}`, the index says {where.get(name)}"
                )
        tensors |= found
    if missing := sorted(set(where) - set(tensors)):
        raise MismatchError(f"{folder}: the index puts `{missing[0]}` in {where[missing[0]]}, "
                            "which does not hold it")  # fmt: skip
    return tensors


def copy_extras(source: Path, target: Path) -> list[str]:
    """Copies the tokenizer files and generation_config.json; returns their names."""
    names = [name for name in EXTRAS if (source / name).exists()]
    files = {name: inside(source, name) for name in names}
    if files:
        target.mkdir(exist_ok=True)
    for name, path in files.items():
        (target / name).write_bytes(read_bytes(path, EXTRA))
    return names


def create_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: list[tuple[str, np.dtype, tuple[int, ...]]],
    shard_bytes: int,
) -> Tensors:
    """Writes config.json, the index and empty shards of at most `shard_bytes` (or one tensor)."""
    shards: list[list] = [[]]
    room = shard_bytes
    total = 0
    for name, dtype, shape in tensors:
        size = int(np.prod(shape)) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, dtype, shape))
        room, total = room - size, total + size
    count = len(shards)
    stored: dict[str, Stored] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        stored |= create(folder / file, shard)
    if count > 1:
        where = {name: stored[name].file.name for name, _, _ in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Tensors(stored, os.O_RDWR)
