"""What is read and how it becomes rows. Imports nothing heavy: configs are checked before JAX."""

from dataclasses import dataclass

from sharding.errors import UsageError, nearest

PACKINGS = ("bestfit", "concat")


@dataclass
class DataConfig:
    """The dataset and the packing of its documents into rows of `seq_len` positions.

    `path` is a dataset folder, or "builtin": text of the running Python's standard library as
    bytes, written to the cache folder on first use ("builtin:N": in a BPE vocabulary of N ids).
    `packing` is "bestfit" (a document is cut only when it is longer than a row) or "concat"
    (documents laid end to end and cut at every row). Documents are packed in windows of `window`; a
    larger window pads less, a smaller one touches fewer shards at a time. `allow_change` accepts a
    resume with other data than the checkpoint was trained on.
    """

    path: str = "builtin"
    seq_len: int = 512
    packing: str = "bestfit"
    window: int = 1 << 17
    shuffle: bool = True
    seed: int = 0
    prefetch: int = 2  # batches held ready by the background thread; 0 reads in the caller
    allow_change: bool = False

    def validate(self) -> None:
        """Raises UsageError for values that no dataset could make right."""
        if self.packing not in PACKINGS:
            raise UsageError(
                f"config.data.packing = {self.packing!r}: choose {' or '.join(PACKINGS)}"
                f"{nearest(self.packing, PACKINGS)}"
            )
        for name, least in (("seq_len", 1), ("window", 1), ("seed", 0), ("prefetch", 0)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"config.data.{name} = {value}: must be at least {least}")
        if self.seed >= 1 << 63:
            raise UsageError(f"config.data.seed = {self.seed}: must be below 2**63")
        if not self.path:
            raise UsageError("config.data.path is empty: give a dataset folder, or `builtin`")
