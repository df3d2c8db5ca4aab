"""What a place holds, whatever its format: named tensors of weights and of Adam's moments.

A format is a function that makes a `Source` of a path; names are those of the files.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.convert import huggingface
from checkpoint.convert.folders import inside
from checkpoint.convert.pieces import NAME, PieceTensors, whole
from checkpoint.convert.safetensors import Tensors, read_header
from checkpoint.convert.torchfiles import Strided, read_torch
from checkpoint.files import read_json
from sharding.errors import MismatchError, UnsafeInputError, UsageError, shown

PARAMS, MU, NU = "params", "mu", "nu"
MOMENTS = {"exp_avg": MU, "exp_avg_sq": NU}  # torch's names → ours
SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
VALUES = 2**20  # of one file, tensors and others


@dataclass
class Source:
    """Tensors by part (params, mu, nu), the count of updates, and what else there is.

    Each part has `facts` (name → dtype, shape), `read` and `close`. `optimizer` are settings of
    Adam as they are called there; `left` names what is there and not read; `described`, what the
    files themselves say of the model.
    """

    parts: dict[str, Any]
    step: int | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    described: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, tuple]:
        """Name, of a moment with mu/ or nu/ before it → dtype and shape."""
        return {
            name if part == PARAMS else f"{part}/{name}": fact
            for part, tensors in self.parts.items()
            for name, fact in tensors.facts.items()
        }

    def read(self, name: str, lead: tuple[int, ...], start: int, stop: int) -> Any:
        """Returns rows of a tensor named as in `facts`."""
        part, _, rest = name.partition("/")
        if part in (MU, NU) and part in self.parts:
            return self.parts[part].read(rest, lead, start, stop)
        return self.parts[PARAMS].read(name, lead, start, stop)

    def close(self) -> None:
        """Closes files."""
        for tensors in self.parts.values():
            tensors.close()


def open_source(kind: str, path: Path) -> Source:
    """Returns what `path` holds, in the format that formats.open_place gave.

    Raises:
      UnsafeInputError: damaged or hostile files. MismatchError: files that contradict each other.
    """
    if kind == "hf":
        return Source({PARAMS: Tensors(_safetensors(path))})
    if kind == "torch":
        return read_state_dict(path)
    if kind == "msgpack":
        from checkpoint.convert.msgpack_trees import read_msgpack

        return read_msgpack(path)
    if not path.is_dir():
        raise UsageError(f"{kind}:{path} is not a folder")
    if kind == "dcp":
        from checkpoint.convert.torch_dcp import read_dcp

        return read_dcp(path)
    if kind == "megatron":
        from checkpoint.convert.megatron import read_megatron

        return read_megatron(path)
    if kind == "orbax":
        from checkpoint.convert.orbax_trees import read_orbax

        return read_orbax(path)
    from checkpoint.convert.deepspeed import read_ucp, read_zero

    return (read_ucp if kind == "ucp" else read_zero)(path)


def adam_settings(found: dict[str, Any]) -> dict[str, Any]:
    """Returns lr, betas, eps and weight_decay of a parameter group, as far as they are numbers."""

    def known(name: str, value: Any) -> bool:
        if name == "betas":
            pair = isinstance(value, tuple | list) and len(value) == 2
            return pair and all(isinstance(beta, float) for beta in value)
        return isinstance(value, float | int)

    names = ("lr", "betas", "eps", "weight_decay")
    return {name: found[name] for name in names if known(name, found.get(name))}


def _safetensors(path: Path) -> dict:
    return huggingface.find_tensors(path) if path.is_dir() else read_header(path)[0]


def config_folder(path: Path) -> Path | None:
    """Returns the folder of the config.json that belongs to a place, None if there is none."""
    near = [path, path.parent] if path.is_dir() else [path.parent]
    return next((folder for folder in near if (folder / huggingface.CONFIG).exists()), None)


# ---------------------------------------------------------------- torch.save


def read_state_dict(path: Path) -> Source:
    """Returns the tensors of one file of torch.save, or of a folder with `pytorch_model.bin`.

    Nested dicts and lists are told by names with dots, as `model.` and `optimizer.state.0.`.

    Raises:
      UnsafeInputError, MismatchError: as `open_source`.
    """
    if path.is_dir() and (path / INDEX).exists():
        where = read_json(inside(path, INDEX)).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise UnsafeInputError(f"{path / INDEX}: weight_map does not name files")
        files = [inside(path, file) for file in sorted(set(where.values()))]
    else:
        where, files = None, [inside(path, SINGLE) if path.is_dir() else path]
    tensors: dict[str, Strided] = {}
    left: list[str] = []
    for file in files:
        for name, value in _flatten("", read_torch(file)):
            if not isinstance(value, Strided):
                left.append(name)
            elif name in tensors or (where is not None and name not in where):
                raise MismatchError(f"{file}: `{name}` is there twice, or not in the index")
            else:
                tensors[name] = value
    if missing := sorted(set(where or ()) - set(tensors)):
        raise MismatchError(f"{path}: the index names `{missing[0]}`, which no file holds")
    if not tensors:
        raise MismatchError(f"{path} holds no tensors; it holds {', '.join(left[:5]) or 'nothing'}")
    return Source({PARAMS: PieceTensors({n: whole(t) for n, t in tensors.items()})}, left=left)


def _flatten(name: str, value: Any) -> list[tuple[str, Any]]:
    """Returns (name, value) of everything inside of nested dicts, told once, without recursion.

    Raises:
      UnsafeInputError: a name longer than NAME, or more than VALUES of them.
    """
    found, open_ones, seen = [], [(name, value)], set()
    while open_ones:
        name, value = open_ones.pop()
        if len(name) > NAME or len(found) + len(open_ones) > VALUES:
            raise UnsafeInputError(f"values deeper or more than a state has, at {shown(name)}")
        if not isinstance(value, dict | list | tuple):
            found.append((name, value))
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        open_ones += [(f"{name}.{key}" if name else str(key), v) for key, v in items]
    return found
