"""Which process holds the others up, and in what: scores after MegaScale (arXiv:2402.15627).

In one program all processes take as long as the slowest, so step times say nothing about who that
is. What each does alone does: waiting for its data, and handing a step to its devices. A score is
a time relative to the median of all processes at that moment, and to the process's own past.
"""

import collections
import statistics
from collections.abc import Iterable

PHASES = ("data", "dispatch")
_REMEMBERED = 64
_LEAST = 0.1  # milliseconds: less is nothing, whatever the ratio


class Scores:
    """Told the times of all processes again and again, names the slowest in each phase."""

    def __init__(self) -> None:
        self._past: dict[tuple[str, int], collections.deque] = collections.defaultdict(
            lambda: collections.deque(maxlen=_REMEMBERED)
        )

    def update(self, times: Iterable[Iterable[float]]) -> dict[str, list[float]]:
        """Returns phase → [rank, times the others' median, times its own median] of the slowest.

        Args:
          times: milliseconds per step, (processes, phases).
        """
        found = {}
        for phase, column in zip(PHASES, zip(*times, strict=True), strict=True):
            rank = max(range(len(column)), key=column.__getitem__)
            own = self._past[phase, rank] or [column[rank]]
            found[phase] = [rank, *(
                round(column[rank] / max(_LEAST, statistics.median(usual)), 2)
                for usual in (column, own)
            )]  # fmt: skip
            for process, value in enumerate(column):
                self._past[phase, process].append(value)
        return found


def worst(records: Iterable[dict]) -> str | None:
    """Returns who was the slowest most often, by the train records of a run, if by twice or more.

    For the report: "process 3 in data: 2.4 times the median, 17 of 20 records".
    """
    texts, seen = [], [r["slowest"] for r in records if r.get("slowest")]
    for phase in PHASES:
        slow = [scores[phase] for scores in seen if scores[phase][1] >= 2]
        if not slow:
            continue
        rank, often = collections.Counter(int(score[0]) for score in slow).most_common(1)[0]
        ratio = statistics.median(score[1] for score in slow if score[0] == rank)
        texts.append(
            f"process {rank} in {phase}: {ratio:.1f} times the median, {often} of {len(seen)} "
            "records"
        )
    return "; ".join(texts) or None
