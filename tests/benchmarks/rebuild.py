"""How long parity takes to be made, and a lost host's memory to be computed, with real keepers.

    python -m tests.benchmarks.rebuild --gib 0.5
    python -m tests.benchmarks.rebuild --gib 4 --folder /var/tmp   # slots in files, not in memory

Keepers of several hosts on this machine, over loopback; each holds so many GiB of one step. Three
hosts need 3 x (2 + 2/2) times that in memory. With --folder their slots are files there, so more
than the memory goes, at the disk's pace.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np

from checkpoint.memory.slots import HEADER, Slots
from checkpoint.memory.wire import Directory
from tests.processes import ROOT

_TILE = 2**24  # bytes of content made at once
_KEEPER = """
import os, sys
if sys.argv[1]:
    os.memfd_create = lambda name: os.open(sys.argv[1], os.O_TMPFILE | os.O_RDWR, 0o600)
from trainer.recovery import keeper
keeper.main()
"""


def start(directory: Directory, folder: str) -> subprocess.Popen:
    env = {**os.environ, **directory.environment(), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", _KEEPER, folder], env=env)


def content(host: int, size: int):
    """Yields (place, bytes) of what a host holds: another content in each."""
    tile = np.random.default_rng(host).integers(0, 256, _TILE, np.uint8)
    for start in range(0, size, _TILE):
        tile[:8] = np.frombuffer(start.to_bytes(8, "little"), np.uint8)
        yield start, tile[: min(_TILE, size - start)]


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--folder", default="")
    given = parser.parse_args()
    size, lost = int(given.gib * 2**30), given.hosts - 1
    sizes = [HEADER + size + 4096] * given.hosts
    with tempfile.TemporaryDirectory() as place:
        directories = [Directory(place, host, given.hosts) for host in range(given.hosts)]
        keepers = [start(directory, given.folder) for directory in directories]
        try:
            slots = []
            for host, directory in enumerate(directories):
                ask = {"op": "reserve", "rank": host, "sizes": sizes, "run": "a", "every": 1}
                answer = directory.ask(host, {**ask, "coded": True, "committed": -1}, 60)
                slots.append(Slots.attach(answer["path"]))
                report(directory, "ready", -1)
            until(lambda: len({s.next for s in slots}) == 1 and slots[0].next > 0)
            step = slots[0].next
            for host, memory in enumerate(slots):
                slot = memory.begin(step)
                for at, tile in content(host, size):
                    memory.put(slot, HEADER + at, memoryview(tile))
                memory.commit(slot, step, HEADER + size, {"host": host})
            began = time.monotonic()
            for directory in directories:
                report(directory, "written", step)
            until(lambda: {s.committed for s in slots} == {step})
            tell("parity made", time.monotonic() - began, given)
            keepers[lost].kill()
            keepers[lost].wait()
            slots[lost] = None
            keepers[lost] = start(directories[lost], given.folder)
            directories[lost].ask(lost, {"op": "survey"}, 60)
            began = time.monotonic()
            ask = {"op": "rebuild", "owner": lost, "step": step, "sizes": sizes}
            with directories[0].connect(lost, 60) as connection:
                connection.ask(ask, progress=lambda message: print(message["progress"], flush=True))
            tell("computed", time.monotonic() - began, given)
            found = directories[0].ask(lost, {"op": "survey"})["ranks"][str(lost)]
            memory = Slots.attach(found["path"])
            data = memory.data(memory.held()[step])[HEADER:]
            assert all(
                zlib.crc32(data[at : at + len(tile)]) == zlib.crc32(tile)
                for at, tile in content(lost, size)
            ), "other bytes"
            print("the same bytes")
        finally:
            for keeper in keepers:
                keeper.kill()
                keeper.wait()


def report(directory: Directory, event: str, step: int) -> None:
    message = {"op": "report", "event": event, "step": step, "at": 0, "run": "a"}
    directory.ask(directory.host, {**message, "ranks": [directory.host]}, 60)


def until(what) -> None:
    while not what():
        time.sleep(0.01)


def tell(what: str, seconds: float, given: argparse.Namespace) -> None:
    rate = given.gib / seconds
    print(f"{what}: {seconds:.1f} s, {rate:.2f} GiB/s of a host's {given.gib:g} GiB", flush=True)


if __name__ == "__main__":
    main()
