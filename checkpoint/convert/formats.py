"""Which format a place on the command line has: `hf:FOLDER`, `torus:RUN`, …, or found out.

    hf      Hugging Face: config.json and safetensors      torch  one file of torch.save, or folder
    torus   a run, a folder of steps, or a step of ours    dcp    torch.distributed.checkpoint
    zero    a run of DeepSpeed ZeRO, or one of its steps   ucp    DeepSpeed's universal checkpoint
    orbax   an item, step or manager's folder of Orbax     msgpack  a file of Flax or EasyLM
    megatron  a run of Megatron, torch_dist or a file per rank, or one of its iterations

Imports no JAX. A later format is one more name here and a function in sources.py.
"""

from pathlib import Path

from checkpoint.objects import SENDING
from checkpoint.steps import folder_path, is_remote, pick_step
from sharding.errors import StorageError, UsageError, nearest

FORMATS = ("hf", "torus", "torch", "dcp", "zero", "ucp", "orbax", "msgpack", "megatron")
WRITTEN = ("hf", "torus", "dcp", "ucp")
REMOTE = ("hf", "torus", "orbax")  # read from gs:// and s3://; the first two are written there
TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")


def split_format(place: str) -> tuple[str, Path]:
    """Returns (format, path) of FORMAT:PATH, the format "" where none is given.

    Raises:
      UsageError: a format that is not known.
    """
    name, colon, path = place.partition(":")
    if not colon or "/" in name or path.startswith("//"):
        return "", as_path(place)
    if name not in FORMATS:
        raise UsageError(
            f"{place}: no format {name!r}; known: {', '.join(FORMATS)}{nearest(name, FORMATS)}"
        )
    return name, as_path(path)


def as_path(place: str) -> Path:
    """Returns the path of a place on the command line, without a format before it."""
    return folder_path(place) if is_remote(place) else Path(place).expanduser()


def open_place(place: str) -> tuple[str, Path]:
    """Returns (format, path) of something that exists, its format found out where not given.

    Raises:
      UsageError: there is nothing, or nothing that is known. StorageError: the store does not say.
    """
    name, path = split_format(place)
    if not path.exists():
        if is_remote(path):
            raise StorageError(f"{path}: there is no such bucket, or nothing by this name in it")
        raise UsageError(f"{path} does not exist")
    if is_remote(path) and (path / SENDING).exists():
        raise UsageError(f"{path} is not all there: a conversion writes it, or was killed")
    name = name or _found_out(path)
    if is_remote(path) and name not in REMOTE:
        raise UsageError(f"{name}:{path}: in buckets {', '.join(REMOTE)} are read; copy it to disk")
    return name, path


def _found_out(path: Path) -> str:
    """Returns the format of what is there."""
    if any((path / part).exists() for part in ("experiment.json", "checkpoints", "manifest")):
        return "torus"
    if path.is_file() and path.suffix in TORCH_FILES:
        return "torch"
    if path.is_dir() and (found := _of_torch(path)):
        return found
    if path.is_file() and path.suffix == ".msgpack":
        return "msgpack"
    if path.is_dir() and _of_orbax(path):
        return "orbax"
    if path.suffix == ".safetensors" or (path / "config.json").exists():
        return "hf"
    if path.is_dir():
        if any(child.name.isdigit() for child in path.iterdir()):
            return "torus"
        if any(path.glob("*.safetensors*")):
            return "hf"
    raise UsageError(
        f"{path} is neither a run or step of ours nor of another known format; name one of "
        f"{', '.join(f'{name}:' for name in FORMATS)} before it"
    )


def _of_torch(path: Path) -> str:
    """Returns the format of a folder that torch or DeepSpeed wrote, "" for another one."""
    if any(path.glob("*.safetensors*")):
        return ""
    of_megatron = ("latest_checkpointed_iteration.txt", "common.pt", "mp_rank_*/model_optim_rng.pt")
    if any(any(path.glob(name)) for name in of_megatron):
        return "megatron"
    if any(any(path.glob(name)) for name in (".metadata", "*/.metadata")):
        return "dcp"
    if (path / "latest").is_file() or any(path.glob("*zero_pp_rank_*_optim_states.pt")):
        return "zero"
    if (path / "latest_universal").exists() or (path / "zero/optimizer_state.pt").exists():
        return "ucp"
    return "torch" if any(path.glob("pytorch_model.bin*")) else ""


def _of_orbax(path: Path) -> bool:
    """Whether a folder is an item, a step or a manager's folder of Orbax, and no steps of ours."""
    found = (path.glob(below + "_METADATA") for below in ("", "*/", "*/*/"))
    return any(map(any, found)) and not any(path.glob("*/manifest"))


def find_step(path: Path, step: int | None = None) -> tuple[Path, int]:
    """Returns (folder of steps, step) of a run, a folder of steps, or one step.

    Raises:
      UsageError: there is no such step.
    """
    if step is None and (path / "manifest").is_dir() and path.name.isdigit():
        path, step = path.parent, int(path.name)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return folder, pick_step(folder, step)
