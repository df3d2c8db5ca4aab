"""`torus replay`: does steps of a run again, and says whether they give the same bits."""

from typing import Any

from sharding.errors import UsageError
from trainer.commands.parser import CommandParser
from trainer.commands.progress import progress

USAGE = """\
usage: torus replay RUN --steps A:B
       torus replay RUN --against RUN2

Restores the newest checkpoint of RUN at or before step A, does the steps up to B again and compares
each with what the run recorded: loss and gradient norm where they were logged, and the fingerprint
of every array at checkpoints and every config.log.fingerprint_every steps. What was compared, and
at which steps, is printed. The same mesh and kind of device give the same bits: a difference is
hardware that erred, or files that were changed. Nothing is written.

  torus replay runs/a --steps 690:700
  torus replay runs/a --steps 0:20               # from the very beginning

With --against the records of two runs are compared first. Where they part, both are done again
from their last common point, and the first step and array that differ are told: if the repeats
differ too, the runs were not the same experiment; if not, the run that differs from its own repeat
is the one that went wrong.

  torus replay runs/a --against runs/b

Exit status: 0 all that was compared is equal, 1 something differs.
"""


def main(argv: list[str]) -> int:
    """Prints what was compared and the first difference; returns 1 if there is one."""
    parser = CommandParser("replay")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--steps", metavar="A:B")
    parser.add_argument("--against", metavar="RUN2")
    args = parser.parse(argv)
    if (args.steps is None) == (args.against is None):
        raise UsageError("give --steps A:B or --against RUN2; see torus replay --help")
    if args.against:
        return _bisect(args.run, args.against)
    first, _, last = args.steps.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UsageError(f"--steps {args.steps}: two steps A:B, A before B")
    from trainer.replay import base_step, compared, evidence, first_difference
    from trainer.run import read_experiment

    read_experiment(args.run)
    known = {s: facts for s, facts in evidence(args.run).items() if int(first) < s <= int(last)}
    if not known:
        raise UsageError(f"{args.run} recorded nothing of steps {args.steps}")
    base = base_step(args.run, int(first))
    redone = _redo(args.run, base, int(last))
    if found := first_difference(known, redone):
        _tell(args.run, *found, known, redone)
        return 1
    start = f"checkpoint {base}" if base else "the beginning"
    print(f"steps {base + 1} to {last} done again, from {start}; compared after step {first}:")
    _tell_equal(compared(known, redone))
    return 0


def _bisect(one: str, other: str) -> int:
    from trainer.config import differences
    from trainer.replay import base_step, compared, evidence, first_difference
    from trainer.run import read_experiment

    differing = differences(read_experiment(one), read_experiment(other))
    a, b = evidence(one), evidence(other)
    both = sorted(a.keys() & b.keys())
    if not both:
        raise UsageError(f"{one} and {other} have no recorded step in common")
    found = first_difference(a, b)
    if found is None:
        print(f"the records of both runs up to step {both[-1]}:")
        _tell_equal(compared(a, b))
        return 0
    last = found[0]
    common = max((step for step in both if step < last), default=0)
    print(f"the records part at step {last} ({_names(found[1])}); equal until step {common}")
    redone = [_redo(run, base_step(run, common), last) for run in (one, other)]
    if parted := first_difference(*redone):
        print(f"done again they part at step {parted[0]}, first in {_names(parted[1])}")
        for line in differing:
            print(f"  {line}")
    for run, recorded, repeat in ((one, a, redone[0]), (other, b, redone[1])):
        if wrong := first_difference(recorded, repeat):
            _tell(run, *wrong, recorded, repeat)
    return 1


def _tell_equal(steps: tuple[list[int], list[int]]) -> None:
    """Says what is equal, and of which steps that is known."""
    numbers, arrays = steps
    print(f"  loss and gradient norm are equal at {_ranges(numbers)}")
    if arrays:
        print(f"  all arrays are equal in every bit at {_ranges(arrays)}")
    else:
        print(
            "  arrays were not compared: no fingerprints of these steps were recorded "
            "(config.log.fingerprint_every, and checkpoints)"
        )


def _ranges(steps: list[int]) -> str:
    """Returns rising step numbers in short, as "5 steps: 1-4, 9"."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][1] + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in parts]
    shown = ", ".join(texts[:6]) + (", …" if len(texts) > 6 else "")
    return f"{len(steps)} step{'' if len(steps) == 1 else 's'}{': ' if steps else ''}{shown}"


def _redo(run: str, base: int, last: int) -> dict[int, dict[str, Any]]:
    from trainer.replay import redo

    with progress(f"{run}: steps {base + 1} to {last}", last - base) as tick:
        return redo(run, base, last, tick)


def _tell(run: str, step: int, names: list[str], recorded: dict, redone: dict) -> None:
    name = names[0]
    was, now = recorded[step][name], redone[step][name]
    print(f"{run} differs from its repeat first at step {step}, in {_names(names)}")
    print(f"  {name} was {was}, is {now} when done again")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
