"""What may not reach a terminal as it is: text from files that would steer it or hide something.

Names of arrays, metadata, error messages and generated text come from checkpoints and datasets that
anybody may have made. A command's streams escape what is written to them; what draws on a terminal
itself (progress bars) takes the stream below, `bare`, and escapes the text that it shows.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

# Control characters without tab and line feed, line and paragraph separators, what changes the
# direction of text, and lone surrogates, which no encoding takes.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Returns `text` with every character that could steer a terminal as `\u001b`."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_line(text: str) -> str:
    r"""Returns `text` as `printable` does, line feeds and tabs escaped too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def bare(stream: TextIO) -> TextIO:
    """Returns the stream that writes what it is given, below one of `escaped_streams`."""
    return stream.below if isinstance(stream, _Escaped) else stream  # type: ignore[return-value]


@contextmanager
def escaped_streams() -> Iterator[None]:
    """Escapes what the body, and later its loggers, write to standard output and error."""
    streams = (s if isinstance(s, _Escaped) else _Escaped(s) for s in (sys.stdout, sys.stderr))
    out, err = streams
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        yield


class _Escaped:
    def __init__(self, below: TextIO) -> None:
        self.below = below

    def write(self, text: str) -> int:
        self.below.write(printable(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)
