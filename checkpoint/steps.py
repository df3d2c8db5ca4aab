"""Which steps a checkpoint folder holds, and what becomes of the rest.

A step is a folder named by its number. On a local disk a save is written beside it, as
`<step>.orbax-checkpoint-tmp`, and renamed when whole, so the name alone says that it is complete.
An object store cannot rename; there a marker file, written last, says the same. Deleting goes the
other way round: the name (or the marker) goes first, so a kill in the middle never leaves half a
step that looks whole. Neither JAX nor Orbax is imported: a command can refuse a wrong step at once.
"""

import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from checkpoint.objects import ObjectPath
from sharding.errors import UsageError

TEMPORARY = ".orbax-checkpoint-tmp"
COMMITTED = "commit_success.txt"
GOOD = "good"  # a file in a step that enough healthy training followed

STALE_SECONDS = 70.0  # NFS shows a folder as it was up to 60 s ago (acdirmax)
_SHOWN = 8  # names listed in one error line before "and N more"


class CheckpointError(RuntimeError):
    """A save that failed or a stored step that cannot be read: the storage's fault, not a typo."""


class NotVisibleError(CheckpointError):
    """A step that one process of a job sees and another does not: a folder that is not shared."""


def folder_path(folder: str | os.PathLike) -> Path:
    """Returns an absolute path object; gs:// and s3:// become ObjectPaths, other URLs refused."""
    if not is_remote(folder):
        return Path(folder).expanduser().absolute()
    return ObjectPath.parse(os.fspath(folder))  # type: ignore[return-value]


