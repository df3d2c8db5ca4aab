"""What a config needs on GPUs and how fast it goes, by formula: nothing is compiled or run.

Memory is that of recipe.py, time that of analytic.py; both were checked on TPU programs only.
docs/benchmarks.md, "GPUs by formula", has the distance from published runs.
"""

from types import SimpleNamespace
from typing import Any

from models import spec
from models.decoder import param_specs
from models.flops import train_flops_per_token
from sharding.hardware import CHIPS
from sharding.topology import Slice, program_bytes
from trainer.config import Experiment
from trainer.plan.analytic import GPU_ATTENTION_SHARE, GPU_MATMUL_SHARE, step_seconds
from trainer.plan.cost import LINK_SHARE
from trainer.plan.forecast import setting_of
from trainer.plan.recipe import GROUPS, choose, fixed_parts, kept_bytes

# Keys of `step_seconds` in words, and the mesh axes that a collective may be over.
_WORDS = {
    "matmul": ("matmul", ()), "attention": ("attention", ()), "memory": ("elementwise", ()),
    "gathers": ("weights", ("fsdp",)), "tensor": ("tokens", ("tensor",)),
    "seq": ("keys and values", ("seq",)), "gradients": ("gradients", ("data", "fsdp", "seq")),
}  # fmt: skip


def formula_plan(experiment: Experiment, target: Slice) -> dict[str, Any]:
    """Returns what `Plan.to_json` does, where it means the same, of a config that divides.

    "memory" has bytes per GPU, "shares" seconds of a step; what does not fit has no "forecast".
    """
    sizes = experiment.mesh.sizes(target.devices)
    chip, tokens = CHIPS[target.chip], experiment.train.batch_size * experiment.data.seq_len
    choice = choose(experiment, SimpleNamespace(device_kind=chip.kinds[0]), sizes)
    model, capacity = choice.experiment.model, program_bytes(target.chip)
    kept = model.remat_names() or GROUPS  # remat "none" keeps these at least
    memory = fixed_parts(experiment, sizes) | {
        f"kept {name}": kept_bytes(experiment, name, sizes) for names in kept for name in names
    }
    forecast, needed = None, sum(memory.values())
    if needed <= capacity:
        parts = step_seconds(choice.experiment, setting_of(choice.experiment, target, sizes))
        seconds = sum(parts.values())
        flops = tokens * train_flops_per_token(model, experiment.data.seq_len)
        forecast = {
            "seconds": {"estimate": seconds},
            "shares": {_label(name, sizes): time for name, time in parts.items()},
            "mfu": {"estimate": flops / seconds / chip.flops_bf16 / target.devices},
            "tokens_per_second": tokens / seconds / target.devices,
            "notes": _notes(target),
        }
    return {
        "config": experiment.name, "slice": target.name, "compiled": False, "mesh": sizes,
        "chips": target.chips, "devices": target.devices, "remat": model.remat, "barriers": False,
        "options": choice.options, "parameters": spec.count(param_specs(model)),
        "tokens_per_step": tokens, "memory": memory, "capacity": capacity, "needed": needed,
        "fits": needed <= capacity, "forecast": forecast,
    }  # fmt: skip


def _label(name: str, sizes: dict[str, int]) -> str:
    what, axes = _WORDS[name]
    over = ", ".join(axis for axis in axes if sizes[axis] > 1)
    return f"{what} over {over}" if over else what


def _notes(target: Slice) -> list[str]:
    matmuls, (forward, backward) = GPU_MATMUL_SHARE[target.chip], GPU_ATTENTION_SHARE
    return [
        f"assumed: matmuls reach {matmuls:.0%} of peak, attention {forward:.0%} forward and "
        f"{backward:.0%} backward, as cuDNN without a mask; packed rows are slower, and heads "
        "above 128 or a soft-cap take XLA's attention (docs/models.md)",
        f"assumed: {LINK_SHARE:.0%} of NVLink in a host, of {target.network / 1e9:g} GB/s a GPU "
        "between hosts; gathers of weights hide behind layers (XLA's latency hiding scheduler)",
        "not counted: start-up of many small collectives, congestion between hosts, data loading; "
        "of five published runs on H100 each took 1.1 to 1.7 times as long (docs/benchmarks.md)",
    ]
