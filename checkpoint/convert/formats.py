"""Which format a place on the command line has: `hf:FOLDER`, `torus:RUN`, or found out.

Imports no JAX. A later format is one more name here and a module that gives named tensors.
"""

from pathlib import Path

from checkpoint.steps import pick_step
from sharding.errors import UsageError, nearest

FORMATS = ("hf", "torus")


def split_format(place: str) -> tuple[str, Path]:
    """Returns (format, path) of FORMAT:PATH, the format "" where none is given.

    Raises:
      UsageError: a format that is not known.
    """
    name, colon, path = place.partition(":")
    if not colon or "/" in name:
        return "", Path(place).expanduser()
    if name not in FORMATS:
        raise UsageError(
            f"{place}: no format {name!r}; known: {', '.join(FORMATS)}{nearest(name, FORMATS)}"
        )
    return name, Path(path).expanduser()


def open_place(place: str) -> tuple[str, Path]:
    """Returns (format, path) of something that exists, its format found out where not given.

    Raises:
      UsageError: there is nothing, or nothing that is known.
    """
    name, path = split_format(place)
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if name:
        return name, path
    if any((path / part).exists() for part in ("experiment.json", "checkpoints", "manifest")):
        return "torus", path
    if path.suffix == ".safetensors" or (path / "config.json").exists():
        return "hf", path
    if path.is_dir():
        if any(child.name.isdigit() for child in path.iterdir()):
            return "torus", path
        if any(path.glob("*.safetensors*")):
            return "hf", path
    raise UsageError(f"{path} is neither a run or step of ours nor a Hugging Face folder")


def find_step(path: Path, step: int | None = None) -> tuple[Path, int]:
    """Returns (folder of steps, step) of a run, a folder of steps, or one step.

    Raises:
      UsageError: there is no such step.
    """
    if step is None and (path / "manifest").is_dir() and path.name.isdigit():
        path, step = path.parent, int(path.name)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return folder, pick_step(folder, step)
