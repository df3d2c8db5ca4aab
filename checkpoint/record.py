"""The integrity record of a step, written in the background while its arrays are.

The fingerprints in it are computed on the devices, and waiting for them must hold nobody up. Orbax
calls the handler; this module does not import it.
"""

import asyncio
import json
from collections.abc import Awaitable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax

from checkpoint.fingerprint import as_text
from checkpoint.manifest import integrity_record


@dataclass(frozen=True)
class Record:
    """The integrity record of a step, its fingerprints still being computed on the devices."""

    step: int
    names: list[str]
    fingerprints: Future[jax.Array]
    manifest: dict[str, Any]
    meta: dict[str, Any]

    def text(self) -> str:
        arrays = as_text(self.fingerprints.result(), self.names)
        return json.dumps(integrity_record(self.step, arrays, self.manifest, self.meta))


class RecordHandler:
    """Writes a `Record` in the background, where waiting for the devices holds nobody up."""

    async def save(self, directory: Any, record: Record) -> Awaitable[None]:
        return self._write(directory, record)

    async def _write(self, directory: Any, record: Record) -> None:
        folder = await directory.await_creation()
        if jax.process_index() == 0:
            text = await asyncio.to_thread(record.text)
            await asyncio.to_thread((folder / "data.json").write_text, text)

    async def load(self, directory: Any, abstract: None = None) -> Awaitable[None]:
        raise TypeError("the integrity record is read without Orbax: checkpoint/manifest.py")

    async def metadata(self, directory: Any) -> None:
        return None

    def is_handleable(self, item: Any) -> bool:
        return isinstance(item, Record)

    def is_abstract_handleable(self, item: Any) -> None:
        return None
