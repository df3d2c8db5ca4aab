"""How much of a month is training? Failures by chance, answered by the policy that real runs have.

    python -m tests.benchmarks.simulate [--days 30] [--seeds 20]

A discrete-event simulation. What is taken from `trainer/recovery/policy.py`: which mesh the hosts
that are left make up, how long to pause, the limit after which a phase counts as a hang. Failures
come at the rate of Llama 3's run (arXiv:2407.21783: 419 unexpected interruptions of 16,384 chips in
54 days; 12.9% software, 8.4% network, the rest a host that must be replaced). Times that no machine
here can measure are ASSUMED, below; they are the same for all contenders.
"""

import argparse
import math
import random
import statistics
from dataclasses import dataclass

from trainer.recovery.policy import Budget, PhaseLimits, choose_hosts
from trainer.recovery.progress import Progress

RATE = 419 / (16_384 * 54 * 86_400)  # failures per chip and second
SOFTWARE, NETWORK = 0.129, 0.084  # shares: the host stays; several hosts of a switch are gone
# Assumed, in seconds unless said otherwise.
STEP = 10.0
HANG = 0.1  # share of failures that end no process, so that only a limit finds them
CHIPS = 8  # on a host
GROUP = 8  # hosts whose parity makes up for the loss of one of them
SWITCH = 4  # hosts that a failure of the network takes
SPARES = 0.01  # share of hosts that wait
REPAIR = 4 * 3600.0  # until a lost host is back
START = 60.0  # processes, distributed start, compiled programs from the cache
MEMORY, PARITY, DISK = 10.0, 20.0, 180.0  # to restore from each
SAVE = 5.0  # a checkpoint on disk keeps the steps waiting for so long
RAREST = 4 * 3600.0  # between checkpoints on disk, however rarely they should be needed
SCHEDULER = 600.0  # what a plain job waits for hosts and a start, where no supervisor holds them
LEASE, CRASH = 15.0, 0.5  # to find a host lost, a process dead


@dataclass(frozen=True)
class Stack:
    """What a contender has."""

    name: str
    memory: bool = True
    parity: bool = True
    disk: bool = True
    spares: bool = True
    elastic: bool = True
    plain: bool = False
    every: float = 0.0  # seconds between checkpoints on disk; 0 = Young and Daly's


STACKS = (
    Stack("all tiers"),
    Stack("without parity", parity=False),
    Stack("without memory (and parity)", memory=False, parity=False),
    Stack("without disk", disk=False),
    Stack("without spares", spares=False),
    Stack("without spares and smaller meshes", spares=False, elastic=False),
    Stack("plain, best interval", memory=False, parity=False, elastic=False, plain=True),
    Stack("plain, every hour", False, False, elastic=False, plain=True, every=3600.0),
)


def hang_limit() -> float:
    """Returns what the policy learns from steps of STEP seconds."""
    limits = PhaseLimits()
    for n in range(100):
        limits.learn(Progress("step", n, n * STEP, n), Progress("step", n, (n + 1) * STEP, n + 1))
    return limits.of("step")


def month(stack: Stack, chips: int, days: float, seed: int) -> float:
    """Returns the share of `days` that went into steps that were kept, in units of all hosts."""
    rng = random.Random(seed)
    full = chips // CHIPS
    total = full + (math.ceil(SPARES * full) if stack.spares else 0)
    sizes = [full - n * max(1, full // 16) for n in range(8)] if stack.elastic else [full]
    hang = hang_limit()

    def second(lost: int, wait: float) -> float:
        """The chance that one more host of a parity group fails before parity has helped."""
        return lost * (GROUP - 1) * RATE * CHIPS * (wait + START)

    # Only what the tiers above cannot cure needs the disk (Young 1974, Daly 2006).
    to_disk = second(1, LEASE) if stack.parity else 1 - SOFTWARE if stack.memory else 1.0
    best = math.sqrt(2 * SAVE / (RATE * chips * to_disk))
    every = stack.every or min(best, RAREST)
    end, now, done, saved = days * 86_400, 0.0, 0.0, 0.0
    back: list[float] = []  # when lost hosts return
    budget = Budget(3)

    while now < end:
        # -------------------------------------------------------- steps until something happens
        back = [when for when in back if when > now]
        hosts = choose_hosts(sizes, total - len(back))
        if hosts is None:  # too few: waits for the next
            now = min(back)
            continue
        failure = now + rng.expovariate(RATE * hosts * CHIPS)
        grows = [w for w in back if hosts < full and choose_hosts(sizes, total - len(back) + 1 +
                 sum(other < w for other in back)) != hosts]  # fmt: skip
        until = min([failure, end, *grows])
        speed = hosts / full
        share = every / (every + SAVE) if stack.disk else 1.0
        worked = (until - now) * share * speed
        if stack.disk and until - now >= every + SAVE:
            behind = ((until - now) % (every + SAVE)) * share * speed
            saved = done + worked - behind
        done, now = done + worked, until
        if until >= end:
            break
        if until in grows:  # drains through a checkpoint: nothing is lost but the time
            saved, now = done, now + SAVE + START + (DISK if not stack.memory else MEMORY)
            continue

        # -------------------------------------------------------- the failure
        budget.spend(int(done))
        kind, hangs = rng.random(), rng.random() < HANG
        lost = 0 if kind < SOFTWARE else SWITCH if kind < SOFTWARE + NETWORK else 1
        lost = min(lost, hosts)
        back += [now + REPAIR] * lost
        wait = hang if hangs else LEASE if lost else CRASH
        # Hosts of a switch lie in different groups; one more of the same group may follow.
        cured = stack.parity and rng.random() >= second(lost, wait)
        if stack.memory and (cured or not lost):
            done -= min(done, STEP * speed)  # a snapshot is taken every step
            restore = PARITY if lost else MEMORY
        else:
            done, restore = saved, DISK
        now += wait + budget.pause + START + restore + (SCHEDULER if stack.plain else 0)
        if stack.plain:  # the scheduler has other hosts
            back = []
    return done / end


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--days", type=float, default=30)
    parser.add_argument("--seeds", type=int, default=20)
    given = parser.parse_args()
    sizes = (64, 1024, 12_288)
    means = (f"{1 / (RATE * n) / 3600:,.1f} h" for n in sizes)
    rows = [
        [f"{given.days:g} days, {given.seeds} times", *(f"{n:,} chips" for n in sizes)],
        ["---"] * (len(sizes) + 1),
        ["mean time between failures", *means],
    ]
    for stack in STACKS:
        rows.append([stack.name])
        for chips in sizes:
            found = [month(stack, chips, given.days, seed) for seed in range(given.seeds)]
            rows[-1].append(f"{statistics.mean(found):.2%} (worst {min(found):.2%})")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
