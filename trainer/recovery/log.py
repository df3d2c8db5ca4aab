"""What a supervisor says on the console, and the lines of incidents.jsonl."""

import contextlib
import json
import os
import sys
import time
from typing import Any

from checkpoint.steps import folder_path, is_remote
from trainer.goodput import INCIDENTS, read_incidents, unrecovered

SILENCE = 25.0  # seconds without a word while something is waited for


class Log:
    """One supervisor's words, about the run in `workdir`."""

    def __init__(self, workdir: str) -> None:
        self._workdir = workdir
        self._said = -float("inf")  # when something was said last, by the monotonic clock

    def say(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"launch: {text}", file=sys.stderr, flush=True)

    def remind(self, text: str, every: float = SILENCE) -> None:
        """Says it unless something was said less than `every` seconds ago."""
        if time.monotonic() - self._said >= every:
            self.say(text)

    def open_fault(self) -> tuple[float, int] | None:
        """Returns when the run failed, by the monotonic clock, and the step reached then.

        None if it has recovered since, or was ended, or the record cannot be read: that ends no
        run. A supervisor that takes the place of the one that led knows only from the run's folder
        what there is to recover from.
        """
        fault = None
        with contextlib.suppress(OSError, ValueError):
            fault = unrecovered(read_incidents(self._workdir))
        if fault is None:
            return None
        ago = max(0.0, time.time() - fault.get("time", 0.0))  # hosts' clocks may differ
        return time.monotonic() - ago, int(fault.get("step", 0))

    def record(self, kind: str, generation: int, **facts: Any) -> None:
        """Says what happened and adds it to the run's incidents; None is left out of `facts`."""
        known = {name: value for name, value in facts.items() if value is not None}
        line = {"time": round(time.time(), 3), "generation": generation, "kind": kind}
        self.say(f"{kind}  " + "  ".join(f"{name} {value}" for name, value in known.items()))
        folder = folder_path(self._workdir)
        if not folder.is_dir():
            return  # refused before anything was written
        text = json.dumps(line | known) + "\n"
        path = folder / INCIDENTS
        if is_remote(self._workdir):  # nothing can be appended there
            path.write_text((path.read_text() if path.exists() else "") + text)
            return
        with contextlib.suppress(OSError), open(path, "a") as file:  # a full disk ends no run
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
