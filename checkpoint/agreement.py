"""How the processes of a job decide alike, and fail alike, on what each of them reads for itself.

A shared folder may look older to one process than to another (NFS caches listings for up to a
minute), and a file may be readable to one alone. If each acted on its own view, shards of two steps
would be mixed, or one process would raise while the others wait for it in a collective. All
processes call these functions at the same points; in a job of one process they cost nothing.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from checkpoint.steps import CheckpointError, NotVisibleError
from sharding.errors import StorageError, UsageError

T = TypeVar("T")

_RAISED = (UsageError, CheckpointError, OSError)
_KINDS = {  # the most specific first
    kind.__name__: kind for kind in (StorageError, UsageError, NotVisibleError, CheckpointError)
}


def first(decide: Callable[[], T]) -> T:
    """Returns in all processes what `decide` returns (JSON) in process 0, which alone calls it.

    Raises:
      UsageError, CheckpointError: in all processes, if `decide` raises it or an OSError.
    """
    if jax.process_count() == 1:
        return decide()
    error, message = None, {}
    if jax.process_index() == 0:
        try:
            message = {"value": decide()}
        except _RAISED as raised:
            error, message = raised, _described(raised, 0)
    message = _broadcast(message, 0)
    if "value" not in message:
        raise error or _error(message)
    return message["value"]


def together(read: Callable[[], T]) -> T:
    """Returns what `read` returns in this process, once it has succeeded in all of them.

    Raises:
      UsageError, CheckpointError: in all processes, if `read` raises it or an OSError in any. The
        others name the process in which it failed.
    """
    if jax.process_count() == 1:
        return read()
    error, result = None, None
    try:
        result = read()
    except _RAISED as raised:
        error = raised
    failed = multihost_utils.process_allgather(np.asarray(error is not None))
    if not failed.any():
        return result
    source = int(np.argmax(failed))
    message = {} if error is None else _described(error, jax.process_index())
    message = _broadcast(message, source)
    raise error or _error(message)


def check_same(content: Any, what: str) -> None:
    """Raises CheckpointError in all processes unless `content` (JSON) is the same in all."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if differs := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
        raise CheckpointError(
            f"processes 0 and {differs[0]} read different contents of {what}: does every host see "
            "the same folder?"
        )


def _described(error: Exception, process: int) -> dict[str, Any]:
    kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "")
    text = " ".join(str(error).split())[:2000]
    named = text.startswith("process ")
    return {"error": kind, "text": text if named else f"process {process}: {text}"}


def _error(message: dict[str, Any]) -> Exception:
    return _KINDS.get(message["error"], CheckpointError)(message["text"])


def _broadcast(message: dict[str, Any], source: int) -> dict[str, Any]:
    """Returns the message of process `source` in all processes."""
    own = jax.process_index() == source
    content = (
        np.frombuffer(json.dumps(message).encode(), np.uint8) if own else np.zeros(0, np.uint8)
    )
    size = multihost_utils.broadcast_one_to_all(np.asarray(len(content), np.int32), is_source=own)
    if not own:
        content = np.zeros(int(size), np.uint8)
    content = multihost_utils.broadcast_one_to_all(content, is_source=own)
    return json.loads(np.asarray(content, np.uint8).tobytes())
