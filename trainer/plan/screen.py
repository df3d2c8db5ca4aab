"""The screen of a plan: memory, time, audit and cost, in plain lines. Imports no JAX."""

import re
from dataclasses import replace
from typing import Any

from sharding.hardware import CHIPS
from sharding.topology import Slice, program_bytes
from trainer.config import Experiment
from trainer.console import format_duration
from trainer.plan.recipe import fixed_bytes, untested

_GIB = 2.0**30
_OPTIMAL = 20  # tokens a parameter: compute-optimal by Hoffmann et al. 2022, arXiv:2203.15556
_FORMULA = "by formula; nothing was compiled or run"


def format_plan(
    plan: dict[str, Any],
    experiment: Experiment,
    target: Slice,
    price: float | None = None,
    calibration: tuple[float, int] | None = None,
) -> str:
    """Returns the screen of a plan (`Plan.to_json`, `formula_plan`), without a line end.

    price: of one chip for an hour. calibration: measured over estimated time of so many own runs.
    """
    unit = "chip" if CHIPS[target.chip].devices_per_chip == 1 else "core"
    layout = f"({plan['chips']:,} chips, {'x'.join(map(str, target.shape))})"
    if target.gpu:
        unit, layout = "GPU", f"({plan['chips']:,} GPUs, hosts: {target.count:,}), {_FORMULA}"
    train = experiment.train
    micro = f" in {train.accumulation} microbatches" if train.accumulation > 1 else ""
    chosen = " (auto)" if experiment.model.remat == "auto" else ""
    lines = [
        f"{plan['config']} on {plan['slice']} {layout}",
        f"  mesh        {format_mesh(plan['mesh'])}; zero {experiment.mesh.zero}, "
        f"remat {plan['remat']}{chosen}{', barriers' if plan['barriers'] else ''}",
        f"  parameters  {plan['parameters']:,}",
        f"  batch       {train.batch_size:,} rows{micro} x {experiment.data.seq_len:,} tokens = "
        f"{plan['tokens_per_step']:,} per step",
        *_options(plan, experiment),
        *(_formula(plan, experiment, price) if target.gpu else _memory(plan, unit)),
    ]
    if plan["forecast"] is not None and not target.gpu:
        lines += _time(plan["forecast"], plan, calibration)
        lines += _run(plan, experiment, price, "chip")
        lines += _findings(plan["forecast"])
    free = plan["capacity"] - _peak(plan)
    if plan["fits"]:
        lines.append(f"fits: {free / plan['capacity']:.0%} of a {unit}'s memory is left")
    else:
        what = "evaluation needs" if plan["needed"] <= plan["capacity"] else "needs"
        lines.append(
            f"does not fit: {what} {-free / _GIB:.2f} GiB more than the "
            f"{plan['capacity'] / _GIB:.2f} GiB per {unit}"
        )
        lines += [f"  try {option}" for option in _ways_out(experiment, plan)]
    if target.gpu:
        if plan["capacity"] < plan["needed"] <= 0.9 * CHIPS[target.chip].hbm_bytes:
            lines.append("  try XLA_CLIENT_MEM_FRACTION=0.9 in the environment, of the run too")
        return "\n".join([*lines, _FORMULA])
    seconds = plan["trace_seconds"] + plan["compile_seconds"]
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    done = "compiled" if plan["fits"] else "refused"
    return "\n".join([*lines, f"{done} in {format_duration(seconds)} by {versions}"])


