"""How many devices each mesh axis gets, and where caches live.

Imports nothing heavy: a config is checked before JAX starts.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from sharding.errors import UsageError
from sharding.fields import Fields

AXES = ("data", "fsdp", "seq", "tensor")  # slowest link first


def cache_folder() -> Path:
    """Where compiled programs and the built-in dataset are kept: $TORUS_CACHE or ~/.cache/torus."""
    return Path(os.environ.get("TORUS_CACHE") or Path.home() / ".cache" / "torus")


@dataclass
class MeshConfig(Fields, at="config.mesh"):
    """Sizes of the mesh axes, slowest link first; one of them may be -1 and takes what is left."""

    data: int = 1  # replicas of the model
    fsdp: int = -1  # shards rows of the batch and the model state (see zero)
    seq: int = 1  # shards the sequence dimension of activations
    tensor: int = 1  # shards heads, MLP width and vocabulary
    # The part of data that crosses the slow network between slices or hosts: data=4, dcn_data=2 is
    # two slices that hold two replicas each.
    dcn_data: int = 1
    dcn_fsdp: int = 1  # the same part of fsdp
    zero: int = 3  # what fsdp shards: 1 optimizer state, 2 and gradients, 3 and parameters

    def sizes(self, devices: int) -> dict[str, int]:
        """Returns the size of every axis on `devices` devices, the -1 filled in.

        Raises:
          UsageError: sizes that do not multiply to `devices`, or `dcn_` sizes that do not fit.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        asked = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
        free = [axis for axis, size in sizes.items() if size == -1]
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if len(free) > 1:
            raise UsageError(f"config.mesh: only one axis may be -1, got {asked}")
        if fixed < 1 or devices % fixed or (not free and fixed != devices):
            raise UsageError(
                f"config.mesh: {asked} needs {'a multiple of ' if free else ''}{fixed} devices, "
                f"there are {devices}"
            )
        if free:
            sizes[free[0]] = devices // fixed
        for axis in ("data", "fsdp"):
            dcn = getattr(self, f"dcn_{axis}")
            if dcn < 1 or sizes[axis] % dcn:
                raise UsageError(
                    f"config.mesh.dcn_{axis} = {dcn} does not divide {axis} = {sizes[axis]}"
                )
        return sizes

    def validate(self) -> None:
        """Raises UsageError for values that no number of devices could make right."""
        for axis in AXES:
            if (size := getattr(self, axis)) < 1 and size != -1:
                raise UsageError(f"config.mesh.{axis} = {size}: a size is at least 1, or -1")
        if self.zero not in (1, 2, 3):
            raise UsageError(f"config.mesh.zero = {self.zero}: choose 1, 2 or 3")
