"""Drives: experiments, the training loop and step, optimizers, data, metrics and the commands.

The top floor but for configs: imports everything below, nothing below imports it.
"""

from importlib.util import find_spec
from pathlib import Path


def _check_packages() -> None:
    """Refuses, in one line, to go on with a folder of the user's in place of a floor of Torus."""
    root = Path(__file__).resolve().parent.parent
    for name in ("checkpoint", "models", "sharding"):
        spec = find_spec(name)
        place = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
        if place and root not in Path(place).resolve().parents:
            raise ImportError(
                f"`import {name}` finds {place}, which hides Torus's package of that name: "
                "use the command `torus`, or `import torus` before anything else of it"
            )


_check_packages()
