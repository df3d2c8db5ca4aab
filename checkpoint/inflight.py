"""Jobs in threads, as many at once as a bound of memory allows."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

MEMORY = 2**27  # bytes, where nobody says how many
WAITING = 16  # threads for jobs that wait: the more of them storage has, the more it does at once

Job = Callable[[], "Job | None"]  # what it returns is left to do, and mostly waits for storage


class InFlight:
    """Runs jobs in threads while the bytes that they hold at once stay within a limit.

    What a job returns is run by other threads, so that waiting for storage keeps no job from
    beginning that computes.
    """

    def __init__(self, limit: int, *, far: bool = False) -> None:
        """far: jobs mostly wait for a network, so that more of them are under way than cores."""
        self._limit, self._held = limit, 0
        self._threads = WAITING if far else (os.cpu_count() or 1) + 1
        self._failed: BaseException | None = None
        self._changed = threading.Condition()
        self.peak = 0

    def run(self, jobs: Iterable[tuple[int, Job]]) -> None:
        """Runs (bytes it holds, work) one after the other begun; raises what failed first."""
        with (
            ThreadPoolExecutor(WAITING, "store") as storing,
            ThreadPoolExecutor(self._threads, "make") as making,
        ):
            try:
                for nbytes, work in jobs:
                    self._admit(nbytes)
                    if self._failed is not None:
                        break
                    making.submit(self._do, storing, nbytes, work)
                with self._changed:
                    self._wait(lambda: not self._held)
            except BaseException as error:  # Ctrl-C: what is queued is let go
                self._failed = self._failed or error
                raise
        if self._failed is not None:
            raise self._failed

    def _admit(self, nbytes: int) -> None:
        with self._changed:
            self._wait(lambda: not self._held or self._held + nbytes <= self._limit)
            self._held += nbytes
            self.peak = max(self.peak, self._held)

    def _wait(self, until: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._failed is not None or until())

    def _do(self, storing: ThreadPoolExecutor, nbytes: int, work: Job) -> None:
        rest = None
        try:
            if self._failed is None:
                rest = work()
        except BaseException as error:
            self._failed = self._failed or error  # what follows from it may fail first in order
        if rest is not None:
            storing.submit(self._do, storing, nbytes, rest)
            return
        with self._changed:
            self._held -= nbytes
            self._changed.notify()
