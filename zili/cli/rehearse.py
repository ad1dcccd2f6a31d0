"""`zili rehearse`: a step of a recipe as one of many processes, on this machine, without memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from zili import api
from zili.chips.catalog import Chip, find_chip
from zili.cli.options import MOST_CHIPS, AsJson, Overrides, Page, Recipe, refuse_unwritable
from zili.cli.output import console, table, working
from zili.durable import write_whole
from zili.errors import LayoutError
from zili.parallel.layout import processes
from zili.plurals import counted
from zili.runs.recipes import read_recipe

if TYPE_CHECKING:
    from zili.rehearsal import Rehearsal

_SHOWN = 4
"""Parts of memory shown of each process; JSON and page have all."""


def rehearse(
    recipe: Recipe,
    count: Annotated[int, typer.Option("--chips", min=1, max=MOST_CHIPS, help="Processes in all, one a chip.")],
    rank: Annotated[int, typer.Option(min=0, help="Number of the process to rehearse, from 0.")] = 0,
    all_stages: Annotated[
        bool, typer.Option("--all-stages", help="Rehearse one process of each stage of the pipeline.")
    ] = False,
    chip: Annotated[
        str | None, typer.Option(help="Model of the chips, as `zili chips` lists them; else the recipe's.")
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Micro-batches in the step; by default as many as memory depends on."),
    ] = None,
    as_json: AsJson = False,
    page: Page = None,
    overrides: Overrides = None,
) -> None:
    """Run one step of the real trainer as one of many processes, without them and without memory: what does it take?

    Exit codes: 0 it runs (and fits, where --chip is given), 7 it does not.
    """
    if processes()[1] > 1:
        raise LayoutError("zili rehearse is every process by itself: run it without torchrun")
    if all_stages and rank:
        raise typer.BadParameter("--all-stages is every place's first process; leave out --rank")
    refuse_unwritable(page)
    config = read_recipe(recipe, overrides or ())
    with working() as say:
        found = api.rehearse(
            config, count, rank=rank, all_stages=all_stages, chip=chip, micro_batches=micro_batches, progress=say
        )
    name = chip or config.chip.model
    model = find_chip(name) if name else None
    to = console(quiet=as_json)
    _show(found, to)
    capacity = int(model.require("memory_gb") * 1e9) if model else None
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in found], indent=1))
    if page is not None:
        from zili.rehearsal.page import page as drawn

        write_whole(page, drawn(found, f"{recipe.name} on {count:,} {model.name if model else 'chips'}", capacity))
        to.print(f"page: {page}", highlight=False, soft_wrap=True)
    _refuse_what_does_not_fit(found, model, capacity, to)


def _show(found: Sequence[Rehearsal], to: Console) -> None:
    from zili.pages.figures import binary_size
    from zili.rehearsal.page import imbalance
    from zili.rehearsal.result import ranges_text

    first = found[0]
    micro_batches = counted(first.micro_batches, "micro-batch")
    to.print(f"{first.layout}, {micro_batches} in the step", highlight=False)
    for choice in first.choices:
        to.print(f"  {choice}", highlight=False, markup=False, soft_wrap=True)
    rows = table(to, ("process", "layers", "peak", "of it"), left=("layers", "of it"))
    for one in found:
        parts = sorted(((size, part) for part, size in one.peak.parts.items() if size), reverse=True)
        text = ", ".join(f"{part} {binary_size(size)}" for size, part in parts[:_SHOWN])
        rows.add_row(str(one.rank), ranges_text(one.layers), binary_size(one.peak.bytes), text)
    to.print(rows)
    for one in found if len(found) == 1 else ():
        for message, times in sorted(one.messages.items(), key=lambda item: -item[0].bytes * item[1]):
            to.print(
                f"  {message.kind} among {message.processes} ({message.mesh}): {times} of {binary_size(message.bytes)}",
                highlight=False,
            )
    for one in found:
        flops = ", ".join(f"{phase} {count / 1e12:,.2f}" for phase, count in one.flops.items())
        to.print(
            f"process {one.rank}: TFLOP {flops}; {sum(one.operations.values()):,} operations; rehearsed in "
            f"{one.seconds:.1f} s with {binary_size(one.resident_bytes)}",
            highlight=False,
        )
    if len(found) > 1:
        memory, work = ([one.peak.bytes for one in found], [sum(one.flops.values()) for one in found])
        to.print(f"most over mean: memory {imbalance(memory):.3f}, arithmetic {imbalance(work):.3f}", highlight=False)


def _refuse_what_does_not_fit(
    found: Sequence[Rehearsal], model: Chip | None, capacity: int | None, to: Console
) -> None:
    from zili.pages.figures import binary_size
    from zili.planning.exact.memory import usable

    if capacity is None or model is None:
        return
    worst = max(found, key=lambda one: one.peak.bytes)
    room = usable(capacity)
    if worst.peak.bytes > room:
        raise LayoutError(
            f"process {worst.rank} does not fit: {binary_size(worst.peak.bytes)} at its peak, {model.name} has "
            f'{binary_size(room)} beside its runtime; set training.recompute = "full", a smaller '
            "micro_batch, or more shards, tensor or pipeline"
        )
    left = binary_size(room - worst.peak.bytes)
    to.print(f"fits {model.name}: {left} left beside its runtime and its collectives", highlight=False)
