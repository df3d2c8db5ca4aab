"""Hugging Face folders of random weights, made from a ModelConfig without torch."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np

from checkpoint.convert.families import FAMILIES, Family, find_family, shrunk
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
    factor = small.head_dim + (model.width != model.heads * model.head_dim)
    small = dataclasses.replace(small, width=small.heads * factor)
    return find_family(FAMILY_OF[preset]), small


def drawn(name: str, seed: int) -> tuple[Family, dict]:
    """Returns a family and a config.json of it with random sizes and a random choice of options."""
    chance = random.Random(f"{name} {seed}")
    family, one_of, upto = FAMILIES[name], chance.choice, chance.randint
    kv_heads, head_dim = upto(1, 2), 2 * upto(1, 4)
    heads, layers, window = kv_heads * upto(1, 3), upto(1, 3), one_of([None, upto(1, 9)])
    tied = {"tie_word_embeddings": one_of([True, False])}
    scalings = [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 9},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
         "original_max_position_embeddings": 16},
    ]  # fmt: skip
    config = {
        "model_type": name, "vocab_size": upto(3, 40), "num_hidden_layers": layers,
        "hidden_size": heads * head_dim, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": upto(3, 20),
        "max_position_embeddings": upto(9, 40), "rms_norm_eps": 10.0 ** -upto(3, 8), **tied,
        "rope_theta": 10.0 ** upto(2, 6), "rope_scaling": one_of([None, *scalings]),
    }  # fmt: skip
    kinds = [one_of(["full_attention", "sliding_attention"]) for _ in range(layers)]
    options = {
        "llama": {"head_dim": 2 * upto(1, 4)},
        "mistral": {"head_dim": 2 * upto(1, 4), "sliding_window": window},
        "qwen2": {"use_sliding_window": True, "sliding_window": 3, "layer_types": kinds},
        "qwen3": {"head_dim": 2 * upto(1, 4), "sliding_window": window, "max_window_layers": 1,
                  "use_sliding_window": window is not None},
        "gemma": {"head_dim": 2 * upto(1, 4)},
        "gemma2": {"head_dim": 2 * upto(1, 4), "layer_types": kinds, "sliding_window": 3,
                   "query_pre_attn_scalar": upto(1, 1024),
                   "attn_logit_softcapping": one_of([None, 1.5]),
                   "final_logit_softcapping": one_of([None, 2.5])},
        "gemma3_text": {"head_dim": 2 * upto(1, 4), "sliding_window_pattern": 2,
                        "sliding_window": 3, "query_pre_attn_scalar": upto(1, 1024)},
        "phi3": {"sliding_window": window, "rope_scaling": None},
    }  # fmt: skip
    config |= options.get(name, {})
    if name == "gpt2":
        config = {"model_type": name, "vocab_size": config["vocab_size"], "n_layer": layers,
                  "n_embd": heads * head_dim, "n_head": heads, "n_inner": upto(3, 20),
                  "n_positions": upto(1, 40), **tied}  # fmt: skip
    if name == "gpt_neox":
        del config["num_key_value_heads"], config["rms_norm_eps"]
        config["rotary_emb_base"] = config.pop("rope_theta")
        config |= {"rotary_pct": 1.0, "use_parallel_residual": one_of([True, False])}
    return family, config


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
