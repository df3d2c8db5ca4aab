"""Settings of checkpointing: how often, how many to keep, and how they are written.

Plain data, read by the experiment config and by every command, so JAX is not imported here.
"""

from dataclasses import dataclass

from sharding.errors import UsageError
from sharding.fields import Fields


@dataclass
class CheckpointConfig(Fields, at="config.checkpoint"):
    """When a checkpoint is written, which ones stay, and in what form."""

    every: int = 1000
    """Steps between saves; 0 saves only where the loop asks for it (its end, a shutdown), -1 as
    often as costs least, from what a save costs here and how often so many devices fail."""

    snapshot_every: int = 10
    """Steps between snapshots in the memory of the hosts, which `torus launch` restarts from. The
    next is taken when the last is safe, so it may be more; 0 and plain `torus train` take none."""

    keep_last: int = 2
    """How many of the newest steps stay. Two, so that one damaged step still leaves another."""

    keep_every: int = 0
    """Steps that are multiples of this stay for ever; 0 keeps none."""

    keep_ladder: int = 2
    """How many older steps stay beside these, each about twice as old as the one before. The newest
    step that is known to be good (config.health.good_after) always stays."""

    asynchronous: bool = True
    """Write while training goes on. The save blocks only for the copy from device to host."""

    compression: bool = False
    """Compress with zstd: about 7% smaller for float32 weights, and 9 times slower to save."""

    chunk_mib: int = 4
    """Largest piece, in MiB, that one read fetches, so that another mesh reads little but its own.
    0 stores each device's shard in one piece: faster to save, and best for the same mesh."""

    verify: bool = True
    """Compare restored arrays with the fingerprints of what was saved, and refuse other bits."""


def validate(config: CheckpointConfig) -> None:
    """Raises UsageError naming the first field whose value makes no sense."""
    least = {
        "every": -1, "snapshot_every": 0, "keep_last": 1, "keep_every": 0, "keep_ladder": 0,
        "chunk_mib": 0,
    }  # fmt: skip
    for name, bound in least.items():
        value = getattr(config, name)
        if value < bound:
            raise UsageError(f"config.checkpoint.{name} is {value}; it must be at least {bound}")
