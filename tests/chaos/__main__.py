"""Injects every fault of the table into small runs of real processes, and checks what survives.

    python -m tests.chaos --brief                    eleven faults once
    python -m tests.chaos --seeds 10                 all of them ten times: hours on two cores
    python -m tests.chaos --faults SIGTERM,disk      those whose names contain one of these
    python -m tests.chaos --seeds 10 --missing       after an interruption: those that --out lacks
    python -m tests.chaos --minutes 30               no fault at all, and so no alarm

The seed of a trial decides step, rank, moment and kind of damage; the same seed plays the same.
Results are added to --out, one JSON object per trial, and printed as a table of all that it holds.
A failed trial leaves its folder behind: the run, what the supervisors said, the incidents.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import tests.conftest  # noqa: F401  (how processes of tests compile)
from tests.chaos.faults import FAULTS, play
from tests.chaos.trial import CalmRuns, Result, Trial
from tests.processes import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--faults", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("chaos.json"))
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--minutes", type=float, default=0.0)
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    parts = given.faults.split(",")
    names = [
        n for n in FAULTS if any(p in n for p in parts) and (FAULTS[n].brief or not given.brief)
    ]
    seeds = range(given.first, given.first + (1 if given.brief else given.seeds))
    os.environ["TORUS_CACHE"] = str(ROOT / ".pytest_cache/torus-chaos")
    folder = Path(tempfile.mkdtemp(prefix="torus-chaos-"))
    runs = CalmRuns(folder / "calm")
    if given.minutes:
        return no_alarm(Trial("no fault", 0, runs, folder / "slow"), given.minutes)
    held = json.loads(given.out.read_text()) if given.out.exists() else []
    results = {(r["fault"], r["seed"]): r for r in held}
    with ThreadPoolExecutor(given.jobs) as pool:
        wanted = [(n, s) for s in seeds for n in names]
        if given.missing:
            wanted = [w for w in wanted if w not in results or results[w]["problem"]]
        trials = [pool.submit(one, *each, runs, folder) for each in wanted]
        try:
            for count, done in enumerate(as_completed(trials), 1):
                found = done.result()
                results[found.fault, found.seed] = dataclasses.asdict(found)
                given.out.write_text(json.dumps(list(results.values()), indent=1))
                how = f"FAILED: {found.problem}" if found.problem else "survived"
                text = f"{count}/{len(trials)}  {found.fault}, seed {found.seed}: {how}"
                print(f"{text}  ({found.seconds:.0f} s)", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    print(table([r for r in results.values() if r["fault"] in names]))
    return int(any(results[n, s]["problem"] for n in names for s in seeds))


def one(name: str, seed: int, runs: CalmRuns, folder: Path) -> Result:
    """Plays one trial; whatever goes wrong in it is its result."""
    began = time.monotonic()
    trial = Trial(name, seed, runs, folder / f"{list(FAULTS).index(name)}-{seed}")
    try:
        play(trial)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        trial.result.problem = f"{text}; see {trial.folder}"
    trial.result.seconds = round(time.monotonic() - began, 1)
    return trial.result


def no_alarm(trial: Trial, minutes: float) -> int:
    """Trains in two processes whose other phases take 500 times as long as a step."""
    long, every = 50.0, 75
    evals = max(1, round((60 * minutes - 4 * long) / (long + 0.2 * every)))
    slow = f"data={long}*1 step=0.1 " + " ".join(
        f"{phase}={long}" for phase in ("start", "restore", "compile", "eval")
    )
    began = time.monotonic()
    job = trial.start(
        "--processes", "2", f"--config.eval.every={every}", f"--config.train.steps={evals * every}",
        SLOW=slow,
    )  # fmt: skip
    status = job.wait()
    took = (time.monotonic() - began) / 60
    print(f"ended with {status} after {took:.1f} minutes; incidents: {trial.incidents()}")
    return int(status != 0 or bool(trial.incidents()))


def table(results: list[dict]) -> str:
    """Returns Markdown: per fault its seeds, steps lost at worst, and seconds, median and worst."""
    lines = ["| fault | survived | lost, of allowed | found, s | next step, s |", "|---" * 5 + "|"]
    for name in FAULTS:
        rows = [r for r in results if r["fault"] == name]
        if not rows:
            continue
        lost = [r["lost"] for r in rows if r["lost"] is not None]
        cells = [name, f"{sum(not r['problem'] for r in rows)} of {len(rows)}"]
        cells.append(f"{max(lost, default='—')} of {FAULTS[name].lost}")
        for column in ("detect", "next_step"):
            values = [r[column] for r in rows if r[column] is not None]
            shown = f"{statistics.median(values):.2f}, {max(values):.2f}" if values else "—"
            cells.append(shown)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
