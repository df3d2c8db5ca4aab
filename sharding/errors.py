"""Errors that are the user's to fix, and the nearest-match hint that they carry.

Lives on the lowest floor so that every package can raise them; imports nothing heavy.
"""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class UsageError(ValueError):
    """A mistake in a config, a command line or an input file: one line and the exit status."""

    status = 2


class MismatchError(UsageError):
    """An input that is sound but not what it has to be: another model, a tensor too many."""

    status = 3


class UnsafeInputError(UsageError):
    """An input that is damaged, or built to do harm: nothing in it is trusted."""

    status = 4


class StorageError(UsageError, OSError):
    """An object store that has no such bucket, refuses access, or does not answer."""

    status = 5


def install_hint(extra: str) -> str:
    """Returns how to install an extra of Torus, which is installed from a clone."""
    return f"pip install -e '.[{extra}]' in the folder of Torus"


def nearest(value: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean `x`?" for the choice closest to `value`, or "" when none is close.

    A choice of several words is also close to its last one: `lr` to `peak_lr`.
    """
    known = list(choices)
    match = difflib.get_close_matches(str(value), known, n=1, cutoff=0.6)
    match = match or [choice for choice in known if str(choice).endswith(f"_{value}")]
    return f"; did you mean `{match[0]}`?" if match else ""


def shown(value: Any, limit: int = 60) -> str:
    """Returns the beginning of a value's repr, for messages about what a file says.

    Nothing larger than the result is built, however large or deep the value is, and nothing in it
    reaches a terminal unescaped.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxother = 3, 4, limit
    short.maxstring = short.maxlong = limit
    text = short.repr(value)
    return text if len(text) <= limit + 2 else text[: limit - 1] + "…"
