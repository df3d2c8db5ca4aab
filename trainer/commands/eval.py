"""`torus eval`: the held-out loss of a run's checkpoint, on whatever mesh is here."""

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from sharding.errors import UsageError
from trainer.commands.parser import CommandParser

if TYPE_CHECKING:
    from trainer.data.config import DataConfig
    from trainer.data.rows import Rows

USAGE = """\
usage: torus eval RUN [--step N] [--data FOLDER] [--batches N] [--batch-size N]

Evaluates a checkpoint of RUN (the newest complete one by default) on the held-out split of its
dataset, or of another one, and prints nats per token and bits per byte beside what gzip -9 and
xz -9 make of the same text.

  torus eval runs/a
  torus eval runs/a --step 350 --data data/notes
"""


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("eval")
    parser.add_argument("run")
    parser.add_argument("--step", type=int)
    parser.add_argument("--data", default="")
    parser.add_argument("--batches", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=0)
    args = parser.parse(argv)
    for name in ("batches", "batch_size"):
        if (value := getattr(args, name)) < 0:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least 0")
    return args


def main(argv: list[str]) -> int:
    """Prints the evaluation; raises UsageError for a run or step that is not there."""
    from checkpoint.steps import pick_step
    from trainer.run import CHECKPOINTS, read_experiment

    args = _arguments(argv)
    experiment = read_experiment(args.run)
    step = pick_step(f"{args.run}/{CHECKPOINTS}", args.step)
    trained_on = replace(experiment.data)
    if args.data:
        experiment.data.path, experiment.data.mixture = args.data, ()

    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from sharding.rules import BATCH, SEQ
    from trainer.data.corpus import HELD_OUT
    from trainer.data.dataset import open_dataset
    from trainer.evaluate import baselines, evaluate
    from trainer.restore import restore_params
    from trainer.step import make_eval_step

    dataset = open_dataset(experiment.data, HELD_OUT)
    dataset.check_vocab(experiment.model.vocab)
    _check_tokenizer(args.run, trained_on, dataset)
    params, mesh = restore_params(args.run, experiment, step)
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * experiment.train.accumulation
    batch_size = args.batch_size or -(-experiment.train.batch_size // shards) * shards
    if args.batch_size:  # what was asked for, in one piece
        experiment.train.accumulation = 1
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))
        eval_step = jax.jit(make_eval_step(experiment))
        result = evaluate(eval_step, params, dataset, batch_size, rows, args.batches)
    print(f"{args.run} step {step}: {result['tokens']:,} held-out tokens")
    if result["loss"] is None:
        print("  no token carries loss")
        return 0
    print(f"  loss           {result['loss']:.4f} nats per token")
    if result["bits_per_byte"] is not None:
        print(f"  bits per byte  {result['bits_per_byte']:.4f}")
    for name, bits in (baselines(dataset) or {}).items():
        print(f"  {name.removesuffix('_bits_per_byte') + ' -9':13}  {bits:.4f}")
    return 0


def _check_tokenizer(run: str, trained_on: "DataConfig", dataset: "Rows") -> None:
    """Raises UsageError if the dataset is in the ids of another tokenizer than the run's."""
    from trainer.data.dataset import run_tokenizer
    from trainer.data.tokenizer import same_ids

    (source, _), *_ = dataset.sources()
    try:
        known = run_tokenizer(run, trained_on)
    except (UsageError, ConnectionError) as error:
        note = f"{run}: its tokenizer cannot be compared with that of the dataset: {error}"
        print(note, file=sys.stderr)
        return
    if not same_ids(known, source.tokenizer):
        raise UsageError(
            f"dataset {source.shards.name} was written with another tokenizer "
            f"({source.tokenizer.spec.kind}, {source.vocab_size:,} ids) than {run} was trained "
            f"with ({known.spec.kind}, {known.spec.vocab_size:,} ids); choose another with --data"
        )
