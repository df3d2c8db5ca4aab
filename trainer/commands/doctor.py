"""`torus doctor`: what is wrong with this machine, found before it costs money.

Owns the checks and their advice; which package versions fit together is trainer/packages.py, what
a chip should reach is sharding/hardware.py. A check returns findings and never raises for what it
is there to find. Each finding is one line: ok, warn (it will run, but worse) or FAIL (it will not).
"""

import importlib
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.errors import install_hint
from sharding.hardware import chip_for
from trainer.commands.parser import CommandParser
from trainer.packages import check_packages, check_platform_packages, library_versions

USAGE = """\
usage: torus doctor [WORKDIR]

Checks Python and the packages, the devices (a timed and verified matrix product on each, whether
all compute alike and pass bytes on), memory, the compilation cache, and the disk below WORKDIR (the
current folder by default): writable, how fast, how full, and whether its clock agrees. One line per
finding: ok, warn or FAIL, and what to do about it.

The exit status is 1 if anything FAILs, so that a job script can stop there:

  torus doctor runs && torus train --config=quickstart --workdir=runs/a
"""

_IMPORTS = ("jax", "flax", "optax", "orbax.checkpoint", "tensorstore", "grain", "ml_collections")
_GIB = 2.0**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: `status` is "ok", "warn" or "FAIL", `advice` says what to do."""

    status: str
    subject: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"\n{'':18}-> {self.advice}" if self.advice else ""
        return f"{self.status:<5} {self.subject:<11} {self.text}{advice}"


def main(argv: list[str]) -> int:
    """Runs every check, prints its findings as they come and returns 1 if any failed."""
    parser = CommandParser("doctor")
    parser.add_argument("workdir", metavar="WORKDIR", nargs="?", default=".")
    workdir = Path(parser.parse(argv).workdir)
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        check_python,
        check_versions,
        check_imports,
        check_devices,
        check_links,
        check_memory,
        check_cache,
        lambda: check_disk("workdir", workdir),
    )
    failed = warned = 0
    for check in checks:
        for finding in check():
            print(finding, flush=True)
            failed += finding.status == "FAIL"
            warned += finding.status == "warn"
    print(f"\n{failed} failed, {warned} to look at" if failed or warned else "\nall is well")
    return 1 if failed else 0


def check_python() -> Iterator[Finding]:
    """The interpreter and the system below it; its version range is the installer's to refuse."""
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("ok", "python", f"{text}, {os.cpu_count()} cores")


def check_versions() -> Iterator[Finding]:
    """The packages' versions against the ranges they declare for one another."""
    problems = check_packages()
    for problem in problems:
        yield _conflict("FAIL", problem)
    for problem in check_platform_packages():
        yield _conflict("warn", problem)
    if not problems:
        versions = library_versions()
        yield Finding("ok", "packages", ", ".join(f"{n} {v}" for n, v in versions.items()))


def check_imports() -> Iterator[Finding]:
    """Whether the packages load: metadata cannot show a broken wheel."""
    start = time.perf_counter()
    for name in _IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken package raises is the finding
            advice = f"reinstall it: pip install --force-reinstall {name.replace('.', '-')}"
            yield Finding("FAIL", "import", f"{name}: {_first_line(error)}", advice)
            return
    yield Finding("ok", "import", f"all load in {time.perf_counter() - start:.1f} s")


def check_devices() -> Iterator[Finding]:
    """Whether JAX finds devices, and whether each multiplies correctly and at its rate."""
    try:
        import jax

        from sharding.runtime import start_runtime

        start_runtime()
        devices = jax.local_devices()
    except Exception as error:  # drivers fail in their own ways; all of them are the finding
        advice = "check drivers and JAX_PLATFORMS; JAX_PLATFORMS=cpu trains without accelerator"
        yield Finding("FAIL", "devices", f"JAX cannot start: {_first_line(error)}", advice)
        return
    chip = chip_for(devices[0])
    kind = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    if jax.process_count() > 1:
        kind += f", process {jax.process_index()} of {jax.process_count()}"
    if chip is not None:
        kind += (
            f": each {chip.flops_bf16 / 1e12:,.0f} TFLOP/s bfloat16, {chip.hbm_bytes / 1e9:.0f} GB "
            f"at {chip.hbm_bandwidth / 1e9:,.0f} GB/s"
        )
    if devices[0].platform == "cpu":
        advice = _idle_accelerator()
        yield Finding("warn" if advice else "ok", "devices", kind, advice)
    elif chip is None:
        yield Finding("warn", "devices", kind, "not in the chip table: MFU will not be shown")
    else:
        yield Finding("ok", "devices", kind)
    yield from _check_matmuls(devices, chip.flops_bf16 if chip else None)


def check_links() -> Iterator[Finding]:
    """Whether all devices here compute alike and get the bytes that the others send."""
    try:
        import jax

        from trainer.integrity import device_problem, in_a_row

        devices = jax.local_devices()
        problem = str(device_problem(in_a_row(devices)) or "")
    except Exception as error:  # check_devices says more of a JAX that cannot start
        problem = _first_line(error)
    if problem:
        advice = "take this device out of the job, or restart the machine"
        yield Finding("FAIL", "links", problem, advice)
    else:
        text = f"{len(devices)} devices compute alike and pass known bytes on"
        yield Finding("ok", "links", text)


