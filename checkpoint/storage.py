"""One step in storage: written and read through Orbax, and checked against what was saved.

The only module that imports Orbax. Each step holds `state` (arrays, in Orbax's format), `manifest`,
`meta` and `integrity` (JSON files), committed together by one rename. Missing, truncated or
misplaced data is refused by name, and so are arrays whose bits are not those that were in memory
when they were saved: Orbax itself returns flipped bits without a word.
"""

import json
import os
import tempfile
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from checkpoint import agreement, steps
from checkpoint.config import CheckpointConfig
from checkpoint.failures import collect_reads, quiet_orbax, read_failure
from checkpoint.fingerprint import as_text, fingerprints
from checkpoint.manifest import (
    FORMAT,
    INTEGRITY,
    MANIFEST,
    META,
    check_fingerprints,
    check_matching,
    read_step,
)
from checkpoint.record import Record, RecordHandler
from checkpoint.steps import CheckpointError
from checkpoint.tree import check_storable, flatten, unflatten
from sharding.errors import UsageError

Tree = Any

_STATE = "state"
_LEAST_CHUNK = 2**20  # bytes; Orbax warns of less
_DATA_FILE = 2**27  # bytes; a file is written while the next is filled, with Orbax's 2 GB none is


def start_save(
    path: os.PathLike, state: Tree, meta: dict[str, Any], context: ocp.Context
) -> ocp.AsyncResponse:
    """Starts to save `state` (nested dicts of arrays) and `meta` (JSON) as the step at `path`.

    Blocks for the copy off the device. The response is waited for with `result()`.

    Raises:
        UsageError: the state or `meta` cannot be stored. Anything else: as Orbax fails.
    """
    check_storable(state)
    _check_json(meta)
    manifest = _manifest(state)
    record = Record(int(Path(path).name), list(flatten(state)), Future(), manifest, meta)
    try:
        with context:
            items = {_STATE: state, MANIFEST: manifest, META: meta, INTEGRITY: record}
            response = ocp.save_checkpointables_async(path, items)
    except Exception as error:
        record.fingerprints.set_exception(error)
        raise
    # Enqueued before the caller's next update may reuse the buffers, but after Orbax is set up,
    # which would have to share the processor with them; fetched while writing.
    record.fingerprints.set_result(fingerprints(state))
    return response


def load_step(
    folder: str | os.PathLike,
    step: int,
    abstract: Tree,
    *,
    partial: bool = False,
    verify: bool = True,
) -> tuple[Tree, dict[str, Any]]:
    """Returns the state stored as `step`, placed as `abstract` says, and its JSON object.

    Args:
        folder: where the steps are; it is only read.
        step: a complete step (`steps.pick_step` finds one).
        abstract: nested dict of jax.ShapeDtypeStruct with shardings, for any mesh.
        partial: `abstract` names only some of the arrays; the others stay unread on disk.
        verify: compare what was read with the fingerprints of what was saved.

    Raises (in all processes):
        UsageError: the step does not exist, or an array's name, shape or dtype differs from what
            `abstract` wants (nothing is cast, padded or dropped).
        CheckpointError: the step is damaged, and the message names files or arrays; or it is not
            visible to a process (`steps.NotVisibleError`).
    """
    quiet_orbax()
    step = agreement.first(lambda: steps.pick_step(folder, step))
    agreement.together(lambda: steps.wait_visible(folder, step, jax.process_index()))
    path = steps.folder_path(folder) / str(step)
    unplaced = [name for name, leaf in flatten(abstract).items() if leaf.sharding is None]
    if unplaced:
        raise ValueError(f"restoring needs a sharding for {steps.listing(unplaced)}")
    manifest, meta, saved = agreement.together(lambda: read_step(folder, step))
    agreement.check_same([manifest, meta, saved], f"step {step} in {folder}")
    stored, wanted = manifest["arrays"], _facts(abstract)
    if partial:
        stored = {name: facts for name, facts in stored.items() if name in wanted}
    check_matching(stored, wanted, f"step {step} in {folder}")
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    state = agreement.together(lambda: _load(path, abstract, context, path))
    if verify:
        check_fingerprints(folder, step, as_text(fingerprints(state), list(flatten(state))), saved)
    return state, meta


