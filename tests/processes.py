"""Starts a JAX job of several real processes on this machine, joined over loopback.

The code that runs in them calls `sharding.runtime.start_runtime()` first, as a real job would.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parent.parent
BESIDE = ROOT / "tests/beside"  # as if of a user: files with the names of Torus's packages


def run_processes(
    code: str | Path,
    n: int,
    devices_per_process: int = 1,
    args: Sequence[object] = (),
    timeout: float = 180,
    *,
    check: bool = True,
) -> list[CompletedProcess[str]]:
    """Runs `code` (a script's path, or Python source) in `n` processes of one job and waits.

    Every process sees `devices_per_process` CPU devices, `args` in sys.argv and the repository on
    its import path. All are killed when one takes longer than `timeout` seconds together.

    Returns:
      One result per process, in order of process index, with stdout and stderr as text.

    Raises:
      RuntimeError: with `check`, when a process fails; the message ends with its stderr.
    """
    program = [str(code)] if isinstance(code, Path) else ["-c", code]
    command = [sys.executable, *program, *map(str, args)]
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        try:
            for index in range(n):
                # Files, not pipes: a full pipe would stop a process that others wait for.
                out, err = (open(f"{folder}/{index}.{kind}", "w+") for kind in ("out", "err"))  # noqa: SIM115
                own = environment(
                    devices_per_process, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                    JAX_NUM_PROCESSES=str(n), JAX_PROCESS_ID=str(index),
                )  # fmt: skip
                job = subprocess.Popen(command, env=own, stdout=out, stderr=err, cwd=ROOT)
                jobs.append((job, out, err))
            deadline = time.monotonic() + timeout
            while any(job.poll() is None for job, _, _ in jobs) and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            for job, _, _ in jobs:
                if job.poll() is None:
                    job.kill()
                    job.wait()
        results = [_result(command, *job) for job in jobs]
    for index, result in enumerate(results):
        if check and result.returncode:
            raise RuntimeError(
                f"process {index} of {n} ended with {result.returncode} (limit {timeout} s):\n"
                f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
            )
    return results


def _result(command: list[str], job: subprocess.Popen, *streams) -> CompletedProcess[str]:
    texts = []
    for stream in streams:
        stream.seek(0)
        texts.append(stream.read())
        stream.close()
    return CompletedProcess(command, job.returncode, *texts)


def environment(devices: int = 1, **variables: str) -> dict[str, str]:
    """Returns the variables of a process that sees so many devices and compiles as tests do."""
    flags = re.sub(r"(?<=platform_device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path, **variables}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
