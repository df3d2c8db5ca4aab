"""Compiles the stored plans again and prints what changed: `make plans`.

Run: `python -m tests.benchmarks.plans [--all] [CONFIG …]`; 1 to 4 CPU minutes a plan, with libtpu
and no TPU. Without --all only plans that are missing or stale. Rewrites trainer/plan/plans/ and the
table in docs/plan.md. Every time is a compiler's estimate.
"""

import json
import re
import sys

from sharding.topology import parse_slice
from trainer.config import ROOT, load_config
from trainer.plan.process import Compilation
from trainer.plan.stored import FOLDER, changes, path_of, stale, stored, summary

PAGE = ROOT / "docs" / "plan.md"
# Shipped config → the two slices that its plan is stored for.
SLICES: dict[str, tuple[str, str]] = {
    "quickstart": ("v5e-4", "v5p-8"),
    "ladder:10m": ("v5e-4", "v5p-8"),
    "ladder:20m": ("v5e-4", "v5p-8"),
    "ladder:60m": ("v5e-8", "v5p-16"),
    "ladder:100m": ("v5e-8", "v5p-16"),
    "ladder:200m": ("v5e-16", "v5p-16"),
    "ladder:400m": ("v5e-16", "v5p-32"),
    "ladder:1b": ("v5e-32", "v5p-32"),
    "gpt2_124m": ("v5e-8", "v5p-16"),
    "qwen3_06b": ("v5e-16", "v6e-16"),
    "gemma3_1b": ("v5e-32", "v6e-16"),
    "llama32_1b": ("v5e-16", "v6e-16"),
    "gemma2_2b": ("v5e-64", "v6e-64"),
    "llama2_7b": ("v5e-256", "v5p-128"),
    "mistral_7b": ("v5e-256", "v4-256"),
    "olmo2_7b": ("v5e-256", "v5p-128"),
    "llama3_8b": ("v5e-256", "v5p-128"),
    "qwen3_8b": ("v5e-256", "v5p-128"),
    "llama2_70b": ("v5p-1024", "v5p-2048"),
    "llama3_70b": ("v5p-1024", "v5p-2048"),
}
MARKS = r"(<!-- stored plans -->\n).*(\n<!-- end -->)"


def table() -> str:
    """Returns the table of docs/plan.md, one line for each stored plan."""
    lines = [
        "| config | slice | mesh | rows × tokens a step | kept | step, s | MFU | tokens/s per chip "
        "| peak / capacity, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plans = stored()
    for reference, slices in SLICES.items():
        for name in slices:
            if (plan := plans.get((reference, name))) is None:
                lines.append(f"| {reference} | {name} | not compiled yet | | | | | | |")
                continue
            experiment = load_config(reference)
            axes = " × ".join(f"{a} {n}" for a, n in plan["mesh"].items() if n > 1)
            speed = "does not fit | | "
            if "seconds" in plan:
                speed = (
                    f"{plan['seconds']['estimate']:.3g} | {plan['mfu']['estimate']:.1%} | "
                    f"{plan['tokens_per_second']:,.0f}"
                )
            lines.append(
                f"| {reference} | {name} | {axes} | {experiment.train.batch_size:,} × "
                f"{experiment.data.seq_len:,} | {plan['remat'].replace(',', ' ')} | {speed} | "
                f"{plan['needed'] / 2**30:.2f} / {plan['capacity'] / 2**30:.2f} |"
            )
    return "\n".join(lines)


def write_table() -> None:
    text = re.sub(MARKS, lambda m: m[1] + table() + m[2], PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(text)


def main() -> None:
    names = [a for a in sys.argv[1:] if not a.startswith("--")]
    FOLDER.mkdir(exist_ok=True)
    kept = stored()
    for reference, slices in SLICES.items():
        for name in slices:
            old = kept.get((reference, name))
            current = old is not None and not stale(old) and "--all" not in sys.argv
            if current or (names and reference not in names):
                continue
            with Compilation(load_config(reference), parse_slice(name)) as compilation:
                status, plan, log = compilation.result()
            if plan is None or "refused" in plan:
                print(f"{reference} {name}: status {status}: {plan or log[-500:]}")
                continue
            new = summary(reference, plan)
            path_of(reference, name).write_text(json.dumps(new, indent=1) + "\n")
            difference = "; ".join(changes(old, plan)) if old else "new"
            print(f"{reference} {name}: {difference or 'as before'}", flush=True)
            write_table()
    write_table()


if __name__ == "__main__":
    main()
