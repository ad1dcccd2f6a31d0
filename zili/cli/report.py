"""`zili report`: write a run's report.html again, or compare runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zili.cli.options import AsJson, Page, refuse_unwritable
from zili.cli.output import console, table
from zili.durable import write_whole

if TYPE_CHECKING:
    from zili.evaluation.run_record import RunRecord


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folder, such as runs/quickstart; or several.", metavar="RUN...")
    ],
    page: Page = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html from what a run has recorded so far, also while it is running. For several runs, show their
    figures and the keys in which their recipes differ; --page draws their curves on one page."""
    refuse_unwritable(page)
    if len(runs) == 1 and page is None and not as_json:
        from zili.evaluation.report import write_report

        typer.echo(f"Wrote {write_report(runs[0])}")
        return
    from zili.evaluation.comparison import compare, differences, figures
    from zili.evaluation.comparison import page as drawn

    found, names = compare(runs), _names(runs)
    if page is not None:
        write_whole(page, drawn(found, names))
    if as_json:
        told = {name: figures(run) for name, run in zip(names, found, strict=True)}
        differ = {key: dict(zip(names, there, strict=True)) for key, there in differences(found).items()}
        typer.echo(json.dumps({"runs": told, "differences": differ}, indent=1, ensure_ascii=False))
        return
    _show(found, names)
    typer.echo(f"page: {page}" if page else "(--page FILE draws their curves in one page)")


def _names(runs: list[Path]) -> list[str]:
    """The folders' names, where these tell them apart; else the paths as typed."""
    short = [Path(os.path.normpath(run)).name for run in runs]
    return short if len(set(short)) == len(runs) and "" not in short else [str(run) for run in runs]


def _show(runs: list[RunRecord], names: list[str]) -> None:
    from zili.evaluation.comparison import HEADINGS, cells, differences

    to = console()
    first = table(to, ["run", *HEADINGS.values()], left=["run"])
    for name, run in zip(names, runs, strict=True):
        first.add_row(name, *cells(run))
    to.print(first, highlight=False, markup=False)
    differ = differences(runs)
    if differ:
        second = table(to, ["recipes differ in", *names], left=["recipes differ in"])
        for key, there in differ.items():
            second.add_row(key, *there)
        to.print(second, highlight=False, markup=False)