def check_memory() -> Iterator[Finding]:
    """Memory of the host: what is free, within the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    text = f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f}"
    if limit.isdigit() and int(limit) < total:
        used = _read("/sys/fs/cgroup/memory.current").strip()
        cached = re.search(r"^inactive_file (\d+)$", _read("/sys/fs/cgroup/memory.stat"), re.M)
        used = (int(used) if used.isdigit() else 0) - (int(cached[1]) if cached else 0)
        free = min(free, int(limit) - used)
        text = f"{free / _GIB:.1f} GiB free, the container's limit is {int(limit) / _GIB:.1f}"
    if free < 2 * _GIB:
        yield Finding("warn", "memory", text, "checkpoints and data need some: free at least 2 GiB")
    else:
        yield Finding("ok", "memory", text)


def check_cache() -> Iterator[Finding]:
    """The folder of compiled programs: without it every start compiles everything again."""
    jax = sys.modules.get("jax")
    folder = getattr(jax.config, "jax_compilation_cache_dir", None) if jax else None
    if not folder:
        advice = "set JAX_COMPILATION_CACHE_DIR to a folder that outlives the job"
        yield Finding("warn", "cache", "no compilation cache: every start compiles again", advice)
    elif "://" in folder:
        yield Finding("ok", "cache", folder)
    else:
        yield from check_disk("cache", Path(folder))


def check_disk(subject: str, folder: Path) -> Iterator[Finding]:
    """Whether a folder can be written, how fast and how much, and whether its clock agrees.

    Missing folders are not created: their nearest existing parent is tested in their stead.
    """
    existing = folder.expanduser().resolve()
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    size = 64 * 2**20
    free = shutil.disk_usage(existing).free
    if free < 2 * size:
        text = f"{existing}: full, {free / _GIB:.2f} GiB free"
        yield Finding("FAIL", subject, text, "free some space, or name another folder")
        return
    try:
        seconds, skew = _write_file(existing, size)
    except OSError as error:
        text = f"{existing}: cannot be written: {error.strerror}"
        yield Finding("FAIL", subject, text, "change its permissions, or name another folder")
        return
    rate = size / seconds
    text = f"{existing}: writes {rate / 1e6:,.0f} MB/s, {free / _GIB:.0f} GiB free"
    if rate < 50e6:
        yield Finding("warn", subject, text, "checkpoints will be slow to save: use a faster disk")
    elif free < 20 * _GIB:
        yield Finding("warn", subject, text, "checkpoints of a large model will fill it")
    else:
        yield Finding("ok", subject, text)
    if abs(skew) > 5:
        text = f"{existing}: its clock is {skew:+.0f} s off this machine's"
        yield Finding("warn", "clock", text, "synchronise both (NTP), or logs will not line up")


def _check_matmuls(devices: list[Any], peak: float | None) -> Iterator[Finding]:
    """Times a product on every device; the devices of one machine must agree."""
    rates = {}
    for device in devices:
        try:
            rates[device.id] = _matmul_rate(device)
        except Exception as error:  # a dying device raises anything
            advice = "take this device out of the job, or restart the machine"
            yield Finding("FAIL", "matmul", f"device {device.id}: {_first_line(error)}", advice)
    if not rates:
        return
    middle = statistics.median(rates.values())
    low, high = (f"{pick(rates.values()) / 1e12:,.2f}" for pick in (min, max))
    text = f"right on {len(rates)} of {len(devices)} devices, "
    text += f"{low if low == high else f'{low} to {high}'} TFLOP/s bfloat16"
    # Fake CPU devices share the cores, so that their rates say nothing about one another.
    slow = [] if devices[0].platform == "cpu" else [i for i, r in rates.items() if r < 0.8 * middle]
    if slow:
        advice = f"device {', '.join(map(str, slow))} is slow: every step would wait for it"
        yield Finding("warn", "matmul", text, advice)
    elif peak and middle < 0.4 * peak:
        advice = f"the datasheet says {peak / 1e12:,.0f}: is something else using it?"
        yield Finding("warn", "matmul", text, advice)
    else:
        yield Finding("ok", "matmul", text)


def _matmul_rate(device: Any) -> float:
    """Returns FLOP/s of one device in bfloat16.

    Raises:
      ArithmeticError: the product is wrong.
    """
    import jax
    import numpy as np

    size, count = (256, 2) if device.platform == "cpu" else (8192, 16)
    # Rows are rotated by one, again and again: every product is exact, and none can be skipped.
    start_DD = np.arange(size, dtype=np.float32)[:, None] % 128 + np.zeros(size, np.float32)
    turn_DD = np.roll(np.eye(size, dtype=np.float32), 1, axis=0)
    dtype = jax.numpy.bfloat16
    x_DD, turn_DD = (jax.device_put(a.astype(dtype), device) for a in (start_DD, turn_DD))

    @jax.jit
    def rotate(x_DD: jax.Array, turn_DD: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, y_DD: turn_DD @ y_DD, x_DD)

    result = np.asarray(rotate(x_DD, turn_DD)[:, 0], np.float32)
    if not np.array_equal(result, np.roll(start_DD[:, 0], count)):
        raise ArithmeticError("a matrix product came out wrong")
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        rotate(x_DD, turn_DD).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return count * 2.0 * size**3 / best


def _write_file(folder: Path, size: int) -> tuple[float, float]:
    """Writes and syncs `size` bytes; returns the seconds and how far the file's time is off."""
    block = os.urandom(2**20)  # random: some file systems compress
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".torus-doctor-") as file:
        start = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        return seconds, os.fstat(file.fileno()).st_mtime - time.time()


def _idle_accelerator() -> str:
    """Returns advice about an accelerator that is there although JAX runs on CPU, or ""."""
    extra = ""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        extra = "cuda"
    elif any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        extra = "tpu"
    if not extra or os.environ.get("JAX_PLATFORMS") == "cpu":
        return ""
    return f"an accelerator is there and not used: {install_hint(extra)}"


def _conflict(status: str, problem: str) -> Finding:
    text, _, advice = problem.partition(": pip install ")
    return Finding(status, "packages", text, f"pip install {advice}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
