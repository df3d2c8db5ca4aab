"""What is left of a failed read by Orbax: its reason in one line, and reads that nobody awaits."""

import gc
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from checkpoint import steps


def read_failure(error: BaseException, names: Sequence[str]) -> str:
    """Returns the reason in one line, after those names of arrays that the error is about.

    Orbax says which array failed by a dump of how it was opened; the reason is the error's cause.
    """
    text = str(error)
    if text.startswith("Encountered error while reading array") and error.__cause__:
        error = error.__cause__
    opened = (rf"""["']{re.escape(name.replace("/", "."))}/""" for name in names)
    about = [f"`{name}`" for name, place in zip(names, opened, strict=True)
             if re.search(place, text)]  # fmt: skip
    return ": ".join([*([steps.listing(about)] if about else []), steps.reason(error)])


def quiet_late_reads() -> None:
    """Says nothing, from now on, of reads that end after Orbax gave up on a step and closed shop.

    tensorstore tells each of them to Python's hook for errors that nobody can catch.
    """
    if not isinstance(sys.unraisablehook, _Quiet):
        sys.unraisablehook = _Quiet(sys.unraisablehook)


class _Quiet:
    def __init__(self, others: Callable[[Any], Any]) -> None:
        self._others = others

    def __call__(self, found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            self._others(found)


def collect_reads() -> None:
    """Drops the reads that Orbax leaves behind when one fails: each would print a page of text."""
    hook, asyncio = sys.unraisablehook, logging.getLogger("asyncio")
    disabled = asyncio.disabled
    sys.unraisablehook, asyncio.disabled = lambda _: None, True
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            gc.collect()
    finally:
        sys.unraisablehook, asyncio.disabled = hook, disabled
