"""Hugging Face folders of random weights, made from a ModelConfig without torch."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from checkpoint.convert.families import Family, find_family, shrunk
from checkpoint.convert.mapping import to_theirs
from checkpoint.convert.safetensors import Tensors, create, read_header
from models.config import ModelConfig
from models.presets import PRESETS

FAMILY_OF = {
    "gpt2-124m": "gpt2", "llama3.2-1b": "llama", "mistral-7b": "mistral", "qwen3-8b": "qwen3",
    "gemma2-2b": "gemma2", "gemma3-1b": "gemma3_text", "olmo2-7b": "olmo2",
}  # fmt: skip


def tiny(preset: str) -> tuple[Family, ModelConfig]:
    """Returns a preset's family and a model of its structure, with an odd vocabulary."""
    model = PRESETS[preset]()
    small = shrunk(model)
    if model.width == model.heads * model.head_dim:
        small = dataclasses.replace(small, width=small.heads * small.head_dim)
    return find_family(FAMILY_OF[preset]), small


def shapes_of(family: Family, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    rows, sizes = family.rows_for(model), family.sizes(model)
    return {e.name: e.shape for row in rows for e in to_theirs(row, sizes)}


def random_tensors(family: Family, model: ModelConfig, dtype: str = "float32") -> dict:
    """Returns name → array of random bits: NaN payloads, infinities and -0 among them."""
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256, (*shape, kind.itemsize), np.uint8).view(kind)[..., 0]
        for name, shape in shapes_of(family, model).items()
    }


def write_folder(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """Writes config.json and one file of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    entries = [(name, a.dtype, a.shape) for name, a in tensors.items()]
    files = Tensors(create(folder / "model.safetensors", entries), 2)
    for name, array in tensors.items():
        files.put(name, (), np.ascontiguousarray(array))
    files.close()
    return folder


def random_folder(folder: Path, preset: str, dtype: str = "float32") -> Path:
    """Writes a folder of a preset's family."""
    family, model = tiny(preset)
    return write_folder(folder, family.write(model), random_tensors(family, model, dtype))


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Returns name → array of every tensor in every file of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored = read_header(path)[0]
        files = Tensors(stored)
        for name, tensor in stored.items():
            found[name] = files.read(name, (), 0, tensor.shape[0])
        files.close()
    return found


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two sets of tensors agree in names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )
