"""Which snapshot counts, and of which step the next is taken: kept by the first host's keeper.

A snapshot counts when every process holds it and its parity is stored. Only then is the step of
the next one named, far enough ahead for all to hear of it in time, so none is ever queued behind
another and none overwrites the last that counts. A process that hears of it too late, or whose
keeper was replaced, says so; then another step is named, further ahead. Pure: told what happened,
it answers.
"""

from collections.abc import Iterable

_FURTHEST = 64  # steps ahead of the fastest


def furthest(every: int) -> int:
    """Returns how many steps ahead the next snapshot may be, of every `every`-th step."""
    return 2 * _FURTHEST + every


class Rounds:
    """Of `count` processes that take a snapshot of every `every`-th step at most.

    Attributes:
      committed: the step that counts, -1 for none.
      next: the step that all take next, -1 before all are there.
    """

    def __init__(self, count: int, every: int) -> None:
        self.committed, self.next = -1, -1
        self._count, self._every = count, every
        self._margin = 1 if count > 1 else 0
        self._at = 0
        self._there: set[int] = set()
        self._done: set[int] = set()

    def ready(self, ranks: Iterable[int], at: int, committed: int) -> bool:
        """Processes begin at step `at`, with a snapshot of `committed`; whether `next` changed."""
        self._there.update(ranks)
        self.committed = max(self.committed, committed)
        if self.next > max(at, self._at) or self._done.issuperset(ranks):
            return self.next >= 0  # it is ahead of all, or the others are at it: tell it once more
        return self._name_next(at)

    def missed(self, step: int, at: int) -> bool:
        """A process was past `step` when it heard of it; whether `next` changed."""
        if step != self.next:
            return False
        self._margin = min(_FURTHEST, 2 * self._margin)
        return self._name_next(at)

    def failed(self, step: int, at: int) -> bool:
        """What a process wrote of `step` did not reach all hosts; whether `next` changed."""
        return step == self.next and self._name_next(at)

    def done(self, ranks: Iterable[int], step: int, at: int) -> bool:
        """Processes hold `step`, safely, and have reached `at`; whether `next` changed."""
        self._at = max(self._at, at)
        if step < self.next or (step > self.next and self._count > 1):  # alone, late is no harm
            return False
        self._done.update(ranks)
        if len(self._done) < self._count:
            return False
        self.committed = step
        self._margin -= self._margin > 1  # what made one miss may have been passing
        return self._name_next(at)

    def _name_next(self, at: int) -> bool:
        self._at = max(self._at, at)
        self._done.clear()
        if len(self._there) < self._count:
            return False
        soonest = max(self.next, self._at + self._margin) + 1
        self.next = -(-soonest // self._every) * self._every
        return True
