"""The progress bar of commands that read or write for long."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.terminal import bare


@contextmanager
def progress(text: str, total: int, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows a bar on a terminal, elsewhere nothing, while the body calls what it is given.

    in_bytes: amounts are bytes: the bar stays at the end and tells sizes and speed too.
    """
    from rich import progress as bars
    from rich.console import Console

    columns = bars.Progress.get_default_columns()
    if in_bytes:
        columns = (
            bars.TextColumn(text, markup=False),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
        )
    console = Console(file=bare(sys.stderr))
    with bars.Progress(
        *columns, console=console, transient=not in_bytes, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(text, total=total)
        yield lambda amount: bar.advance(task, amount)
