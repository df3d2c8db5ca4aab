"""Settings of checkpointing: how often, how many to keep, and how they are written.

Plain data, read by the experiment config and by every command, so JAX is not imported here.
"""

from dataclasses import dataclass

from sharding.errors import UsageError
from sharding.fields import Fields


@dataclass
class CheckpointConfig(Fields, at="config.checkpoint"):
    """When a checkpoint is written, which ones stay, and in what form."""

    # Steps between saves; 0 saves only at the end and at a shutdown, -1 as often as costs least,
    # from what a save costs here and how often so many devices fail.
    every: int = 1000
    # Steps between snapshots in the memory of the hosts, which `torus launch` restarts from. The
    # next is taken when the last is safe, so it may be more; 0 and plain `torus train` take none.
    snapshot_every: int = 10
    keep_last: int = 2  # newest steps that stay; two, so that one damaged step leaves another
    keep_every: int = 0  # steps that are multiples of this stay for ever; 0 = none
    # Older steps that stay beside these, each about twice as old as the one before. The newest step
    # that is known to be good (config.health.good_after) always stays.
    keep_ladder: int = 2
    asynchronous: bool = True  # write while training goes on; only the copy off the device blocks
    compression: bool = False  # zstd: about 7% smaller for float32 weights, 9 times slower to save
    # Largest piece, in MiB, that one read fetches, so that another mesh reads little but its own. 0
    # stores each device's shard in one piece: faster to save, and best for the same mesh.
    chunk_mib: int = 4
    verify: bool = True  # compare restored arrays with the fingerprints of what was saved


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
