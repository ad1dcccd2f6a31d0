"""`zili doctor`: what a machine and its chip can do, and whether it is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from zili.cli.options import AsJson, finite
from zili.diagnosis.findings import AREAS, EXIT_CODES, Finding, Severity
from zili.errors import LayoutError
from zili.parallel.layout import processes as processes_started

_COLOURS = {
    Severity.GOOD: "green",
    Severity.FALLBACK: "dim",
    Severity.DEGRADED: "yellow",
    Severity.BROKEN: "bold red",
}


def doctor(
    chip: Annotated[str, typer.Option(help="Backend to examine; `zili chips` lists names.")] = "auto",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes for collectives and workers; by default one a device in sight.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder for checkpoints: its disk is timed.")] = Path(),
    patience: Annotated[
        float,
        typer.Option(
            min=1, callback=finite, help="Seconds of silence after which processes that have begun are ended."
        ),
    ] = 60.0,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Examine only this; may be repeated: {', '.join(AREAS)}.")
    ] = None,
    as_json: AsJson = False,
    every: Annotated[bool, typer.Option("--all", help="List every good finding too.")] = False,
) -> None:
    """Examine this machine: what is here, what computes rightly, how fast, and whether processes reach one another.

    Exit codes: 0 sound, 9 something is slow or does not repeat, 10 something is wrong.
    """
    from zili.diagnosis.doctor import examine

    if unknown := set(only or []) - set(AREAS):
        raise typer.BadParameter(f"--only {', '.join(sorted(unknown))}: there are {', '.join(AREAS)}")
    if processes_started()[1] > 1:
        raise LayoutError("zili doctor starts the processes it needs: run it by itself, without torchrun")
    console = Console(quiet=as_json)
    good: dict[str, int] = {}

    def show(finding: Finding) -> None:
        if finding.severity is Severity.GOOD and finding.area == "numbers" and not every:
            good[finding.area] = good.get(finding.area, 0) + 1
            return
        colour = _COLOURS[finding.severity]
        console.print(
            f"[{colour}]{finding.severity.name.lower():<9}[/] {escape(finding.area)}: {escape(finding.name)}: "
            f"{escape(finding.seen)}" + (f"\n          {escape(finding.fix)}" if finding.fix else ""),
            highlight=False,
            soft_wrap=True,
        )

    report = examine(chip, processes, folder, show, patience, only or AREAS)
    severity = Severity[report["severity"].upper()]
    if as_json:
        typer.echo(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        for area, count in good.items():
            console.print(f"[green]good     [/] {area}: {count} more operations within rounding (--all lists them)")
        console.print(f"verdict: {_VERDICTS[severity]}", highlight=False)
    raise typer.Exit(EXIT_CODES[severity])


_VERDICTS = {
    Severity.GOOD: "sound",
    Severity.FALLBACK: "sound; what falls back is named above",
    Severity.DEGRADED: "degraded: runs will be slow or not repeat themselves",
    Severity.BROKEN: "broken: a run would give wrong numbers or stop",
}
