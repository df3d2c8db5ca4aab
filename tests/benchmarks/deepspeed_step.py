"""Converted DeepSpeed runs against DeepSpeed: logits, and every parameter after the next step.

    python -m tests.benchmarks.deepspeed_step

Unpacks the runs of tests/checkpoint/convert, converts each with its optimizer, takes one step from
the carried state on the batch that DeepSpeed took it on, and prints the largest differences.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np

from checkpoint.convert.families import find_family
from checkpoint.convert.mapping import build, to_theirs
from tests.checkpoint.convert.deepspeed_runs import ARCHIVE, LR, RUNS
from tests.checkpoint.convert.foreign import Params, next_step, unpack
from trainer.commands.main import main


def measure(folder: Path, name: str) -> str:
    start = folder / f"{name}_torus"
    if main(["convert", str(folder / name), f"torus:{start}", "--with-optimizer"]):
        sys.exit(f"{name} was not converted")
    expected = np.load(folder / name / "expected.npz")
    found = next_step(start, LR, expected["batch"])
    family, after = find_family("llama"), Params(found.after.params)
    sizes, rows = family.sizes(found.exp.model), family.rows_for(found.exp.model)
    elements = itertools.chain(*(to_theirs(row, sizes) for row in rows))
    errors = [np.abs(build(e, after, np.dtype(np.float32)) - expected[e.name]).max()
              for e in elements]  # fmt: skip
    worst = np.abs(found.logits_BTV - expected["logits"]).max()
    return f"{name}: logits {worst:.1e}, {len(errors)} parameters {max(errors):.1e}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        folder = unpack(ARCHIVE, Path(place))
        float32 = [name for name, (_, _, dtype) in RUNS.items() if dtype == "float32"]
        lines = [measure(folder, name) for name in float32]
    print("\n".join(lines))
