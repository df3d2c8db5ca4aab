"""How a step is made fast on a chip, as data: compile options, and what the backward pass keeps.

`config.perf` says what to take: "auto" is the options of the table that a published recipe sets on
that chip, "fast" is all of them, which only a compiler has judged, and "off" is none; after a comma
`name=value` adds or replaces one and `-name` leaves one out, `-barriers` too.
With `model.remat = "auto"` activations are kept, cheapest per recomputed matmul first, up to the
memory target.
Train loop and planner ask the same two functions. Imports no JAX.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models.config import ModelConfig
from sharding.errors import UsageError, nearest
from sharding.hardware import chip_for
from sharding.topology import FAMILIES, program_bytes

if TYPE_CHECKING:
    from trainer.config import Experiment

BARRIER_WIDTH = 4096  # of a model from which `config.model.barriers` pays; at 2,048 it loses
LEAST_DEVICES = {"v5p": 64}  # smaller slices of it have no rings: the options were not tried there
MEMORY_TARGET = 0.85  # of what the compiler may use: fragmentation and the runtime need the rest


PERF = ("auto", "fast", "off")
# What publishes the options of `Option.recipe`: AI-Hypercomputer/maxtext at e591f30, a 32B model on
# v5p. None of MaxText's recipes for v5e, and none of AI-Hypercomputer/tpu-recipes at c8cfe2f for
# language models on v5p, sets any of the others.
_MAXTEXT_V5P = "MaxText, src/maxtext/configs/tpu/v5p/32b.sh"


@dataclass(frozen=True)
class Option:
    """One option of the TPU compiler, and why it is set."""

    name: str
    value: str
    chips: tuple[str, ...]
    reason: str
    effect: str  # a compiler's estimate: docs/benchmarks.md, "The step's recipe"
    recipe: str = ""  # who publishes it for these chips; "" = nobody, so only "fast" takes it


OPTIONS = (
    Option(
        "xla_enable_async_all_reduce", "true", ("v5e",),
        "gradients are reduced while the backward pass goes on; needs the next option too",
        "llama3-8b, 256 chips: all-reduce that the step waits for, 190 to 77 ms",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true", ("v5e",),
        "lets matmuls carry the reduction", "as above",
    ),
    Option(
        "xla_jf_crs_combiner_threshold_count", "1", ("v5e",),
        "reductions that are combined into one stay synchronous", "as above",
    ),
    Option(
        "xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000", ("v5e",),
        "gathers weights whole instead of in thousands of steps; only where tensor is 1",
        "1B, 16 chips: 0.76 to 0.48 s",
    ),
    *(
        Option(name, "true", ("v5p",), "the SparseCores do the collectives, not the TensorCore",
               "llama3-8b, 64 chips: 1.32 to 1.21 s with all six", recipe)
        for name, recipe in (
            ("xla_tpu_enable_sparse_core_collective_offload_all_reduce", ""),
            ("xla_tpu_enable_sparse_core_collective_offload_all_gather", _MAXTEXT_V5P),
            ("xla_tpu_enable_sparse_core_collective_offload_2d_all_gather", ""),
            ("xla_tpu_enable_sparse_core_collective_offload_3d_all_gather", ""),
            ("xla_tpu_use_tc_device_shape_on_sc", _MAXTEXT_V5P),
        )
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "false", ("v5p",),
        "gathers on the SparseCores cannot ride in fusions too", "as above", _MAXTEXT_V5P,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """How a step is compiled: the experiment with nothing left open, and the compiler's options."""

    experiment: Experiment
    options: dict[str, str]

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        barriers = "; barriers" if self.experiment.model.barriers else ""
        unknown = untested(self.options)
        if unknown:
            options += f" (untested on hardware: {', '.join(unknown)})"
        return f"remat {self.experiment.model.remat}{barriers}; {options or 'no compile options'}"


def untested(options: dict[str, str]) -> list[str]:
    """Names of the options of the table among these that no published recipe sets."""
    unpublished = {o.name: o.value for o in OPTIONS if not o.recipe}
    return [name for name, value in options.items() if unpublished.get(name) == value]


def choose(experiment: Experiment, device: Any, sizes: dict[str, int]) -> Choice:
    """Returns what an experiment leaves open, chosen for a mesh of `sizes` of devices like this.

    Raises:
      UsageError: `config.perf` cannot be read.
    """
    chip = chip_for(device)
    resolved = resolve_remat(experiment, chip and program_bytes(chip.name), sizes)
    if chip is None or chip.name not in FAMILIES:
        return Choice(resolved, {})
    first, *changes = [part.strip() for part in experiment.perf.split(",")]
    if first != "off" and "-barriers" not in changes and experiment.model.width >= BARRIER_WIDTH:
        resolved = replace(resolved, model=replace(resolved.model, barriers=True))
    return Choice(resolved, compile_options(experiment, chip.name, sizes))


def compile_options(experiment: Experiment, chip: str, sizes: dict[str, int]) -> dict[str, str]:
    """Returns the compiler's options for a chip of sharding/hardware.py; {} for what is no TPU.

    Args:
      sizes: mesh axis → size.

    Raises:
      UsageError: `config.perf` cannot be read.
    """
    first, *changes = [part.strip() for part in experiment.perf.split(",")]
    check_perf(experiment.perf)
    chosen = {}
    if first != "off":
        chosen = {
            o.name: o.value for o in OPTIONS if chip in o.chips and (o.recipe or first == "fast")
        }
        if sizes["tensor"] * sizes["seq"] > 1:
            chosen.pop("xla_jf_spmd_threshold_for_windowed_einsum_mib", None)
        if math.prod(sizes.values()) < LEAST_DEVICES.get(chip, 2):
            chosen = {}
    for change in changes:
        name, _, value = change.partition("=")
        if change.startswith("-"):
            chosen.pop(change[1:], None)
        else:
            chosen[name] = value
    return chosen


