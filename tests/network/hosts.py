"""One launcher's conversation with the others, for as long as it is not killed: no trainers.

    python -m tests.network.hosts FOLDER HOST COUNT FIRST SIZE[,SIZE]

Prints a line for each generation: its members and the address that this host is reached at.
"""

import sys
import time
from pathlib import Path

from trainer.recovery.hosts import Hosts, Place


def main() -> None:
    folder, host, count, first, sizes = sys.argv[1:]
    hosts = Hosts(
        Path(folder), int(host), int(count), first, sizes=list(map(int, sizes.split(","))),
        lease=2.0, patience=60.0,
    )  # fmt: skip
    while isinstance(hosts.meet(lambda: False), Place):
        members = "+".join(map(str, hosts.members))
        print(hosts.generation, members, hosts.address(), flush=True)
        while not hosts.over() and not hosts.drains(settled=True):
            hosts.beat()
            time.sleep(0.02)
        hosts.gather([])
        lost = hosts.lost()
        if hosts.leads:
            print("lost", *lost, flush=True)


if __name__ == "__main__":
    main()
