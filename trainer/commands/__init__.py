"""The `torus` command: one module per subcommand, each with HELP, USAGE and `main(argv) -> int`.

The table below is all that `torus --help` reads, so that help never imports a command, nor JAX.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """Where a subcommand lives and how the help screen introduces it."""

    module: str
    help: str
    group: str


COMMANDS: dict[str, Command] = {
    "prepare": Command(
        "trainer.commands.prepare", "turn text, JSONL or Parquet into a dataset", "Data"
    ),
    "train": Command(
        "trainer.commands.train", "train a model from a config, or resume its run", "Train"
    ),
    "launch": Command(
        "trainer.commands.launch",
        "train under a supervisor that survives crashes, hangs and preemption",
        "Train",
    ),
    "plan": Command(
        "trainer.commands.plan", "say whether a config fits a TPU slice, without any TPU", "Train"
    ),
    "convert": Command(
        "trainer.commands.convert", "bring weights in from other stacks, and take them back",
        "Use",
    ),
    "eval": Command("trainer.commands.eval", "measure the loss of a trained model", "Use"),
    "sample": Command("trainer.commands.sample", "continue a text with a trained model", "Use"),
    "report": Command("trainer.commands.report", "draw a run as one HTML page", "Look"),
    "data": Command(
        "trainer.commands.data",
        "look into a dataset, check it, convert it from and to other formats",
        "Look",
    ),
    "inspect": Command(
        "trainer.commands.inspect", "list what is in a checkpoint: arrays, shapes, dtypes, steps",
        "Look",
    ),
    "verify": Command(
        "trainer.commands.verify",
        "read a checkpoint again and compare it with what was saved",
        "Look",
    ),
    "diff": Command(
        "trainer.commands.diff", "compare two checkpoints, structure and values", "Look"
    ),
    "replay": Command(
        "trainer.commands.replay",
        "do steps of a run again and compare every bit, or find where two runs part",
        "Look",
    ),
    "bench": Command(
        "trainer.commands.bench", "time the backends of attention on this machine, in turns", "Look"
    ),
    "doctor": Command(
        "trainer.commands.doctor", "find what is wrong with this machine before it costs money",
        "Look",
    ),
}  # fmt: skip
