"""What a stored step says about itself, read without JAX, Orbax or the arrays.

Beside its arrays each step holds two JSON files, committed with them: the manifest (every array's
name, shape and dtype, as they were in memory) and the run's own `meta`. Comparing with the manifest
is what keeps a restore from casting: Orbax turns float32 into bfloat16 without a word.
"""

import json
import os
from pathlib import Path
from typing import Any

from checkpoint import steps
from checkpoint.steps import CheckpointError

MANIFEST = "manifest"
META = "meta"
FORMAT = 1


def read_meta(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """Returns the JSON object that the run saved with `step`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return _read(folder, step, META)


def read_manifest(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """Returns the manifest: `format`, `saved` (UTC) and `arrays` (name → shape, dtype).

    Raises:
        CheckpointError: it is missing, damaged, or of a format this version does not know.
    """
    manifest = _read(folder, step, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"cannot read step {step} in {folder}: manifest format {manifest.get('format')}, "
            f"this version reads {FORMAT}"
        )
    return manifest


def describe(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns what a checkpoint folder holds, as plain JSON values.

    The result has `folder`, `interrupted` (names of unfinished saves) and `steps`: for each its
    `step`, `bytes`, `saved` (UTC), `arrays` (name → shape, dtype) and `meta`, or an `error`.

    Raises:
        UsageError: there is no complete step.
    """
    steps.pick_step(folder)
    return {
        "folder": str(steps.folder_path(folder)),
        "interrupted": steps.interrupted_saves(folder),
        "steps": [_describe_step(folder, step) for step in steps.complete_steps(folder)],
    }


def _describe_step(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    facts = {"step": step, "bytes": _total_bytes(steps.folder_path(folder) / str(step))}
    try:
        manifest = read_manifest(folder, step)
        facts |= {"saved": manifest["saved"], "arrays": manifest["arrays"]}
        facts["meta"] = read_meta(folder, step)
    except CheckpointError as error:
        facts["error"] = str(error)
    return facts


def _read(folder: str | os.PathLike, step: int, item: str) -> dict[str, Any]:
    path = steps.folder_path(folder) / str(step) / item / "data.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read step {step} in {folder}: {item}: {steps.reason(error)}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"cannot read step {step} in {folder}: {item} is not an object")
    return found


def _total_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(_total_bytes(child) for child in path.iterdir())
    stat = path.stat()
    return stat.length if steps.is_remote(path) else stat.st_size
