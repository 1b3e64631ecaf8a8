"""Tables on standard output, and a spinner on standard error for work that has no progress to show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a small table with its numbers to the right."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", show_header=any(header))
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 or not any(header) else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # plain text: a path may hold what rich takes for markup
    Console().print(table)


@contextmanager
def working(title: str) -> Iterator[None]:
    """Show a spinner on standard error while the block runs, where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(title):
        yield
