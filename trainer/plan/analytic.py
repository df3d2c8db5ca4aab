"""A step's time by formula, in microseconds of work: which meshes are worth a compilation.

Rooflines of the matmuls of one layer and of the head, attention at what the kernels reach, bytes
through memory, bytes over the links by mesh axis. Chips, links and kernels are those of cost.py;
docs/plan.md says how far the formula lies from compiled programs. For TPUs it ranks and is never
shown as an estimate; for GPUs it is all there is.
"""

import math
from dataclasses import replace

from models.attention.sequence_plan import Sizes, estimate, sequence_plan
from models.attention.tpu_cost import PEAK_SHARE
from models.flops import visible_keys
from trainer.config import Experiment
from trainer.plan.cost import LINK_SHARE, Setting, guessed_axes, link_bandwidth
from trainer.plan.recipe import (
    compile_options,
    device_tokens,
    item_bytes,
    kv_heads_of_a_device,
    layer_weights,
)

MATMUL_SHARE = 0.87  # of peak that large matmuls reach by XLA's cycles
TILE = 128  # of the matrix unit: shorter dimensions are padded to it
# Passes through memory of one token's activations in a layer, forward and backward: of arrays as
# wide as the model, as the MLP, as queries with keys and values.
PASSES = (30, 12, 12)
# Times that the tokens of a layer are gathered or scattered over tensor, whatever is kept: read
# from steps compiled for CPU devices and for small slices.
TRANSFERS = 10
# TPUs move large ones along with the matmuls, for each of them, in steps that go one way round:
# read from the program of a 32B model on v5p-128. Above how many bytes: the default of XLA's
# partitioner, to which libtpu does not always keep.
WINDOWED_TRANSFERS, WINDOWED_BYTES = 24, 256 * 2**20
UPDATE = 36  # bytes a weight that the optimizer reads and writes
HIDDEN = 0.6  # of a gradient reduction, with the options for it of trainer/plan/recipe.py
# Assumed of GPUs, where nothing was compiled or run, as shares of the datasheet's peak. Matmuls:
# what cuBLAS reached with the best shapes, so an upper bound (stas00/ml-engineering, accelerators,
# "Maximum Achievable Matmul FLOPS", bfloat16). Attention, forward and backward: cuDNN on an H100,
# heads of 128, 8,192 tokens (FlashAttention-3, arXiv:2407.08608, section 4), for all GPUs.
GPU_MATMUL_SHARE = {"a100-40": 0.87, "a100-80": 0.87, "h100": 0.80, "h200": 0.80, "b200": 0.78}
GPU_ATTENTION_SHARE = (0.53, 0.52)


def step_seconds(experiment: Experiment, setting: Setting) -> dict[str, float]:
    """Returns seconds of one step by what they go to; remat must be chosen.

    Weights that are gathered hide behind the arithmetic of their layer, tokens that are gathered
    over tensor hide behind nothing.
    """
    model, sizes, chip = experiment.model, setting.mesh, setting.chip
    tokens, item = device_tokens(experiment, sizes), item_bytes(model.dtype)
    summed = item_bytes(model.reduce_dtype)
    tensor, kept = sizes["tensor"], _kept(experiment)
    forward = _matmuls(experiment, tensor)
    again = [name for name in forward if name not in kept and name != "down"]
    matmul = sum(
        (3 + (name in again)) * _roofline(tokens, *shape, item, setting)
        for name, shape in forward.items()
    )
    attention = _attention(experiment, setting, tokens, again="attention" not in kept)
    weights, wide = layer_weights(model) / tensor, (3 + 2 * model.kv_heads / model.heads)
    passes = (
        PASSES[0] * model.width / tensor  # tokens are spread between the blocks
        + PASSES[1] * model.mlp / tensor
        + PASSES[2] * wide * model.heads * model.head_dim / tensor / 4
    )
    memory = (item * (tokens * passes + 3 * weights) + 2 * summed * weights) / chip.hbm_bandwidth

    gathered = 0.0
    if experiment.mesh.zero == 3:
        gathered = 2 * _ring(item * weights, setting, "fsdp")
    transfers, moved = TRANSFERS, item * tokens * model.width
    if chip.torus_axes and moved > WINDOWED_BYTES:
        transfers = WINDOWED_TRANSFERS + len(again)
    over_tensor = transfers * _ring(moved, setting, "tensor")
    over_seq = _sequence(experiment, setting, again="attention" not in kept)
    reduced = _reduced(summed * weights, setting)
    if any("all_reduce" in name for name in compile_options(experiment, chip.name, sizes)):
        reduced *= 1 - HIDDEN
    work = matmul + attention + memory
    layer = {
        "matmul": matmul, "attention": attention, "memory": memory,
        "gathers": max(0.0, gathered - work), "tensor": over_tensor, "seq": over_seq,
        "gradients": reduced,
    }  # fmt: skip

    head = model.padded_vocab * model.width
    logits = 4 * tokens * model.padded_vocab / tensor
    once = {
        "matmul": 3 * _roofline(tokens, model.width, model.padded_vocab / tensor, item, setting),
        "memory": (4 * logits + (4 * item + 2 * summed) * head / tensor) / chip.hbm_bandwidth,
        "tensor": 4 * _ring(moved, setting, "tensor"),
        "gradients": _reduced(summed * head / tensor, setting),
    }
    seconds = {
        name: experiment.train.accumulation * (model.layers * value + once.get(name, 0.0))
        for name, value in layer.items()
    }
    count = layer_weights(model) * model.layers + head * (1 if model.tie_embeddings else 2)
    seconds["memory"] += UPDATE * count / tensor / sizes["fsdp"] / chip.hbm_bandwidth
    return seconds


