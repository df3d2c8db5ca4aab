"""A plan as one page: where a step's time and memory go, drawn from the compiled program.

Four parts: the roofline of what computes, the step and one turn of each of its larger loops by
stream with the memory held meanwhile, collectives by kind and mesh axis, and the audit. Nothing is
loaded from elsewhere. All times are the estimate of trainer/plan/cost.py.
"""

import html
import io
import re
from collections import defaultdict
from typing import Any

from trainer.plan.cost import Setting, Span, Timing, time_step
from trainer.plan.hlo import Computation, Module, parse
from trainer.plan.memory import memory_course
from trainer.plan.screen import format_mesh
from trainer.report import STYLE

_GIB = 2.0**30
_STREAMS = ("compute", "wait", "links", "sparsecore", "memory")  # rows of a timeline, top first
_COLORS = {
    "matmul": "#2458b8", "attention": "#7b3fb3", "elementwise": "#8fa8c8", "copy": "#b9bec6",
    "loop": "#e4e6ea", "collective": "#d9822b", "wait": "#c0262d",
}  # fmt: skip
_LOOP = 0.05  # share of the step from which a loop's turn is drawn
_THIN = 4e-4  # of a timeline's width: shorter spans are not seen
_NAMED = 6  # ops of the roofline that are called by name


def write_page(text: str, plan: dict[str, Any], setting: Setting) -> bytes:
    """Returns the page of the program `text`, HTML.

    Args:
      plan: `Plan.to_json()` of the same program.
    """
    module = parse(text)
    timing, held = time_step(module, setting), memory_course(module)
    seconds = timing.seconds
    title = f"{plan['config']} on {plan['slice']}"
    subtitle = (
        f"{format_mesh(plan['mesh'])}; remat {plan['remat']}; "
        f"a step {seconds['estimate']:.3f} s, between "
        f"{seconds['roofline']:.3f} (roofline) and {seconds['cycles']:.3f} (cycle model); memory "
        f"{plan['needed'] / _GIB:.2f} of {plan['capacity'] / _GIB:.2f} GiB. "
        "A compiler's estimate: nothing ran on a TPU."
    )
    parts = [("Roofline", _roofline(timing, module, setting))]
    for name, computation, turns in _computations(module, timing):
        shown = "The step" if turns is None else f"One of {turns} turns of {name}"
        parts.append((shown, _timeline(computation, timing.spans[name], held, plan["capacity"])))
    parts.append(("Collectives", _collectives(timing)))
    parts.append(("Audit", _findings(plan["forecast"]["findings"])))
    body = "".join(f"<h2>{html.escape(name)}</h2>{part}" for name, part in parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{STYLE} svg {{ width: 100%; height: auto; }}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>{body}</body></html>\n"
    ).encode()


def _computations(module: Module, timing: Timing) -> list[tuple[str, Computation, int | None]]:
    """Returns name, computation and turns of the entry (None) and of loops that take long."""
    found: list[tuple[str, Computation, int | None]] = [(module.entry.name, module.entry, None)]
    least = {module.entry.name: _LOOP * timing.seconds["estimate"]}
    for name, _, _ in found:  # grows meanwhile: loops in loops
        for span in timing.spans[name]:
            if span.op.opcode == "while" and span.end - span.start > least[name]:
                body, turns = module.called(span.op, "body"), int(span.label.split()[0])
                least[body.name] = least[name] / turns
                found.append((body.name, body, turns))
    return found