def format_search(found: dict[str, Any], target: Slice, *, pareto: bool = False) -> str:
    """Returns the table of a search (`Found.to_json`), without a line end."""
    capacity, unit = program_bytes(target.chip), "GPU" if target.gpu else "chip"
    by = _FORMULA if target.gpu else "by the compiler's estimate (no TPU ran)"
    made = f"by formula, {len(found['refused'])} by the compiler, {len(found['ranked'])} compiled"
    lines = [
        f"{found['config']} on {target.name}: {found['candidates']:,} candidates, "
        f"{found['too_large']:,} too large {by if target.gpu else made}"
        + (f"; {found['stopped']}: there may be better ones" if found["stopped"] else "")
    ]
    if found["ranked"]:
        lines.append(
            f"{f'tokens/s/{unit}':>15}    step   GiB free  mesh, microbatches, what is kept"
        )
    for row in found["ranked"]:
        plan = row["plan"]
        strategy = "".join(re.findall(r"seq_strategy=(\w+)", row["options"]))
        lines.append(
            f"{'*' if pareto and row['frontier'] else ' '} "
            f"{plan['forecast']['tokens_per_second']:13,.0f} "
            f"{_short(plan['forecast']['seconds']['estimate']):>8} "
            f"{(plan['capacity'] - _peak(plan)) / _GIB:9.2f}  "
            f"{format_mesh(row['mesh'])}{f' ({strategy})' if strategy else ''}; "
            f"{row['accumulation']}; {plan['remat']}"
        )
    lines += [
        f"  refused, {(_peak(row['plan']) - capacity) / _GIB:.2f} GiB too much: {row['options']}"
        for row in found["refused"]
    ]
    lines += [f"  failed, {row['reason']}: {row['options']}" for row in found["failed"]]
    if found["ranked"]:
        lines += [f"the first one, {by}:",
                  f"  {found['ranked'][0]['options'] or 'the config as it is'}"]  # fmt: skip
    elif found["smallest"] is not None and found["candidates"] == found["too_large"]:
        lines.append(
            f"nothing fits: the smallest needs {found['smallest'] / _GIB:.2f} GiB by formula, of "
            f"{capacity / _GIB:.2f}; a larger slice, more GPUs, or a smaller "
            "config.train.batch_size"
        )
    return "\n".join(lines)


def _peak(plan: dict[str, Any]) -> float:
    """Returns the most memory that a device needs, in a step or in an evaluation."""
    return max(plan["needed"], plan.get("evaluation_bytes") or 0)


