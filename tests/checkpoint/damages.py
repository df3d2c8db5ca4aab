"""Ways in which the files of a step go wrong: a flipped bit, and what disks and people do."""

import os
import shutil
from pathlib import Path

import numpy as np

TEXTS = (b"", b"{}", b"[]", b"null", b"0", b'{"a": ' * 5000, b"\xff\xfe", b"not JSON")


def flip(step: Path, rng: np.random.Generator) -> str:
    """Flips one bit of one file; every file has the same chance, however small it is."""
    path = _file(step, rng)
    data = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(data)))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {path.relative_to(step)}"


def truncated(step: Path, rng: np.random.Generator) -> str:
    path = _file(step, rng)
    size = int(rng.integers(path.stat().st_size))
    os.truncate(path, size)
    return f"{path.relative_to(step)} cut to {size} bytes"


def deleted(step: Path, rng: np.random.Generator) -> str:
    path = _file(step, rng, least=0)
    path.unlink()
    return f"{path.relative_to(step)} deleted"


def folder_deleted(step: Path, rng: np.random.Generator) -> str:
    path = _pick(sorted(p for p in step.rglob("*") if p.is_dir()), rng)
    shutil.rmtree(path)
    return f"{path.relative_to(step)}/ deleted"


def swapped(step: Path, rng: np.random.Generator) -> str:
    """Two files of the step change places."""
    one, other = _file(step, rng), _file(step, rng)
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    return f"{one.relative_to(step)} and {other.relative_to(step)} swapped"


def of_another_step(step: Path, rng: np.random.Generator) -> str:
    """A file is that of the step beside this one, as after a copy that went wrong."""
    path = _file(step, rng, least=0)
    other = next(p for p in sorted(step.parent.iterdir()) if p != step)
    twins = sorted((other / path.parent.relative_to(step)).iterdir())
    source = next((p for p in twins if p.name == path.name and p.is_file()), None)
    source = source or _pick([p for p in twins if p.is_file()], rng)
    path.write_bytes(source.read_bytes())
    return f"{path.relative_to(step)} is another step's {source.name}"


def zeroed(step: Path, rng: np.random.Generator) -> str:
    """Some of a file, or all of it, is zeros, as after a power cut."""
    path = _file(step, rng)
    data = bytearray(path.read_bytes())
    start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist()) if rng.random() < 0.7 else (
        0, len(data)
    )  # fmt: skip
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    return f"{path.relative_to(step)}: bytes {start} to {stop} zero"


def doubled(step: Path, rng: np.random.Generator) -> str:
    path = _file(step, rng)
    path.write_bytes(path.read_bytes() * 2)
    return f"{path.relative_to(step)} there twice"


def copied_over(step: Path, rng: np.random.Generator) -> str:
    one, other = _file(step, rng), _file(step, rng, least=0)
    other.write_bytes(one.read_bytes())
    return f"{one.relative_to(step)} copied over {other.relative_to(step)}"


def renamed(step: Path, rng: np.random.Generator) -> str:
    path = _pick(sorted(step.rglob("*")), rng)
    path.rename(path.with_name(path.name + "~"))
    return f"{path.relative_to(step)} renamed"


def other_text(step: Path, rng: np.random.Generator) -> str:
    """A JSON file has another content, or none."""
    names = ("_METADATA", "_CHECKPOINT_METADATA", "data.json", "process_0", "_sharding")
    path = _pick(sorted(p for p in step.rglob("*") if p.name in names), rng)
    text = _pick(TEXTS, rng)
    path.write_bytes(text)
    return f"{path.relative_to(step)} is {text[:20]!r}"


def another_kind(step: Path, rng: np.random.Generator) -> str:
    """A folder, or a link that leads nowhere, where a file was."""
    path = _file(step, rng, least=0)
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()
        return f"{path.relative_to(step)} is a folder"
    path.symlink_to(path)
    return f"{path.relative_to(step)} is a link to itself"


OTHERS = (
    truncated, deleted, folder_deleted, swapped, of_another_step, zeroed, doubled, copied_over,
    renamed, other_text, another_kind,
)  # fmt: skip


def _file(step: Path, rng: np.random.Generator, least: int = 1) -> Path:
    files = (p for p in sorted(step.rglob("*")) if p.is_file() and p.stat().st_size >= least)
    return _pick(list(files), rng)


def _pick(choices, rng: np.random.Generator):
    return choices[int(rng.integers(len(choices)))]
