"""The progress bar of commands that read or write for long."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.terminal import bare, one_line


@contextmanager
def progress(text: str, total: int, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows a bar on a terminal, elsewhere nothing, while the body calls what it is given.

    in_bytes: amounts are bytes: the bar stays at the end and tells sizes and speed too.
    """
    from rich import progress as bars
    from rich.console import Console

    # As a value: paths hold braces and brackets too.
    words = bars.TextColumn("{task.description}", markup=False)
    columns = (words, *bars.Progress.get_default_columns()[1:])
    if in_bytes:
        columns = (
            words,
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
        )
    console = Console(file=bare(sys.stderr))
    with bars.Progress(
        *columns, console=console, transient=not in_bytes, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(one_line(text), total=total)
        yield lambda amount: bar.advance(task, amount)
