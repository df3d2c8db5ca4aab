"""`torus verify`: reads a checkpoint again and says whether it still is what was saved."""

import math
import sys

from checkpoint.steps import CheckpointError
from sharding.errors import UsageError
from trainer.commands.parser import CommandParser
from trainer.commands.progress import progress
from trainer.terminal import one_line

USAGE = """\
usage: torus verify PATH [--step N]

Reads every array of every complete step (or of step N), computes its fingerprint and compares it
with the one that was taken from memory when the step was saved; then opens the step as a restore
does. PATH is a run, a folder of steps, or one step, on a disk or in a bucket (gs://…, s3://…).
Ends with status 1 if a step is damaged, and names what is.

  torus verify runs/a
  torus verify runs/a --step 350
"""


def main(argv: list[str]) -> int:
    """Prints a line per step; raises UsageError where there is no checkpoint."""
    from checkpoint.convert.formats import find_step, open_place
    from checkpoint.steps import complete_steps

    parser = CommandParser("verify")
    parser.add_argument("path")
    parser.add_argument("--step", type=int)
    args = parser.parse(argv)
    kind, path = open_place(args.path)
    if kind != "torus":
        raise UsageError(f"{path} is {kind}, which holds no fingerprints; torus diff compares two")
    folder, newest = find_step(path, args.step)
    one = args.step is not None or (folder != path and folder == path.parent)
    damaged = 0
    for step in [newest] if one else complete_steps(folder):
        try:
            print(f"step {step}: {_verify(folder, step)}")
        except CheckpointError as error:
            if step not in complete_steps(folder):
                print(f"step {step}: was deleted meanwhile")  # by the run, which keeps a few
                continue
            damaged += 1
            print(one_line(f"torus: damaged: {error}"), file=sys.stderr)
    return 1 if damaged else 0


def _verify(folder, step: int) -> str:
    from checkpoint.convert.native import NativeTensors
    from checkpoint.manifest import read_step
    from checkpoint.storage import try_restore

    read_step(folder, step)
    tensors = NativeTensors(folder, step, prefix="")
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in tensors.facts.values()]
    with progress(f"step {step}", sum(sizes), in_bytes=True) as advance:
        tensors.verify(advance)
    tensors.close()
    try_restore(folder, step)
    return f"{len(sizes)} arrays, {sum(sizes):,} bytes, all as saved"
