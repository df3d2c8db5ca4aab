"""Reads the final instruction bundles of a TPU kernel that was compiled without a TPU.

libtpu writes them when asked by its flags (`environment`). One bundle is counted as one cycle;
waits for memory and stalls are not in them, so the figures rank kernels, they do not time them.
Where a body has fewer bundles than its products keep the matrix units busy, the products count.

Needs nothing but the files: the parts of the main loop, in program order, with their lengths.
"""

import glob
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from sharding.topology import compiler_environment

FOLDER = "TORUS_BUNDLES"  # the environment variable that names where they are written
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)?:\s*(?:>\s*)*\{")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \(([^)]*)\) target = \$region(\d+)")
_EXIT = r" = scmp\.(?:ge|eq)\.s32\.totalorder %\w+, (\d+) /\* loop exit"


@dataclass(frozen=True)
class Region:
    """A part of a kernel behind a branch: its bundles, matrix products, and parts within."""

    start: int
    stop: int
    products: int
    inner: tuple["Region", ...]

    @property
    def bundles(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Kernel:
    """The grid loop of one compiled kernel. trips: its count, None where it is not a constant."""

    name: str
    trips: int | None
    regions: tuple[Region, ...]
    overhead: int  # bundles of a step outside of the regions


def environment(folder: str) -> dict[str, str]:
    """Returns the environment in which libtpu writes bundles to `folder`; set before JAX loads."""
    flags = (
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*final.*",
    )
    return {
        **compiler_environment(),
        FOLDER: folder,
        "TPU_MIN_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags]),
    }


def compile_and_read(folder: str, compile_once: Callable[[], object]) -> list[Kernel]:
    """Runs `compile_once` and returns the kernels that it compiled, in program order."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    compile_once()
    kernels = []
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*final_bundles.txt")):
        name = re.sub(r"^\d+-|-\d+-final_bundles.txt$", "", os.path.basename(path))
        if any(part in path for part in ("schedule-analysis", "static_gap", "TLP", "<late")):
            continue
        with open(path, errors="replace") as file:
            text = file.read()
        if "custom-call" in text[-3000:] and (kernel := _parse(name, text)) is not None:
            kernels.append(kernel)
    shutil.rmtree(folder, ignore_errors=True)
    return kernels


def _parse(name: str, text: str) -> Kernel | None:
    bundles: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    starts: dict[int, int] = {}
    for at, bundle in enumerate(bundles):
        for region in _START.findall(bundle):
            starts.setdefault(int(region), at)
    spans, loops = set(), []
    for at, bundle in enumerate(bundles):
        for predicate, region in _BRANCH.findall(bundle):
            to = starts.get(int(region))
            if to is not None and to > at:
                spans.add((at + 1, to))
            elif to is not None:
                exits = re.escape(predicate.lstrip("!")) + _EXIT
                trips = [int(m) for b in bundles[to : at + 1] for m in re.findall(exits, b)]
                loops.append((to, at + 1, trips[-1] if trips else None))
    if not loops:
        return None
    first, last, trips = max(loops, key=lambda loop: loop[1] - loop[0])
    whole = 0.97 * (last - first)  # the pipeline's own guard spans the loop
    inside = sorted(s for s in spans if first <= s[0] and s[1] <= last and 20 < s[1] - s[0] < whole)
    products = [bundle.count("vmatmul") for bundle in bundles]

    def nest(span: tuple[int, int], among: list[tuple[int, int]]) -> Region:
        within = [s for s in among if s != span and span[0] <= s[0] and s[1] <= span[1]]
        return Region(*span, sum(products[slice(*span)]), _outermost(within, nest))

    regions = _outermost(inside, nest)
    return Kernel(name, trips, regions, last - first - sum(r.bundles for r in regions))


def _outermost(spans: list[tuple[int, int]], nest: Callable) -> tuple[Region, ...]:
    top = [s for s in spans if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in spans)]
    return tuple(nest(span, spans) for span in top)