def is_remote(folder: str | os.PathLike) -> bool:
    """Whether `folder` is an address in an object store rather than a path on a disk."""
    return re.match(r"^[a-z0-9]+:/", os.fspath(folder)) is not None


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; `path` may be of an object store, as of `folder_path`."""
    if is_remote(path):  # an object appears whole
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def complete_steps(folder: str | os.PathLike) -> list[int]:
    """Returns the complete steps in `folder`, ascending; [] when the folder does not exist."""
    root = folder_path(folder)
    if not root.is_dir():
        return []
    names = [path.name for path in root.iterdir() if _is_number(path.name) and _committed(path)]
    return sorted(int(name) for name in names)


def interrupted_saves(folder: str | os.PathLike) -> list[str]:
    """Returns the names of what interrupted saves and deletions left behind."""
    root = folder_path(folder)
    if not root.is_dir():
        return []
    unmarked = is_remote(folder)  # a local folder is never judged by what is missing in it
    return sorted(
        path.name
        for path in root.iterdir()
        if TEMPORARY in path.name or (unmarked and _is_number(path.name) and not _committed(path))
    )


def pick_step(folder: str | os.PathLike, step: int | None = None) -> int:
    """Returns `step`, or the newest one for None, after checking that it is complete.

    Raises:
        UsageError: there is no such step; the message lists what there is.
    """
    steps = complete_steps(folder)
    if step in steps or (step is None and steps):
        return steps[-1] if step is None else step
    wanted = "no complete step" if step is None or not steps else f"no step {step}"
    if not folder_path(folder).is_dir():
        found = "the folder does not exist"
    elif steps:
        found = "complete steps are " + listing(str(number) for number in steps)
    else:
        left = [f"{name} (interrupted save)" for name in interrupted_saves(folder)]
        found = "found " + (listing(left) or "nothing")
    raise UsageError(f"{wanted} in {folder_path(folder)}; {found}")


def wait_visible(folder: str | os.PathLike, step: int, process: int = 0) -> None:
    """Waits until this process sees a complete step that another one saw.

    Raises:
        NotVisibleError: it does not, for longer than a network's file system caches a listing.
    """
    path, until = folder_path(folder) / str(step), time.monotonic() + STALE_SECONDS
    while not _committed(path):
        if time.monotonic() > until:
            raise NotVisibleError(
                f"process {process} does not see step {step} in {folder}, which process 0 sees, "
                f"after {STALE_SECONDS:g} s: every host has to see the same folder"
            )
        time.sleep(0.2)


def good_steps(folder: str | os.PathLike) -> list[int]:
    """Returns the complete steps that are marked as good, ascending."""
    root = folder_path(folder)
    return [step for step in complete_steps(folder) if (root / str(step) / GOOD).exists()]


def kept_steps(steps: list[int], keep_last: int, keep_every: int, keep_ladder: int = 0) -> set[int]:
    """Returns those of `steps` that stay: the newest few, a ladder of older ones, the milestones.

    The ladder's rungs double in age: of the steps between 2^n and 2^(n+1) updates older than the
    newest only the oldest stays, for the `keep_ladder` smallest n that have any.
    """
    steps = sorted(steps)
    milestones = {step for step in steps if keep_every and step % keep_every == 0}
    rungs: dict[int, int] = {}
    for step in reversed(steps[:-keep_last]):  # the oldest of a rung comes last
        rungs[(steps[-1] - step).bit_length()] = step
    ladder = [rungs[age] for age in sorted(rungs)[:keep_ladder]]
    return set(steps[-keep_last:]) | milestones | set(ladder)


def delete_step(folder: str | os.PathLike, step: int) -> None:
    """Deletes a complete step; killed at any moment, it leaves all of the step or none."""
    root = folder_path(folder)
    path = root / str(step)
    if is_remote(folder):
        (path / COMMITTED).unlink()
        path.rmtree()
        return
    doomed = root / f"{step}{TEMPORARY}-deleted"
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(folder: str | os.PathLike, step: int) -> None:
    """Renames a damaged step to `<step>.damaged`, where it can be looked at but not restored.

    Raises:
        CheckpointError: the folder is in an object store, which cannot rename.
    """
    root = folder_path(folder)
    if is_remote(folder):
        raise CheckpointError(f"step {step} in {folder} is damaged: delete or move it, then resume")
    target = root / f"{step}.damaged"
    shutil.rmtree(target, ignore_errors=True)
    (root / str(step)).rename(target)


def clean_interrupted(folder: str | os.PathLike, step: int | None = None) -> list[str]:
    """Deletes what interrupted saves left (of one step, if given) and returns the names."""
    names = interrupted_saves(folder)
    if step is not None:
        names = [name for name in names if name == str(step) or name.startswith(f"{step}.")]
    for name in names:
        path = folder_path(folder) / name
        if is_remote(folder):
            path.rmtree()
        else:
            shutil.rmtree(path)
    return names


def make_writable(folder: str | os.PathLike) -> None:
    """Creates `folder` if needed.

    Raises:
        UsageError: it cannot be created or written.
    """
    root = folder_path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not is_remote(folder) and not os.access(root, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write into {root}")
    except OSError as error:
        raise UsageError(f"cannot write checkpoints to {root}: {reason(error)}") from error


def sync_step(folder: str | os.PathLike, step: int) -> None:
    """Forces the step's small files, its folders and its name to disk.

    Orbax syncs the array data alone; without this a power cut can undo the rename or leave
    empty metadata files. Object stores need nothing.
    """
    if is_remote(folder):
        return
    root = folder_path(folder)
    for place, _, files in os.walk(root / str(step), topdown=False):
        if Path(place).name != "d":  # array data, already synced
            for file in files:
                _sync(Path(place) / file)
        _sync(Path(place))
    _sync(root)


def listing(names: Any) -> str:
    """Returns the names separated by commas, cut short after a few."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def reason(error: BaseException) -> str:
    """Returns the text of an error in one line of bounded length; the cause is often at its end.

    What TensorStore adds to its messages, such as a page of the array's metadata, is left out.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.split(r" \[[a-z_]+='", text)[0]
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _committed(path: Path) -> bool:
    return (path / COMMITTED).exists() if is_remote(path) else path.is_dir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
