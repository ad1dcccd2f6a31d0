"""What commands print: on a terminal as wide as it is; in a pipe or a file plain and whole, for other programs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_WHOLE = 100_000
"""Columns where nobody looks: no line is wrapped or cut."""


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where a command prints to."""
    found = Console(stderr=stderr, quiet=quiet)
    return found if found.is_terminal else Console(stderr=stderr, quiet=quiet, width=_WHOLE)


def table(to: Console, columns: Sequence[str], *, left: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table, figures to the right, the columns named in `left` to the left. A cell that is too wide is folded
    on a terminal, and never cut."""
    whole = not to.is_terminal
    made = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for name in columns:
        side = "left" if name in left else "right"
        made.add_column(name, justify=side, no_wrap=whole, overflow="fold")  # type: ignore[arg-type]
    return made
