"""Plans of the shipped configs, stored as summaries of their compiled programs.

`stale` says, without compiling, what of a summary no longer follows from the code: config, recipe,
FLOPs, and the rates of chip, memory and links. `changes` says how a new compilation differs.
`make plans` compiles them again (tests/benchmarks/plans.py).
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sharding.hardware import CHIPS
from sharding.topology import parse_slice
from trainer.config import Experiment, load_config, load_shipped
from trainer.plan.process import described
from trainer.plan.recipe import choose

if TYPE_CHECKING:
    from trainer.plan.cost import Setting

FOLDER = Path(__file__).with_name("plans")
# By how much a compilation may differ before that is a change: the walk itself is deterministic.
TOLERANCES = {"needed": 0.02, "estimate": 0.03, "flops": 0.01, "bytes": 0.02}
_LEAST = 0.005  # of the step's time: below it a collective is not compared
_QUEUED = 1.25  # copies wait for one another, and that counts as their time
_COPIED = (
    "slice", "mesh", "remat", "barriers", "options", "parameters", "tokens_per_step", "capacity",
    "needed", "parameter_bytes", "optimizer_bytes", "versions",
)  # fmt: skip
_FORECAST = (
    "seconds", "shares", "work", "mfu", "tokens_per_second", "executed_flops", "holders",
)  # fmt: skip


def path_of(reference: str, name: str) -> Path:
    return FOLDER / f"{reference.replace(':', '-')}.{name.replace(':', '-')}.json"


def summary(reference: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Returns what is stored of a plan (`Plan.to_json`), a few kilobytes."""
    forecast = plan["forecast"] or {}
    kept = {
        "config": reference,
        "digest": _digest(load_config(reference)),
        **{name: plan[name] for name in _COPIED},
        **{name: forecast[name] for name in _FORECAST if forecast},
    }
    return _rounded(kept)


def stored() -> dict[tuple[str, str], dict[str, Any]]:
    """Returns (config, slice) → summary."""
    plans = (json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))
    return {(plan["config"], plan["slice"]): plan for plan in plans}


def stale(plan: dict[str, Any]) -> list[str]:
    """Returns what of a stored plan does not follow from the code any more; compiles nothing."""
    from models import spec
    from models.decoder import param_specs
    from models.flops import train_flops_per_token
    from trainer.plan.forecast import setting_of

    experiment, target = load_shipped(plan["config"]), parse_slice(plan["slice"])
    if _digest(experiment) != plan["digest"]:
        return ["the config is another one than was compiled"]
    chip = CHIPS[target.chip]
    choice = choose(experiment, SimpleNamespace(device_kind=chip.kinds[0]), plan["mesh"])
    model = choice.experiment.model
    tokens = experiment.train.batch_size * experiment.data.seq_len
    flops = tokens * train_flops_per_token(model, experiment.data.seq_len)
    now = {
        "mesh": experiment.mesh.sizes(target.devices),
        "remat": model.remat,
        "barriers": model.barriers,
        "options": choice.options,
        "parameters": spec.count(param_specs(model)),
    }
    found = [f"{k}: {plan[k]} → {value}" for k, value in now.items() if plan[k] != value]
    if "seconds" in plan:
        step = plan["seconds"]["estimate"]
        derived = {
            "mfu": (plan["mfu"]["estimate"], flops / step / chip.flops_bf16 / target.devices),
            "tokens per second": (plan["tokens_per_second"], tokens / step / target.chips),
        }
        found += [f"{k}: {a:g} → {b:g}" for k, (a, b) in derived.items() if abs(b / a - 1) > 1e-3]
        found += _rates(plan, setting_of(experiment, target, plan["mesh"]))
    return found


def _rates(plan: dict[str, Any], setting: "Setting") -> list[str]:
    """Where a stored time is not what its FLOPs and bytes take at today's rates."""
    from trainer.plan.cost import link_bandwidth

    found = []
    for label, (flops, moved) in plan["work"].items():
        seconds = sum(plan["shares"][label])
        least, most = moved / setting.chip.hbm_bandwidth, seconds
        if " over " in label:  # any number of torus axes, one way or both
            fastest = link_bandwidth(setting, len(setting.torus))
            least, most = moved / fastest, 2 * moved / link_bandwidth(setting, 1)
            most *= max(plan["mesh"].values()) if label.startswith("all-to-all") else 1
        elif not flops:
            most = least * (_QUEUED if label == "copy" else 1.0)  # nothing but bytes
        least = max(least if not flops else 0.0, flops / setting.chip.flops_bf16)
        if seconds < 0.98 * least or seconds > 1.02 * most:
            found.append(f"{label}: {seconds:g} s, by today's rates {least:g} to {most:g}")
    return found


def changes(old: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """Returns how a plan just compiled (`Plan.to_json`) differs from a stored one."""
    new = summary(old["config"], plan)
    same = ("mesh", "remat", "barriers", "options", "parameters", "digest")
    found = [f"{name}: {old[name]} → {new[name]}" for name in same if old[name] != new[name]]
    pairs = {"needed": ("needed", old["needed"], new["needed"])}
    if "seconds" not in old or "seconds" not in new:
        return found + (
            [] if ("seconds" in old) == ("seconds" in new) else ["fits: another answer"]
        )
    pairs["estimate"] = ("estimate", old["seconds"]["estimate"], new["seconds"]["estimate"])
    pairs["executed_flops"] = ("flops", old["executed_flops"], new["executed_flops"])
    least = _LEAST * old["seconds"]["estimate"]
    for label in sorted({*old["shares"], *new["shares"]}):
        times = (sum(one["shares"].get(label, (0, 0))) for one in (old, new))
        if " over " in label and max(times) >= least:
            moved = (one["work"].get(label, (0, 0))[1] for one in (old, new))
            pairs[f"bytes of {label}"] = ("bytes", *moved)
    for name, (kind, before, after) in pairs.items():
        if abs(after - before) > TOLERANCES[kind] * max(before, after):
            found.append(f"{name}: {before:,.6g} → {after:,.6g}")
    return found


def _digest(experiment: Experiment) -> str:
    return hashlib.sha256(described(experiment)).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    """Five digits are enough, and make small files."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
