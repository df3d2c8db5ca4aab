"""What a stored step says about itself, read without JAX, Orbax or the arrays.

Beside its arrays each step holds three JSON files, committed with them: the manifest (every array's
name, shape and dtype, as they were in memory), the run's own `meta`, and the integrity record (the
step's number, every array's fingerprint, a digest of the other two files and one of itself).
Comparing with the manifest is what keeps a restore from casting: Orbax turns float32 into bfloat16
without a word. Comparing with the record is what keeps it from returning other bits.
"""

import hashlib
import json
import math
import os
from typing import Any

from checkpoint import files, steps
from checkpoint.steps import CheckpointError
from sharding.errors import MismatchError, UsageError

MANIFEST = "manifest"
META = "meta"
INTEGRITY = "integrity"
FORMAT = 2
_DTYPES = {
    "bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint2", "uint4", "uint8", "uint16",
    "uint32", "uint64", "float16", "float32", "float64", "bfloat16", "complex64", "complex128",
    "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
}  # fmt: skip


def integrity_record(
    step: int, arrays: dict[str, str], manifest: dict[str, Any], meta: dict[str, Any]
) -> dict[str, Any]:
    """Returns the integrity record of a step whose arrays have the fingerprints `arrays`."""
    record = {
        "step": step,
        "arrays": arrays,
        MANIFEST: _digest(manifest),
        META: _digest(meta),
    }
    return record | {"record": _digest(record)}


def read_step(
    folder: str | os.PathLike, step: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Returns the manifest, the run's `meta` and name → fingerprint, all files read once.

    Raises:
        CheckpointError: one is missing, damaged, another step's, or of an unknown format.
    """
    manifest = read_manifest(folder, step, checked=False)
    record = _read_record(folder, step)
    _check_digest(folder, step, MANIFEST, manifest, record)
    meta = _read(folder, step, META)
    _check_digest(folder, step, META, meta, record)
    return manifest, meta, record["arrays"]


def check_fingerprints(
    folder: str | os.PathLike,
    step: int,
    found: dict[str, str],
    saved: dict[str, str] | None = None,
) -> None:
    """Compares name → fingerprint of arrays that were read with those saved as `step`.

    saved: from `read_step`, where that was called already.

    Raises:
        CheckpointError: arrays differ, and which; the integrity record is missing, damaged, or
            another step's.
    """
    saved = _read_record(folder, step)["arrays"] if saved is None else saved
    wrong = [name for name, text in found.items() if saved.get(name) != text]
    if wrong:
        raise CheckpointError(
            f"step {step} in {folder}: {len(wrong)} of {len(found)} arrays are not the bits that "
            f"were saved: {steps.listing(wrong)}"
        )


def read_meta(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """Returns the JSON object that the run saved with `step`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    meta = _read(folder, step, META)
    _check_digest(folder, step, META, meta, _read_record(folder, step))
    return meta


def source_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Returns what the `meta` of a converted step says of its source, {} for a step of a run.

    `format` and `family` are strings, `config` and `optimizer` objects; each may be missing.

    Raises:
        MismatchError: the record has another form.
    """
    kinds = {"format": str, "family": str, "config": dict, "optimizer": dict}
    found = meta.get("source", {})
    if not isinstance(found, dict) or any(
        not isinstance(found.get(name, kind()), kind) for name, kind in kinds.items()
    ):
        raise MismatchError("the step's record of its source is not one that a conversion writes")
    return found


def write_record(folder: str | os.PathLike, step: int, arrays: dict[str, str]) -> None:
    """Writes the integrity record of a step that was made without one."""
    manifest, meta = (_read(folder, step, item) for item in (MANIFEST, META))
    path = steps.folder_path(folder) / str(step) / INTEGRITY
    path.mkdir(exist_ok=True)
    (path / "data.json").write_text(json.dumps(integrity_record(step, arrays, manifest, meta)))


def read_manifest(folder: str | os.PathLike, step: int, *, checked: bool = True) -> dict[str, Any]:
    """Returns the manifest: `format`, `saved` (UTC) and `arrays` (name → shape, dtype).

    checked: compare it with the integrity record, which a step being made does not have yet.

    Raises:
        CheckpointError: it is missing, damaged, or of a format this version does not know.
    """
    manifest = _read(folder, step, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"cannot read step {step} in {folder}: manifest format {manifest.get('format')}, "
            f"this version reads {FORMAT}"
        )
    arrays = manifest.get("arrays")
    if not isinstance(arrays, dict) or not all(map(_is_fact, arrays.values())):
        raise CheckpointError(
            f"cannot read step {step} in {folder}: {MANIFEST} does not describe arrays"
        )
    if checked:
        _check_digest(folder, step, MANIFEST, manifest, _read_record(folder, step))
    return manifest


def _is_fact(fact: Any) -> bool:
    """Whether this is the shape and the dtype of an array that a machine could hold."""
    if not isinstance(fact, dict) or not isinstance(shape := fact.get("shape"), list):
        return False
    sizes = all(type(size) is int and size >= 0 for size in shape) and math.prod(shape) < 2**60
    return sizes and isinstance(fact.get("dtype"), str) and fact["dtype"] in _DTYPES


def _read(folder: str | os.PathLike, step: int, item: str) -> dict[str, Any]:
    path = steps.folder_path(folder) / str(step) / item / "data.json"
    try:
        found = files.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read step {step} in {folder}: {item}: {steps.reason(error)}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"cannot read step {step} in {folder}: {item} is not an object")
    return found


def _check_digest(
    folder: str | os.PathLike,
    step: int,
    item: str,
    found: dict[str, Any],
    record: dict[str, Any],
) -> None:
    if _digest(found) != record.get(item):
        raise CheckpointError(
            f"step {step} in {folder}: {item} is not what was saved (damaged or edited)"
        )


def _read_record(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    record = _read(folder, step, INTEGRITY)
    own = record.pop("record", None)
    if _digest(record) != own or not isinstance(record.get("arrays"), dict):
        raise CheckpointError(
            f"step {step} in {folder}: {INTEGRITY} is not what was saved (damaged or edited)"
        )
    if record.get("step") != step:
        raise CheckpointError(
            f"step {step} in {folder}: its files were saved as step {record.get('step')}"
        )
    return record


def _digest(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of JSON content, however it is spelled."""
    plain = json.loads(json.dumps(content))  # keys as they will be read: always strings
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_matching(stored: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises UsageError unless name → shape and dtype of stored arrays are the wanted ones."""
    problems = []
    for verb, names in (
        ("lacks", [name for name in wanted if name not in stored]),
        ("also holds", [name for name in stored if name not in wanted]),
    ):
        if names:
            problems.append(f"{verb} {len(names)} array(s): {steps.listing(names)}")
    for name in sorted(stored.keys() & wanted.keys()):
        if stored[name] != wanted[name]:
            have, want = _text(stored[name]), _text(wanted[name])
            problems.append(f"holds `{name}` as {have}, wanted {want}")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UsageError(f"{where} does not match: {'; '.join(problems[:4])}{more}")


def _text(facts: dict[str, Any]) -> str:
    return f"{facts['dtype']}{facts['shape']}"
