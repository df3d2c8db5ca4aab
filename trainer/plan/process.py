"""A compilation in a process of its own, and the answers of earlier ones.

The compiler needs another environment than a command has, takes minutes in which Ctrl-C must still
work, and may crash. What it said is kept in the cache folder, by experiment, slice, versions and
source code, because it says the same again. Imports no JAX.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from checkpoint.steps import write_whole
from sharding.config import cache_folder
from sharding.topology import Slice, compiler_environment
from torus import module_command
from trainer.config import ROOT, Experiment

PARTS = ("name", "model", "data", "mesh", "optimizer", "train", "perf")  # what the step depends on
# What decides what is compiled and what is read from it.
SOURCES = (
    "models/**/*.py", "sharding/*.py", "trainer/*.py",
    *(f"trainer/plan/{name}.py" for name in (
        "audit", "compile", "cost", "forecast", "hlo", "memory", "recipe")),
)  # fmt: skip
# For glibc: the compiler's many threads would keep a tenth more of memory that they freed.
LEAN = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(2**17)}


class Compilation:
    """One run of `trainer.plan.compile`; as a context it leaves no process behind.

    save, page: files for the program's text, gzipped, and for its picture; "" keeps none.
    """

    def __init__(
        self, experiment: Experiment, target: Slice, save: str = "", page: str = ""
    ) -> None:
        self._kept = None if save or page else _kept(experiment, target)
        request = {"experiment": dataclasses.asdict(experiment), "slice": target.name}
        request |= {"save": save and os.path.abspath(save), "page": page and os.path.abspath(page)}
        self._files = contextlib.ExitStack()
        folder = Path(self._files.enter_context(tempfile.TemporaryDirectory()))
        self._answer, self._log = folder / "answer", folder / "log"
        known = self._kept is not None and self._kept.exists()
        self._process = None if known else self._start(json.dumps(request))

    def _start(self, request: str) -> subprocess.Popen:
        environment = {**LEAN, **os.environ, **compiler_environment()}
        question = self._answer.with_name("question")
        question.write_text(request)
        with question.open() as stdin, self._answer.open("w") as out, self._log.open("w") as log:
            return subprocess.Popen(
                module_command("trainer.plan.compile"),
                stdin=stdin,
                stdout=out,
                stderr=log,
                env=environment,
            )

    def __enter__(self) -> "Compilation":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the compiler, which would run to its end otherwise; safe to call twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._files.close()

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def result(self) -> tuple[int, dict[str, Any] | None, str]:
        """Waits; returns exit status, the plan or {"refused"} (None when it failed), and log."""
        if self._process is None:
            return 0, json.loads(self._kept.read_text()), ""
        status = self._process.wait()
        log = self._log.read_text(errors="replace")
        if status:
            return status, None, log
        plan = json.loads(self._answer.read_text().splitlines()[-1])
        if self._kept is not None and "refused" not in plan:
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._kept, json.dumps(plan).encode())
        return 0, plan, log


def _kept(experiment: Experiment, target: Slice) -> Path:
    """The file of the cache that holds, or would hold, the plan of this experiment."""
    digest = hashlib.sha256(target.name.encode())
    for name in ("jax", "jaxlib", "libtpu"):
        digest.update(f" {name} {importlib.metadata.version(name)}".encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    digest.update(described(experiment))
    digest.update(b"evaluates" if experiment.eval.every else b"")
    return cache_folder() / "plans" / f"{digest.hexdigest()[:32]}.json"


def described(experiment: Experiment) -> bytes:
    """Returns what of an experiment its compiled step depends on, to be hashed."""
    parts = [(part, getattr(experiment, part)) for part in PARTS]
    plain = [(p, dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v) for p, v in parts]
    return json.dumps(plain).encode()
