"""`torus diff`: how two checkpoints differ, first in structure, then in values."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.inflight import MEMORY, InFlight
from checkpoint.steps import is_remote
from sharding.errors import UsageError
from trainer.commands.parser import CommandParser
from trainer.commands.progress import progress
from trainer.terminal import one_line

if TYPE_CHECKING:
    import numpy as np

USAGE = """\
usage: torus diff A B [--json]
       torus diff RUN --steps A:B [--json]

Compares two checkpoints: runs (their newest steps) or single steps of ours; or Hugging Face folders
and what torch or DeepSpeed wrote, under the names that are in the files. With --steps it compares
two steps of one run. Says which arrays only one
of them has or have another shape or dtype; for every array that differs the largest absolute and
relative difference, the largest distance in units in the last place (0: only the sign of a zero
differs) and the first index that differs. Arrays are read piece by piece; either side may be in a
bucket (gs://…, s3://…) if it is a run, or what Hugging Face or Orbax wrote.

Exit status: 0 all bits are equal, 1 something differs.

  torus diff runs/a runs/b
  torus diff runs/a --steps 350:700
  torus diff runs/a/checkpoints/350 runs/b/checkpoints/700
  torus diff ./Llama-3.2-1B ./out
"""

PIECE = 8 * 2**20  # bytes


def main(argv: list[str]) -> int:
    """Prints the differences; raises UsageError for what is not a checkpoint."""
    from checkpoint.convert.formats import open_place

    parser = CommandParser("diff")
    parser.add_argument("a")
    parser.add_argument("b", nargs="?")
    parser.add_argument("--steps", metavar="A:B")
    parser.add_argument("--json", action="store_true")
    args = parser.parse(argv)
    if (args.b is None) == (args.steps is None):
        raise UsageError("torus diff: give two checkpoints, or one run and --steps A:B")
    steps = _two_steps(args.steps) if args.steps else (None, None)
    args.b = args.b or args.a
    places = [open_place(place) for place in (args.a, args.b)]
    if args.steps and places[0][0] != "torus":
        raise UsageError(f"--steps is of a run of ours; {args.a} is {places[0][0]}")
    if "torus" in (kinds := {kind for kind, _ in places}) and len(kinds) > 1:
        raise UsageError(
            f"{args.a} is {places[0][0]}, {args.b} is {places[1][0]}: convert one of them first"
        )
    (a, facts_a), (b, facts_b) = (_open(*p, step) for p, step in zip(places, steps, strict=True))
    found = {
        "only in A": sorted(set(facts_a) - set(facts_b)),
        "only in B": sorted(set(facts_b) - set(facts_a)),
        "other shape or dtype": {}, "other values": {}, "equal": 0,
    }  # fmt: skip
    sizes: dict[str, int] = {}
    for name in sorted(set(facts_a) & set(facts_b)):
        (dtype, shape), other = facts_a[name], facts_b[name]
        if other == (dtype, shape):
            sizes[name] = math.prod(shape) * dtype.itemsize
        else:
            pair = [f"{d}{list(s)}" for d, s in ((dtype, shape), other)]
            found["other shape or dtype"][name] = pair
    differs: dict[str, dict] = {}
    with progress("comparing", sum(sizes.values()), in_bytes=True) as advance:

        def job(name: str) -> None:
            differs[name] = compare(a, b, name, *facts_a[name], advance)

        crew = InFlight(MEMORY, far=any(is_remote(path) for _, path in places))
        crew.run(
            (_held(facts_a[name][1], size), partial(job, name)) for name, size in sizes.items()
        )
    found["other values"] = {name: differs[name] for name in sizes if differs[name]}
    found["equal"] = len(sizes) - len(found["other values"])
    _print(found, as_json=args.json)
    return int(any(value for key, value in found.items() if key != "equal"))


def _two_steps(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)):
        raise UsageError(f"--steps {text}: two step numbers, as 350:700")
    return int(match[1]), int(match[2])


def _open(kind: str, path: Path, step: int | None) -> tuple[Any, dict]:
    if kind == "torus":
        from checkpoint.convert.formats import find_step
        from checkpoint.convert.native import NativeTensors

        tensors = NativeTensors(*find_step(path, step), prefix="")
        return tensors, tensors.facts
    from checkpoint.convert.sources import open_source

    found = open_source(kind, path)
    return found, found.facts


def _held(shape: tuple[int, ...], size: int) -> int:
    """Returns the bytes of a piece of both sides: whole rows, whatever one of them takes."""
    return 2 * max(min(size, PIECE), size // max((1, *shape[:1])))


def compare(
    a: Any,
    b: Any,
    name: str,
    dtype: Any,
    shape: tuple[int, ...],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Returns {} for equal bits, else `differing` (elements), `abs`, `relative`, `ulp`, `first`."""
    import numpy as np

    rows = shape[0] if shape else 1
    step = max(1, PIECE // max(1, math.prod(shape[1:]) * dtype.itemsize))
    found: dict[str, Any] = {}
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        left, right = (np.asarray(x.read(name, (), start, stop)) for x in (a, b))
        bits = [x.reshape(-1).view(f"u{dtype.itemsize}") for x in (left, right)]
        advance(left.nbytes)
        places = np.flatnonzero(bits[0] != bits[1])
        if not places.size:
            continue
        if not found:
            index = np.unravel_index(int(places[0]), left.shape)
            first = [int(i) for i in index]
            first[:1] = [first[0] + start] if first else []
            found = {"differing": 0, "abs": 0.0, "relative": 0.0, "ulp": 0, "first": first}
        x, y = (side.reshape(-1)[places].astype(np.float64) for side in (left, right))
        with np.errstate(invalid="ignore", divide="ignore"):
            absolute = np.abs(x - y)
            relative = np.where(x == y, 0.0, absolute / np.maximum(np.abs(x), np.abs(y)))
        found["differing"] += int(places.size)
        found["abs"] = max(found["abs"], _largest(absolute))
        found["relative"] = max(found["relative"], _largest(relative))
        if dtype.kind not in "iub":
            ordered = [_ordered(side[places], dtype.itemsize) for side in bits]
            found["ulp"] = max(found["ulp"], int(np.max(np.abs(ordered[0] - ordered[1]))))
    return found


def _largest(values: "np.ndarray") -> float:
    """Returns the largest number, infinity where there is a NaN on one side."""
    import numpy as np

    return float(np.max(np.nan_to_num(values, nan=np.inf)))


def _ordered(bits: "np.ndarray", itemsize: int) -> "np.ndarray":
    """Returns floats, given as bits, as integers in the order of their values; -0 equals 0."""
    import numpy as np

    sign = 1 << (8 * itemsize - 1)
    wide = bits.astype(np.int64)
    return np.where(wide >= sign, sign - wide, wide) if itemsize < 8 else wide


def _print(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for where in ("only in A", "only in B"):
        for name in found[where]:
            print(one_line(f"{where}: {name}"))
    for name, (left, right) in found["other shape or dtype"].items():
        print(one_line(f"{name}: {left} against {right}"))
    for name, d in found["other values"].items():
        print(
            f"{one_line(name)}: {d['differing']:,} elements, abs {d['abs']:.3g}, relative "
            f"{d['relative']:.3g}, ulp {d['ulp']:,}, first at {d['first']}"
        )
    print(f"{found['equal']} arrays equal in every bit")