def _kept(experiment: Experiment) -> set[str]:
    """Returns the names of `_matmuls`, and "attention", that the backward pass does not repeat."""
    names = experiment.model.remat_names()
    if names is None:
        return {"q", "k", "v", "o", "gate", "up", "attention"}
    kept = {name for part in names for name in part}
    groups = {"q": "rotated_qk", "k": "rotated_qk", "o": "residual"}
    return kept | {matmul for matmul, name in groups.items() if name in kept}


def _matmuls(experiment: Experiment, tensor: int) -> dict[str, tuple[float, float]]:
    """Returns name → (rows, columns) of one device's weights of a layer."""
    model = experiment.model
    query = model.heads * model.head_dim / tensor
    key = kv_heads_of_a_device(model, tensor) * model.head_dim
    inner, width = model.mlp / tensor, model.width
    shapes = {
        "q": (width, query), "k": (width, key), "v": (width, key), "o": (query, width),
        "gate": (width, inner), "up": (width, inner), "down": (inner, width),
    }  # fmt: skip
    if "glu" not in model.activation:
        del shapes["gate"]
    return shapes


def _roofline(tokens: float, rows: float, columns: float, item: int, setting: Setting) -> float:
    """Seconds of one matmul of `tokens` rows with weights of these sizes."""
    sides = [max(side, TILE) for side in (tokens, rows, columns)]
    flops = 2 * sides[0] * sides[1] * sides[2]
    moved = item * (tokens * rows + tokens * columns + rows * columns)
    peak = GPU_MATMUL_SHARE.get(setting.chip.name, MATMUL_SHARE) * setting.chip.flops_bf16
    return max(flops / peak, moved / setting.chip.hbm_bandwidth)


def _attention(experiment: Experiment, setting: Setting, tokens: float, *, again: bool) -> float:
    """Seconds of the attention of one mean layer."""
    model = experiment.model
    keys = [visible_keys(model, kind, experiment.data.seq_len) for kind in model.pattern]
    pairs = tokens * sum(keys) / len(keys)
    product = 2 * pairs * model.head_dim * max(1, model.heads / setting.mesh["tensor"])
    forward, backward = PEAK_SHARE.get(setting.chip.name, GPU_ATTENTION_SHARE)
    return product * (2 * (1 + again) / forward + 5 / backward) / setting.chip.flops_bf16


def bandwidth(setting: Setting, *axes: str) -> float:
    """Returns the bytes/s at which each device gathers over mesh axes.

    GPUs lie in mesh order, the last axes inside hosts; those of a host share their adapters.
    """
    devices = math.prod(setting.mesh[axis] for axis in axes)
    if setting.chip.torus_axes:
        return link_bandwidth(setting, guessed_axes(setting, devices))
    inside, stride = 1, 1
    for axis, size in reversed(setting.mesh.items()):
        if axis in axes:
            inside *= max(1, math.gcd(setting.torus[0], stride * size) // stride)
        stride *= size
    between = inside * setting.network if inside < devices else math.inf
    return LINK_SHARE * min(setting.chip.ici_bandwidth, between)


def _ring(size: float, setting: Setting, *axes: str) -> float:
    """Seconds in which each device of these mesh axes gathers `size` bytes whole."""
    devices = math.prod(setting.mesh[axis] for axis in axes)
    return size * (devices - 1) / devices / bandwidth(setting, *axes)


def _reduced(size: float, setting: Setting) -> float:
    """Seconds in which gradients of `size` bytes are summed over all that hold other tokens.

    Over a whole slice, and over data x fsdp at once, libtpu spells the sum as an all-reduce.
    """
    mesh = setting.mesh
    scattered = _ring(size, setting, "fsdp")
    if mesh["data"] * mesh["seq"] == 1:
        whole = mesh["fsdp"] >= setting.devices // setting.slices and setting.chip.torus_axes
        return scattered * (2 if whole else 1)
    return scattered + 2 * _ring(size / mesh["fsdp"], setting, "data", "seq")


def _sequence(experiment: Experiment, setting: Setting, *, again: bool) -> float:
    """Seconds that rows spread over the seq axis cost a layer, both passes."""
    if setting.mesh["seq"] == 1:
        return 0.0
    model, mesh = experiment.model, setting.mesh
    sizes = Sizes.of(model, mesh, experiment.data.seq_len, setting.chip)
    rows = experiment.train.batch_size / experiment.train.accumulation
    rows /= mesh["data"] * mesh["fsdp"]
    plan = sequence_plan(model, sizes)
    links = replace(setting.chip, ici_bandwidth=bandwidth(setting, "seq"))
    return rows * estimate(plan, replace(sizes, chip=links), again=again)