def check_perf(perf: str) -> None:
    """Raises UsageError, naming the part of `config.perf` that cannot be read."""
    first, *changes = [part.strip() for part in perf.split(",")]
    if first not in PERF:
        raise UsageError(
            f"config.perf = {perf!r}: starts with {first!r}; choose {', '.join(PERF)}"
            f"{nearest(first, PERF)}"
        )
    for change in changes:
        if not re.fullmatch(r"-xla_\w+|xla_\w+=[^\s/\\]+|-barriers", change):
            raise UsageError(
                f"config.perf = {perf!r}: {change!r} is neither -xla_NAME nor "
                "xla_NAME=VALUE with a VALUE that is no path"
            )


# ---------------------------------------------------------------- what is kept

# Names in the order in which keeping them pays (research on v5e and v5p), those together that save
# nothing alone: attention is run again unless its inputs, output and log-sum-exp are all there.
GROUPS = (("rotated_qk", "v", "attention"), ("residual",), ("gate", "up"))


def resolve_remat(
    experiment: Experiment, capacity: float | None, sizes: dict[str, int]
) -> Experiment:
    """Returns the experiment with `model.remat = "auto"` replaced by what fits.

    capacity: bytes of one device that a program may use; None (CPU) keeps nothing.
    """
    if experiment.model.remat != "auto":
        return experiment
    names: list[str] = []
    if capacity is not None and experiment.perf.split(",")[0].strip() != "off":
        free = MEMORY_TARGET * capacity - fixed_bytes(experiment, sizes)
        for group in GROUPS:
            free -= sum(kept_bytes(experiment, name, sizes) for name in group)
            if free < 0:
                break
            names += [n for n in group if n != "gate" or "glu" in experiment.model.activation]
    remat = ",".join(names) or "full"
    return replace(experiment, model=replace(experiment.model, remat=remat))


def kept_bytes(experiment: Experiment, name: str, sizes: dict[str, int]) -> float:
    """Bytes of one device that keeping a name costs, over all layers."""
    model = experiment.model
    item = item_bytes(model.dtype)
    query = model.heads * model.head_dim
    key = kv_heads_of_a_device(model, sizes["tensor"]) * model.head_dim
    per_token = {
        "rotated_qk": item * (query / sizes["tensor"] + key),
        "v": item * key,
        "attention": (item * query + 4 * model.heads) / sizes["tensor"],
        "residual": item * model.width / sizes["tensor"],
        "gate": item * model.mlp / sizes["tensor"] if "glu" in model.activation else 0.0,
        "up": item * model.mlp / sizes["tensor"],
    }[name]
    return per_token * device_tokens(experiment, sizes) * model.layers


def fixed_bytes(experiment: Experiment, sizes: dict[str, int]) -> float:
    """Bytes of one device that a step needs whatever is kept; checked against compiled peaks."""
    return sum(fixed_parts(experiment, sizes).values())


def fixed_parts(experiment: Experiment, sizes: dict[str, int]) -> dict[str, float]:
    """Returns `fixed_bytes` by what holds them.

    State and gradients, what goes into each layer, and the larger of two moments: the loss (head,
    its gradient, a chunk of logits and of their gradient) and one layer's backward pass.
    """
    model, tokens = experiment.model, device_tokens(experiment, sizes)
    item, summed = item_bytes(model.dtype), item_bytes(model.reduce_dtype)
    tensor, shards = sizes["tensor"], sizes["tensor"] * sizes["fsdp"]
    layer = layer_weights(model)
    head = model.padded_vocab * model.width
    weights = layer * model.layers + head * (1 if model.tie_embeddings else 2)
    zero = experiment.mesh.zero
    logits, chunk = tokens * model.padded_vocab * 4, max(2 * head, 2**25)
    loss = ((item + summed) * head + logits) / tensor
    if logits > chunk:
        loss = ((item + 4) * head + 1.5 * chunk) / tensor
    wide = item * tokens * (5 * model.mlp + 4 * model.heads * model.head_dim)
    wide += (2 * item + summed) * layer  # two layers' weights gathered, the gradient of one
    return {
        "parameters": weights * 4 / (shards if zero == 3 else tensor),
        "optimizer": weights * 8 / shards,
        "gradients": weights * 4 / (shards if zero >= 2 else tensor),
        "inputs of layers": item * tokens * model.width * (model.layers / tensor + 4),
        "loss or a layer": max(loss, wide / tensor),
    }


def kv_heads_of_a_device(model: ModelConfig, tensor: int) -> float:
    """KV heads that a device projects and keeps: all of them where devices are more."""
    return model.kv_heads / (1 if model.kv_heads % tensor else tensor)


def item_bytes(dtype: str) -> int:
    """Bytes of one element of `model.dtype` or `model.reduce_dtype`."""
    return 2 if dtype == "bfloat16" else 4


def layer_weights(model: ModelConfig) -> int:
    """Matmul weights of one layer."""
    attention = 2 * model.width * model.head_dim * (model.heads + model.kv_heads)
    return attention + (3 if "glu" in model.activation else 2) * model.width * model.mlp


def device_tokens(experiment: Experiment, sizes: dict[str, int]) -> float:
    """Tokens of one device in a microbatch."""
    rows = experiment.train.batch_size / experiment.train.accumulation
    return rows * experiment.data.seq_len / (sizes["data"] * sizes["fsdp"] * sizes["seq"])
