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
from trainer.plan.stored import FOLDER, SLICES, changes, path_of, stale, stored, summary, table

PAGE = ROOT / "docs" / "plan.md"
MARKS = r"(<!-- stored plans -->\n).*(\n<!-- end -->)"


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
