"""What is read and how it becomes rows. Imports nothing heavy: configs are checked before JAX."""

import json
import math
from dataclasses import dataclass, field

from sharding.errors import UsageError, nearest
from sharding.fields import Fields

PACKINGS = ("bestfit", "concat")
COLLATES = ("none", "fim", "prefix", "instruction")
FIELDS = ("tokens", "targets", "positions", "segment_ids")


@dataclass
class CollateConfig(Fields, at="config.data.collate"):
    """What is made of the documents of the training split on their way into rows.

    "fim" (arXiv:2207.14255) turns a share `rate` of the documents into prefix, suffix, middle, or
    with probability `spm` suffix, prefix, middle; `sentinels` are the ids of the tokens that mark
    prefix, suffix, middle and the end of the middle. "instruction" puts loss on answers only: on
    what follows the token ids `begin`, up to the ids `end` and with them. "prefix" sees a
    document's tokens up to the first `begin` (without one: up to a place drawn from the seed) in
    both directions and puts loss on the others; the batch says which in its field `prefix`.
    """

    kind: str = "none"  # none | fim | prefix | instruction
    rate: float = 0.5  # fim: share of the documents that are transformed
    spm: float = 0.5  # fim: probability of suffix, prefix, middle instead of prefix, suffix, middle
    sentinels: tuple[int, ...] = ()  # fim: token ids of prefix, suffix, middle, end of the middle
    begin: tuple[int, ...] = ()  # instruction, prefix: token ids before an answer
    end: tuple[int, ...] = ()  # instruction: token ids that end an answer

    def identity(self) -> str:
        """Returns what a checkpoint keeps of it: JSON, the same for as long as rows are the same.

        A field that is added later counts only where it is not at its default.
        """
        known = ("kind", "rate", "spm", "sentinels", "begin", "end")
        plain = vars(CollateConfig())
        return json.dumps({n: v for n, v in vars(self).items() if n in known or v != plain[n]})

    def validate(self) -> None:
        """Raises UsageError for values that cannot be used."""
        name = "config.data.collate"
        if self.kind not in COLLATES:
            raise UsageError(
                f"{name}.kind = {self.kind!r}: choose {', '.join(COLLATES)}"
                f"{nearest(self.kind, COLLATES)}"
            )
        for part in ("rate", "spm"):
            if not 0 <= (value := getattr(self, part)) <= 1:
                raise UsageError(f"{name}.{part} = {value}: a share, from 0 to 1")
        ids = self.sentinels + self.begin + self.end
        if min(ids, default=0) < 0:
            raise UsageError(f"{name}: {min(ids)} is not a token id")
        if self.kind == "fim" and len(set(self.sentinels)) != 4:
            raise UsageError(
                f"{name}.sentinels = {self.sentinels}: give four different token ids, for prefix, "
                "suffix, middle and end"
            )
        if self.kind == "instruction" and not (self.begin and self.end):
            raise UsageError(f"{name}: instruction needs begin and end, token ids around an answer")


@dataclass
class RemoteConfig(Fields, at="config.data.remote"):
    """How a dataset in a bucket (`path` = gs://… or s3://…) is read; its rows stay the same."""

    cache_gb: float = 100.0  # most that fetched shards take in this machine's cache folder
    workers: int = 4  # shards that are fetched at a time
    ahead: int = 4096  # a shard is fetched when one of so many next rows reads it
    patience: float = 600.0  # seconds to wait out an outage of the storage
    skip_shards: int = 0  # shards that may be missing or damaged; their rows become padding

    def validate(self) -> None:
        """Raises UsageError for values that no dataset could make right."""
        for name, least in (
            ("cache_gb", 0), ("workers", 1), ("ahead", 1), ("patience", 0), ("skip_shards", 0)
        ):  # fmt: skip
            if (value := getattr(self, name)) < least:
                raise UsageError(f"config.data.remote.{name} = {value}: must be at least {least}")