def try_restore(folder: str | os.PathLike, step: int) -> None:
    """Opens every array of a step as `load_step` does, and reads the first element of each.

    For a step too large to hold: what is left to read are values, of which Orbax knows no more
    than tensorstore does (checkpoint/convert/native.py).

    Raises:
        CheckpointError: the step could not be restored; the message names files or arrays.
    """
    quiet_orbax()
    manifest, _, _ = read_step(folder, step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    first = {
        name: jax.ShapeDtypeStruct((1,) * len(fact["shape"]), fact["dtype"], sharding=here)
        for name, fact in manifest["arrays"].items()
    }
    context = ocp.Context()
    context.array.loading.enable_padding_and_truncation = True
    path = steps.folder_path(folder) / str(step)
    if not steps.is_remote(folder):
        _load(path, unflatten(first), context, path)
        return
    # Orbax reads buckets by libraries that need not be here (gcsfs): what it reads beside the
    # values is copied to one element of each array.
    with tempfile.TemporaryDirectory() as copy:
        save_frame(copy, 0, unflatten(first), {})
        steps.copy_beside_values(path, Path(copy) / "0")
        _load(Path(copy) / "0", unflatten(first), context, path)


def _load(path: Path, abstract: Tree, context: ocp.Context, step: Path) -> Tree:
    """Returns the state at `path`, in this process alone.

    Raises:
        CheckpointError: it cannot be read; the message calls it `step`.
    """
    # Orbax would have all wait for one another, and so for one whose part is damaged.
    me = jax.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
    context.multiprocessing.barrier_sync_key_prefix = f"process{me}"
    try:
        with context:
            return ocp.load(path, abstract, checkpointable_name=_STATE)
    except Exception as error:
        text = read_failure(error, list(flatten(abstract))).replace(str(path), str(step))
    collect_reads()
    raise CheckpointError(f"cannot read step {step.name} in {step.parent}: {text}")


def save_frame(folder: str | os.PathLike, step: int, abstract: Tree, meta: dict[str, Any]) -> None:
    """Writes `step` with its manifest and `meta`, but every array with a single element.

    For arrays too large to hold: what fills them in (checkpoint/convert/native.py) gives them the
    shape and dtype of `abstract`, nested dicts of jax.ShapeDtypeStruct, before anyone looks.
    """
    quiet_orbax()
    frame = jax.tree.map(lambda a: np.zeros((1,) * len(a.shape), a.dtype), abstract)
    check_storable(frame)
    _check_json(meta)
    with save_context(CheckpointConfig()):
        items = {_STATE: frame, MANIFEST: _manifest(abstract), META: meta}
        ocp.save_checkpointables(steps.folder_path(folder) / str(step), items)


def save_context(config: CheckpointConfig) -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = config.compression
    if config.chunk_mib:
        chunks = partial(_chunks, config.chunk_mib * 2**20)
        context.array.saving.scoped_storage_options_creator = chunks
        context.array.saving.ocdbt_target_data_file_size = _DATA_FILE
    known = ocp.handlers.local_registry(include_global_registry=False)
    known.add(_only(ocp.handlers.PyTreeHandler(context=context)), checkpointable_name=_STATE)
    # Without this a dict of numbers counts as a tree of arrays and its lists, bools and Nones bend.
    for item in (MANIFEST, META):
        known.add(ocp.handlers.JsonHandler, checkpointable_name=item)
    known.add(RecordHandler, checkpointable_name=INTEGRITY)
    context.checkpointables.registry = known
    return context


def _chunks(largest: int, _: Any, leaf: Any) -> Any:
    """How an array is cut: by layers (and any stack), then into squares.

    The squares are small enough that a quarter along either axis, which another mesh may want, is
    whole chunks. Of a sharded array Orbax cuts the sharded axis alone, as far as that goes.
    """
    quarter = min(leaf.shape[-2:], default=1) // 4
    size = min(largest, max(_LEAST_CHUNK, quarter**2 * leaf.dtype.itemsize))
    stacked = (0,) if leaf.ndim > 2 else None  # else a layer could not be read without the others
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=size, shard_axes=stacked)


def _only(handler: Any) -> type:
    """Returns a class that gives `handler`: Orbax makes them all anew, eight times for one save."""
    return type("Only", (), {"__new__": lambda cls: handler})


def _manifest(state: Tree) -> dict[str, Any]:
    saved = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": FORMAT, "saved": saved, "arrays": _facts(state)}


def _facts(tree: Tree) -> dict[str, dict[str, Any]]:
    """Returns name → shape and dtype, as JSON values, of arrays or abstract arrays."""
    return {
        name: {"shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name}
        for name, leaf in flatten(tree).items()
    }


def _check_json(meta: dict[str, Any]) -> None:
    for key, value in meta.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"checkpoint meta `{key}` is not JSON: {error}") from error
