"""Tables that read the same in a terminal, in a pipe and in a log."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 140  # rich assumes 80 columns where there is no terminal, which wraps every table


def console() -> Console:
    """Standard output, wide enough for a table when it is not a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, _PIPE_WIDTH))


def table(title: str, words: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Table:
    """An empty table with columns of words (the first may wrap) and of numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(words):
        made.add_column(name, overflow="fold", no_wrap=index > 0)
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made
