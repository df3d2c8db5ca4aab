"""What is left of a failed read by Orbax: its reason in one line, and reads that nobody awaits."""

import gc
import re
import sys
from collections.abc import Sequence

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


def collect_reads() -> None:
    """Drops the reads that Orbax leaves behind when one fails: each would print a page of text."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before
