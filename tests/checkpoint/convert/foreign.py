"""What tests of other stacks' runs share: unpacking, arrays, their next step, refusals."""

import functools
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.convert.torchfiles import write_torch
from configs.from_run import get_config
from models.decoder import forward, logits
from models.spec import path_name
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from trainer.commands.main import main
from trainer.config import Experiment
from trainer.restore import first_state
from trainer.state import init_state, make_layout
from trainer.step import make_train_step

# Compiling takes longer than running, so it is not to try hard.
QUICKLY = {"xla_backend_optimization_level": "0"}


class Step(NamedTuple):
    """A converted run before and after one step more; `after` and `metrics` None without it."""

    exp: Experiment
    before: Any
    logits_BTV: np.ndarray
    after: Any
    metrics: Any


def unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder


def arrays(source) -> dict[str, np.ndarray]:
    return {
        f"{part}/{name}": tensors.read(name, (), 0, shape[0])
        for part, tensors in source.parts.items()
        for name, (_, shape) in tensors.facts.items()
    }


class Params:
    """Parameters in memory, read as those of a step."""

    def __init__(self, tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        self.arrays = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
        self.facts = {name: (a.dtype, a.shape) for name, a in self.arrays.items()}

    def read(self, name, lead, start, stop):
        return np.ascontiguousarray(self.arrays[name][lead][start:stop])


def next_step(start: Path, rate: float, tokens: np.ndarray, *, train: bool = True) -> Step:
    """Does what the other stack did next: the logits of `tokens`, and a step of AdamW on them."""
    exp = get_config(str(start))
    exp.model.dtype, exp.model.remat = "float32", "none"
    exp.optimizer.peak_lr, exp.optimizer.warmup_steps = rate, 0
    exp.optimizer.schedule, exp.optimizer.clip_norm = "constant", 0.0
    mesh = make_mesh(exp.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = make_layout(exp, mesh)
        state = first_state(init_state(exp, layout), exp, layout)
        rows = _batch(tokens, mesh)

        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def run_logits(params, rows):
            order = ("tokens", "positions", "segment_ids")
            x_BTD, _ = forward(params, *(rows[k] for k in order), exp.model)
            return logits(params, x_BTD, exp.model)

        found_BTV = np.asarray(run_logits(state.params, rows))
        step = jax.jit(make_train_step(exp, layout), compiler_options=QUICKLY)
        after, metrics = step(state, rows) if train else (None, None)
    return Step(exp, state, found_BTV, after, metrics)


def _batch(tokens: np.ndarray, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The batch of their next step as ours: the last token predicts nothing."""
    tokens_BT = tokens.astype(np.int32)
    B, T = tokens_BT.shape
    targets_BT = np.concatenate([tokens_BT[:, 1:], np.full((B, 1), -1, np.int32)], 1)
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return jax.device_put(
        {"tokens": tokens_BT, "targets": targets_BT, "positions": positions_BT,
         "segment_ids": np.ones_like(tokens_BT)}, NamedSharding(mesh, P(BATCH, SEQ))
    )  # fmt: skip


def plain(value: Any) -> Any:
    """Returns a state of torch with its tensors read, to be changed."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value)
    return value.read() if hasattr(value, "read") else value


def write(path: Path, state: Any) -> None:
    """Writes a file of torch.save anew; tensors become arrays."""
    state = plain(state)
    with path.open("wb") as file:
        write_torch(file, state)


def refused(path, tmp_path, capsys, status, *options) -> str:
    """Returns the one line with which a conversion is refused; nothing may be written."""
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["convert", str(path), f"torus:{tmp_path}/no", *options]) == status
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 1000
    return error
