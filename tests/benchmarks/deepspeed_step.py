"""Converted DeepSpeed runs against DeepSpeed: logits, and every parameter after the next step.

    python -m tests.benchmarks.deepspeed_step

Unpacks the runs of tests/checkpoint/convert, converts each with its optimizer, takes one step from
the carried state on the batch that DeepSpeed took it on, and prints the largest differences.
"""

import functools
import itertools
import sys
import tarfile
import tempfile
from pathlib import Path

import jax
import numpy as np

from checkpoint.convert.families import find_family
from checkpoint.convert.mapping import build, to_theirs
from configs.from_run import get_config
from models.decoder import forward, logits
from sharding.mesh import make_mesh
from tests.checkpoint.convert.deepspeed_runs import ARCHIVE, LR, RUNS
from tests.checkpoint.convert.test_deepspeed import rows_of
from trainer.commands.main import main
from trainer.restore import first_state
from trainer.state import init_state, make_layout
from trainer.step import make_train_step


class Arrays:
    """Parameters in memory, as the engine reads them."""

    def __init__(self, params) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        self.arrays = {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}

    def read(self, name, lead, start, stop) -> np.ndarray:
        return np.ascontiguousarray(self.arrays[name][lead][start:stop])


@functools.cache
def compiled(start: str):
    """Returns the experiment, mesh, layout, step and logits; all runs are of one model."""
    exp = get_config(start)
    exp.model.dtype, exp.model.remat = "float32", "none"
    exp.optimizer.peak_lr, exp.optimizer.warmup_steps = LR, 0
    exp.optimizer.schedule, exp.optimizer.clip_norm = "constant", 0.0
    mesh = make_mesh(exp.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = make_layout(exp, mesh)
        step = jax.jit(make_train_step(exp, layout))

        @jax.jit
        def run_logits(params, rows):
            order = ("tokens", "positions", "segment_ids")
            x_BTD, _ = forward(params, *(rows[k] for k in order), exp.model)
            return logits(params, x_BTD, exp.model)

    return exp, mesh, layout, step, run_logits


def measure(folder: Path, name: str, first: str) -> str:
    if main(["convert", str(folder / name), f"torus:{folder}/{name}_torus", "--with-optimizer"]):
        sys.exit(f"{name} was not converted")
    exp, mesh, layout, step, run_logits = compiled(first)
    exp.train.init_from = f"{folder}/{name}_torus"
    expected = np.load(folder / name / "expected.npz")
    with jax.set_mesh(mesh):
        state = first_state(init_state(exp, layout), exp, layout)
        rows = rows_of(expected["batch"], mesh)
        found_BTV = np.asarray(run_logits(state.params, rows))
        after, _ = step(state, rows)
    family, arrays = find_family("llama"), Arrays(after.params)
    rows = family.rows_for(exp.model)
    elements = itertools.chain(*(to_theirs(row, family.sizes(exp.model)) for row in rows))
    errors = [np.abs(build(e, arrays, np.dtype(np.float32)) - expected[e.name]).max()
              for e in elements]  # fmt: skip
    worst = np.abs(found_BTV - expected["logits"]).max()
    return f"{name}: logits {worst:.1e}, {len(errors)} parameters {max(errors):.1e}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, tarfile.open(ARCHIVE) as archive:
        archive.extractall(place, filter="data")
        float32 = [name for name, (_, _, dtype) in RUNS.items() if dtype == "float32"]
        lines = [measure(Path(place), name, f"{place}/{float32[0]}_torus") for name in float32]
    print("\n".join(lines))
