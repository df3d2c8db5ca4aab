"""Predicted against published step times: compiles the runs of trainer/plan/published.json again.

Run: `python -m tests.benchmarks.published [NAME …]`; 2 to 4 CPU minutes a row, with libtpu and no
TPU. Rewrites the estimates in the file and prints the table. Every time is a compiler's estimate.
"""

import json
import statistics
import sys

from sharding.topology import parse_slice
from trainer.config import parse_flags
from trainer.plan.calibration import PUBLISHED, published
from trainer.plan.process import Compilation


def main() -> None:
    rows = published()
    for row in rows:
        if sys.argv[1:] and row["name"] not in sys.argv[1:]:
            continue
        experiment, _ = parse_flags(row["flags"])
        with Compilation(experiment, parse_slice(row["slice"])) as compilation:
            status, plan, log = compilation.result()
        if plan is None or "refused" in plan:
            sys.exit(f"{row['name']}: status {status}: {plan or log[-2000:]}")
        row["fits"], row["versions"] = plan["fits"], plan["versions"]
        row["peak_gib"] = round(plan["needed"] / 2**30, 2)
        if plan["forecast"]:
            seconds = plan["forecast"]["seconds"]
            row["estimate"] = {model: round(time, 3) for model, time in seconds.items()}
        PUBLISHED.write_text(json.dumps(rows, indent=1) + "\n")
    ratios = []
    for row in rows:
        ratio = row["estimate"]["estimate"] / row["published_seconds"]
        ratios.append(abs(ratio - 1))
        low, high = (row["estimate"][m] / row["published_seconds"] for m in ("roofline", "cycles"))
        print(
            f"{row['name']:<28}{row['slice']:<10}{row['published_seconds']:8.2f} s  "
            f"{row['estimate']['estimate']:8.2f} s  {ratio:5.2f} ({low:.2f} to {high:.2f})"
        )
    print(f"median error {statistics.median(ratios):.1%}, largest {max(ratios):.1%}")


if __name__ == "__main__":
    main()