# ---------------------------------------------------------------- pictures


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "torus"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _roofline(timing: Timing, module: Module, setting: Setting) -> str:
    """FLOP/s of matmuls and kernels over their FLOPs a byte; areas are shares of the step."""
    chip, rows = setting.chip, [r for r in timing.rows if r.flops and r.bytes]
    figure = _figure(5)
    axes = figure.add_subplot()
    step = timing.seconds["estimate"]
    reach = [r.flops / r.bytes for r in rows]
    low, high = 0.5 * min(reach, default=1), 2 * max(reach, default=1e4)
    ridge = chip.flops_bf16 / chip.hbm_bandwidth
    line = sorted({low, min(max(ridge, low), high), high})
    axes.plot(line, [min(chip.flops_bf16, x * chip.hbm_bandwidth) for x in line], color="#222")
    for kind in ("matmul", "attention", "elementwise"):
        mine = [r for r in rows if r.kind == kind]
        axes.scatter(
            [r.flops / r.bytes for r in mine],
            [r.flops / r.seconds["estimate"] for r in mine],
            [2e4 * r.seconds["estimate"] / step / 4 + 4 for r in mine],
            color=_COLORS[kind], alpha=0.5, label=kind if mine else None,
        )  # fmt: skip
    for row in sorted(rows, key=lambda r: -r.seconds["estimate"])[:_NAMED]:
        place = row.flops / row.bytes, row.flops / row.seconds["estimate"]
        axes.annotate(module.line_of(row.op) or row.op.name, place, fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of device memory", ylabel="FLOP/s")
    if rows:
        axes.legend(frameon=False)
    return _svg(figure)


def _timeline(
    computation: Computation, spans: list[Span], held: dict[tuple[str, str], int], capacity: int
) -> str:
    """What each stream does over the time of one turn, below the memory that is held."""
    end = max((span.end for span in spans), default=0.0) or 1.0
    figure = _figure(4)
    memory, streams = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.4))
    starts = {span.op.name: span.start for span in spans if span.stream == "compute"}
    times, sizes, now = [], [], 0.0
    for op in computation.ops:
        now = starts.get(op, now)
        times.append(1e3 * now)
        sizes.append(held.get((computation.name, op), 0) / _GIB)
    memory.step([*times, 1e3 * end], [*sizes, sizes[-1]], where="post", color="#222", linewidth=1)
    memory.axhline(capacity / _GIB, color=_COLORS["wait"], linewidth=0.8, linestyle="--")
    memory.set(ylabel="GiB held", ylim=(0, 1.1 * capacity / _GIB))
    bars: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for span in spans:
        if span.end - span.start > _THIN * end:
            bars[span.stream, _kind(span)].append((1e3 * span.start, 1e3 * (span.end - span.start)))
    named = set()
    for (stream, kind), places in bars.items():
        level = len(_STREAMS) - _STREAMS.index(stream)
        label = None if kind in named else kind
        named.add(kind)
        streams.broken_barh(places, (level - 0.4, 0.8), color=_COLORS[kind], label=label)
    streams.set_yticks(range(len(_STREAMS), 0, -1), _STREAMS)
    streams.set(xlabel="ms", xlim=(0, 1e3 * end))
    if named:
        streams.legend(frameon=False, ncols=len(named), loc="upper right", bbox_to_anchor=(1, -0.2))
    return _svg(figure)


def _kind(span: Span) -> str:
    if re.fullmatch(r"\d+ turns|conditional|call", span.label):
        return "loop"
    if span.stream == "wait":
        return "wait"
    return span.label if span.label in _COLORS else "collective"


# ---------------------------------------------------------------- tables


def _collectives(timing: Timing) -> str:
    """Milliseconds waited, milliseconds hidden and bytes, kind by mesh axis."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in timing.rows:
        if row.kind == "collective":
            kind, _, axis = row.label.partition(" over ")
            cell = cells[kind, axis]
            cell[0] += row.exposed
            cell[1] += max(0.0, row.seconds["estimate"] - row.exposed)
            cell[2] += row.bytes
    if not cells:
        return "<p>none</p>"
    kinds, columns = (sorted({key[i] for key in cells}) for i in (0, 1))
    head = "".join(f"<th>over {html.escape(axis)}</th>" for axis in columns)
    lines = []
    for kind in kinds:
        texts = []
        for axis in columns:
            waited, hidden, moved = cells.get((kind, axis), (0.0, 0.0, 0.0))
            text = f"{1e3 * waited:.1f} ms, {1e3 * hidden:.1f} hidden, {moved / _GIB:.2f} GiB"
            texts.append(f"<td>{text if moved else ''}</td>")
        lines.append(f"<tr><th>{html.escape(kind)}</th>{''.join(texts)}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _findings(found: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th>{1e3 * f['seconds']:.1f} ms</th>"
        f"<td>{html.escape('{rule}: {what}'.format(**f))}<br>"
        f"{html.escape('{source}; {cure}'.format(**f))}</td></tr>"
        for f in found
    )
    return f"<table>{rows}</table>" if rows else "<p>nothing</p>"
