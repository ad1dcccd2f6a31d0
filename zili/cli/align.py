"""`zili align`: where a chip's numbers first differ from the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from zili import chips
from zili.cli.options import Overrides, Recipe, refuse_unwritable
from zili.diagnosis.findings import EXIT_CODES, Severity
from zili.errors import ConfigError, LayoutError
from zili.parallel.layout import processes
from zili.plurals import counted
from zili.runs.recipes import read_recipe

_SHOWN = 12


def align(
    recipe: Recipe,
    against: Annotated[
        str, typer.Option(help="The chip whose results count as right; only the CPU is possible.")
    ] = "cpu",
    steps: Annotated[int, typer.Option(min=1, help="Training steps to compare.")] = 2,
    page: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    overrides: Overrides = None,
) -> None:
    """Train a few steps on the chip with every operation checked, and name the first one that is wrong.

    Exit codes: 0 everything is within rounding, 10 something is not.
    """
    if against != "cpu":
        raise ConfigError(f"--against {against}: only cpu, which every chip can be compared with in one process")
    if processes()[1] > 1:
        raise LayoutError("zili align runs in one process; start it without torchrun")
    refuse_unwritable(page)
    config = read_recipe(recipe, overrides or ())
    chips.apply_environment(chips.choose(config.chip.name).backend)  # what comes next imports torch

    from zili.diagnosis.align import align as compare
    from zili.diagnosis.align import write_page

    console = Console()
    result = compare(config, steps)
    for step, (chip, cpu) in enumerate(result.losses, 1):
        difference = abs(chip - cpu) / abs(cpu)
        console.print(f"step {step}  loss {chip:.6f} on {result.chip}, {cpu:.6f} on the CPU, {difference:.1e} apart")
    calls = sum(seen.calls for seen in result.seen.values())
    console.print(
        f"{counted(calls, 'operation')} of {counted(len(result.seen), 'kind')} checked, forward, backward and optimizer"
    )
    if result.unchecked:
        names = ", ".join(sorted(result.unchecked))
        console.print(f"not compared by themselves (random, a vendor's own, or not on the CPU): {names}")
    if page is not None:
        write_page(result, str(recipe), page)
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    if result.first is None:
        console.print("[green]every operation is within its band[/]")
        raise typer.Exit(EXIT_CODES[Severity.GOOD])
    console.print(f"[bold red]first[/] {escape(str(result.first))}", highlight=False, soft_wrap=True)
    for offence in result.offences[1:_SHOWN]:
        console.print(f"then  {escape(str(offence))}", highlight=False, soft_wrap=True)
    more = len(result.offences) - _SHOWN
    if more > 0:
        console.print(f"and {more} more" + ("" if page else "; --page FILE lists them"))
    raise typer.Exit(EXIT_CODES[Severity.BROKEN])