def format_mesh(mesh: dict[str, int]) -> str:
    """Returns the axes that split anything, as "fsdp 16 x tensor 4"."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def _options(plan: dict[str, Any], experiment: Experiment) -> list[str]:
    unknown = untested(plan["options"])
    options = [
        f"{name}={value}{', untested on hardware' if name in unknown else ''}"
        for name, value in plan["options"].items()
    ]
    return [
        f"  compiler    {option}" + (f" (config.perf={experiment.perf})" if not number else "")
        for number, option in enumerate(options)
    ]


def _memory(plan: dict[str, Any], unit: str) -> list[str]:
    parts = {
        "parameters": plan["parameter_bytes"],
        "optimizer": plan["optimizer_bytes"],
        "temporaries": plan["temporary_bytes"],
        "peak" if plan["fits"] else "needed": plan["needed"],
        "evaluation": plan.get("evaluation_bytes"),
        "capacity": plan["capacity"],
        "on the host": plan["host_bytes"] or None,
    }
    lines = [f"  memory per {unit}, GiB"]
    lines += [f"    {name:<12}{b / _GIB:8.2f}" for name, b in parts.items() if b is not None]
    forecast = plan["forecast"]
    if forecast is None:
        return lines
    lines.append(
        f"  held at the peak, GiB (lifetimes walked: {forecast['walked_peak'] / _GIB:.2f}, "
        f"{forecast['walked_peak'] / plan['needed'] - 1:+.0%} from the compiler's peak)"
    )
    least = plan["needed"] / 200
    for holder, size in forecast["holders"].items():
        if size >= least:
            lines.append(f"    {size / _GIB:8.2f}  {holder}")
            lines += [
                f"    {held['bytes'] / _GIB:12.2f}  {held['name']}"
                for held in forecast["held"]
                if held["holder"] == holder and held["bytes"] >= 2 * least
            ]
    return lines


def _time(
    forecast: dict[str, Any], plan: dict[str, Any], calibration: tuple[float, int] | None
) -> list[str]:
    seconds, mfu = forecast["seconds"], forecast["mfu"]
    low, high = min(seconds.values()), max(seconds.values())
    lines = [
        "  a step, by the compiler's estimate (no TPU ran)",
        f"    {_short(seconds['estimate'])}, between {_short(low)} (roofline) and {_short(high)} "
        "(cycle model)",
        f"    MFU {mfu['estimate']:.1%}, between {max(mfu.values()):.1%} and "
        f"{min(mfu.values()):.1%}; {forecast['tokens_per_second']:,.0f} tokens/s per chip, "
        f"{forecast['tokens_per_second'] * plan['chips']:,.0f} in all",
    ]
    if calibration is not None:
        ratio, runs = calibration
        lines.append(
            f"    {_short(ratio * seconds['estimate'])} by {runs} of your runs on this chip, which "
            f"took {ratio:.2f} times their estimate"
        )
    lines.append("    ms waited, ms hidden")
    for what, (waited, hidden) in forecast["shares"].items():
        if waited + hidden >= 0.002 * seconds["estimate"]:
            lines.append(f"    {1e3 * waited:9,.1f} {1e3 * hidden:9,.1f}  {what}")
    return lines + [f"    not counted: {note}" for note in forecast["notes"]]


def _formula(plan: dict[str, Any], experiment: Experiment, price: float | None) -> list[str]:
    """Memory of a GPU, largest part first; of a config that fits time and cost."""
    parts = sorted(plan["memory"].items(), key=lambda part: -part[1])
    parts += [("needed", plan["needed"]), ("capacity", plan["capacity"])]
    lines = [f"    {size / _GIB:8.2f}  {name}" for name, size in parts if size]
    lines = [f"  memory per GPU, GiB, {_FORMULA}", *lines]
    if (forecast := plan["forecast"]) is None:
        return lines
    step, speed = forecast["seconds"]["estimate"], forecast["tokens_per_second"]
    shares = sorted(forecast["shares"].items(), key=lambda share: -share[1])
    return [
        *lines,
        f"  a step, {_FORMULA}",
        f"    {_short(step)}; {speed:,.0f} tokens/s per GPU, {speed * plan['chips']:,.0f} in all; "
        f"MFU {forecast['mfu']['estimate']:.1%}; ms:",
        *(f"    {1e3 * time:9,.1f}  {what}" for what, time in shares if time >= 0.002 * step),
        *_run(plan, experiment, price, "GPU"),
        *(f"    {note}" for note in forecast["notes"]),
    ]


def _run(plan: dict[str, Any], experiment: Experiment, price: float | None, unit: str) -> list[str]:
    """How long the whole run takes, and to 20 tokens a parameter."""
    step, lines = plan["forecast"]["seconds"]["estimate"], []
    targets = {
        f"{experiment.train.steps:,} configured steps": experiment.train.steps,
        f"{_OPTIMAL} tokens a parameter": _OPTIMAL * plan["parameters"] / plan["tokens_per_step"],
    }
    for name, steps in targets.items():
        hours = steps * step / 3600
        cost = "" if price is None else f", {hours * plan['chips'] * price:,.0f} at {price:g}"
        lines.append(
            f"    {_days(hours)} for {name} ({steps * plan['tokens_per_step'] / 1e9:,.1f} billion "
            f"tokens){cost}{'' if price is None else f' a {unit}-hour'}"
        )
    return lines


def _findings(forecast: dict[str, Any]) -> list[str]:
    lines = []
    for finding in forecast["findings"]:
        size = f"{1e3 * finding['seconds']:,.1f} ms" if finding["seconds"] else ""
        size = size or f"{finding['bytes'] / _GIB:.2f} GiB"
        lines.append(f"    {size:>10}  {finding['rule']}: {finding['what']}")
        lines.append(f"    {'':>10}  at {finding['source'] or 'no known line'}; {finding['cure']}")
    return ["  audit: what costs and was not asked for", *lines] if lines else []


def _ways_out(experiment: Experiment, plan: dict[str, Any]) -> list[str]:
    """Options that use less memory and change no result, those that cost least first."""
    mesh, train, capacity = plan["mesh"], experiment.train, plan["capacity"]
    state = 16 * plan["parameters"] / plan["devices"]  # float32: parameter, gradient, two moments
    if state > capacity:
        return [
            "a larger slice or more GPUs: spread over all of these devices, parameters, "
            f"gradients and optimizer alone take {state / _GIB:.2f} GiB of each"
        ]
    rows = train.batch_size // (mesh["data"] * mesh["fsdp"])
    options = []
    if experiment.mesh.zero < 3 and mesh["fsdp"] > 1:
        options.append("--config.mesh.zero=3")
    if mesh["data"] > 1:
        options.append("--config.mesh.data=1 --config.mesh.fsdp=-1")
    if plan["remat"] != "full":
        options.append("--config.model.remat=full")
    more = [n for n in range(train.accumulation + 1, rows + 1) if rows % n == 0]
    if more:

        def needed(accumulation: int) -> float:
            fewer = replace(train, accumulation=accumulation)
            return fixed_bytes(replace(experiment, train=fewer), mesh)

        fits = next((n for n in more if needed(n) <= capacity), rows)
        options.append(f"--config.train.accumulation={fits}")
    return options or ["a larger slice, more GPUs, or a larger config.mesh.tensor"]


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _days(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.1f} hours"
