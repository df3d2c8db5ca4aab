"""The `torus` command: one module here per subcommand, each with USAGE and `main(argv) -> int`.

The table below is all that `torus --help` reads, so that help never imports a command, nor JAX.
"""

COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": ("Data", "turn text, JSONL or Parquet into a dataset"),
    "train": ("Train", "train a model from a config, or resume its run"),
    "launch": ("Train", "train under a supervisor that survives crashes, hangs and preemption"),
    "plan": ("Train", "say whether a config fits a TPU slice and how fast it goes, without a TPU"),
    "config": ("Train", "print every field of a config: its value, who set it, what it means"),
    "convert": ("Use", "bring weights in from other stacks, and take them back"),
    "eval": ("Use", "measure the loss of a trained model"),
    "sample": ("Use", "continue a text with a trained model"),
    "report": ("Look", "draw a run as one HTML page"),
    "data": ("Look", "look into a dataset, check it, convert it from and to other formats"),
    "inspect": ("Look", "list what is in a checkpoint: arrays, shapes, dtypes, steps"),
    "verify": ("Look", "read a checkpoint again and compare it with what was saved"),
    "diff": ("Look", "compare two checkpoints, structure and values"),
    "replay": (
        "Look", "do steps of a run again and compare every bit, or find where two runs part"
    ),
    "bench": ("Look", "time the backends of attention on this machine, in turns"),
    "doctor": ("Look", "find what is wrong with this machine before it costs money"),
}  # fmt: skip
"""Name → group on the help screen, what the command does."""
