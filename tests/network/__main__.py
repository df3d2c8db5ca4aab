"""Plays faults of the network to runs on three hosts, and checks what became of them.

    python -m tests.network                     every row once: about an hour on two cores
    python -m tests.network --seeds 5           five times
    python -m tests.network --rows cut,ipv6     those whose names contain one of these

Needs root, `ip` and /dev/net/tun; where they are not to be had it says so and ends with 0. Results
are added to --out, one JSON object per play. A play that failed leaves its folder behind.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tests.conftest  # noqa: F401  (how processes of tests compile)
from tests.network.net import Net, missing
from tests.network.play import Play, calm_run
from tests.network.rows import ROWS
from tests.processes import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rows", default="")
    parser.add_argument("--calm", type=Path, help="an undisturbed run that is there already")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("network.json"))
    given = parser.parse_args()
    if why := missing():
        print(f"not played: no network of namespaces here ({why})")
        return 0
    given.out.parent.mkdir(parents=True, exist_ok=True)
    os.environ["TORUS_CACHE"] = str(ROOT / ".pytest_cache/torus-network")
    folder = Path(tempfile.mkdtemp(prefix="torus-network-"))
    calm, failed = given.calm or calm_run(folder), 0
    held = json.loads(given.out.read_text()) if given.out.exists() else []
    names = [n for n in ROWS if any(part in n for part in given.rows.split(","))]
    for seed in range(given.seeds):
        for name in names:
            began, problem = time.monotonic(), ""
            place = folder / f"{name.replace(' ', '_')}-{seed}"
            with Net(3) as net, Play(net, place) as play:
                try:
                    ROWS[name](play, calm)
                    play.never_split()
                except Exception as error:
                    problem = " ".join(f"{type(error).__name__}: {error}".split())
            took = round(time.monotonic() - began)
            held.append({"row": name, "seed": seed, "problem": problem, "seconds": took})
            held[-1]["incidents"] = play.incidents()
            given.out.write_text(json.dumps(held, indent=1))
            how = f"FAILED: {problem}; see {place}" if problem else "held"
            print(f"{name}, seed {seed}: {how}  ({took} s)", flush=True)
            failed += bool(problem)
            if not problem:
                shutil.rmtree(place)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
