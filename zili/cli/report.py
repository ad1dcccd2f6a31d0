"""`zili report`: write a run's report.html again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/quickstart.", metavar="RUN")],
) -> None:
    """Write report.html from what a run has left so far; works while it is running, too."""
    from zili.evaluation.report import write_report

    typer.echo(f"Wrote {write_report(run)}")