@dataclass
class DataConfig(Fields, at="config.data"):
    """The dataset and the packing of its documents into rows of `seq_len` positions.

    `mixture` holds pairs of a path and a weight (the source's share of the rows), or of a path and
    a schedule ((0, weight), (row, weight), ...) of weights that hold from a global row on.
    """

    # A dataset folder, also in a bucket (gs://…, s3://…), or "builtin": text of the running
    # Python's standard library as bytes, written to the cache folder on first use ("builtin:N": in
    # a BPE vocabulary of N ids).
    path: str = "builtin"
    mixture: tuple = ()  # instead of path, several: (path, weight) of each; see docs/data.md
    seq_len: int = 512  # tokens in a row
    # Shorter rows beside seq_len: short documents get steps of their own, with as many tokens.
    buckets: tuple[int, ...] = ()
    packing: str = "bestfit"  # bestfit: cuts only what is longer than a row | concat: end to end
    window: int = 1 << 15  # documents that are packed together
    balance: int = 0  # steps among which rows are sorted by attention cost; 0 = off
    shuffle: bool = True  # draw the order of documents anew in every epoch
    seed: int = 0  # of that order, and of what collate draws
    collate: CollateConfig = field(default_factory=CollateConfig)
    prefetch: int = 2  # batches held ready by the background thread; 0 reads in the caller
    allow_change: bool = False  # accept a resume with other data than the checkpoint was trained on
    remote: RemoteConfig = field(default_factory=RemoteConfig)

    def validate(self) -> None:
        """Raises UsageError for values that no dataset could make right."""
        if self.packing not in PACKINGS:
            raise UsageError(
                f"config.data.packing = {self.packing!r}: choose {' or '.join(PACKINGS)}"
                f"{nearest(self.packing, PACKINGS)}"
            )
        self.remote.validate()
        leasts = (("seq_len", 1), ("window", 1), ("seed", 0), ("prefetch", 0), ("balance", 0))
        for name, least in leasts:
            if (value := getattr(self, name)) < least:
                raise UsageError(f"config.data.{name} = {value}: must be at least {least}")
        if self.seed >= 1 << 63:
            raise UsageError(f"config.data.seed = {self.seed}: must be below 2**63")
        if not self.path and not self.mixture:
            raise UsageError("config.data.path is empty: give a dataset folder, or `builtin`")
        self.collate.validate()
        if self.collate.kind == "fim" and (self.packing != "bestfit" or self.seq_len < 16):
            raise UsageError(
                f"config.data.collate.kind = 'fim' needs packing bestfit and rows of 16 or more, "
                f"got {self.packing} and {self.seq_len}"
            )
        lengths = [0, *self.lengths]
        if lengths != sorted(set(lengths)):
            raise UsageError(
                f"config.data.buckets = {self.buckets}: row lengths that rise and stay below "
                f"seq_len = {self.seq_len}"
            )
        if self.buckets and self.mixture:
            raise UsageError("config.data.buckets and config.data.mixture do not go together yet")
        self.weights()

    @property
    def lengths(self) -> tuple[int, ...]:
        """All row lengths, rising."""
        return (*self.buckets, self.seq_len)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of a batch's arrays."""
        return (*FIELDS, "prefix") if self.collate.kind == "prefix" else FIELDS

    def rows_per_step(self, length: int, batch_size: int) -> int:
        """Returns how many rows of `length` have the tokens of `batch_size` rows of `seq_len`.

        Raises:
          UsageError: they do not divide.
        """
        tokens = batch_size * self.seq_len
        if tokens % length:
            raise UsageError(
                f"config.data.buckets: rows of {length} do not divide the {tokens:,} tokens of a "
                f"step ({batch_size} rows of {self.seq_len})"
            )
        return tokens // length

    def weights(self) -> list[tuple[int, list[float]]]:
        """Returns the mixture's schedule: from which row on which weight of each source holds.

        Raises:
          UsageError: a mixture that is not pairs of paths and weights, or weights without a sum.
        """
        schedules: dict[str, list] = {}
        for entry in self.mixture:
            try:
                path, weight = entry
                schedule = [(0, weight)] if isinstance(weight, int | float) else list(weight)
                pairs = [(int(row), float(value)) for row, value in schedule]
            except (TypeError, ValueError):
                raise UsageError(
                    f"config.data.mixture: {entry!r} is not (path, weight) or "
                    "(path, ((0, weight), (row, weight), ...))"
                ) from None
            if not isinstance(path, str) or not path or path in schedules:
                raise UsageError(f"config.data.mixture: path {path!r} is empty or named twice")
            rows = [row for row, _ in pairs]
            if rows[:1] != [0] or rows != sorted(set(rows)):
                raise UsageError(
                    f"config.data.mixture: rows of {path} are {rows}, they start at 0 and rise"
                )
            if bad := [value for _, value in pairs if not 0 <= value < math.inf]:
                raise UsageError(f"config.data.mixture: weight {bad[0]} of {path} is not 0 or more")
            schedules[path] = pairs
        found = []
        for row in sorted({row for pairs in schedules.values() for row, _ in pairs}):
            now = [[w for start, w in pairs if start <= row][-1] for pairs in schedules.values()]
            if not sum(now):
                raise UsageError(f"config.data.mixture: the weights from row {row} on sum to zero")
            found.append((row, now))
        return found
