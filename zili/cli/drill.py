"""`zili drill`: break a run on purpose, by a schedule that a seed makes, and see what follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from zili.cli.options import Overrides, finite
from zili.cli.output import console, table
from zili.errors import ConfigError

if TYPE_CHECKING:
    from zili.supervision.drill import Followed
    from zili.supervision.folder import SupervisionFolder

_TO_ITS_END = 3600.0
"""Seconds for a run of this command to come to its end."""


class _Asked(NamedTuple):
    seed: int
    faults: int
    kinds: list[str]
    every: float
    phases: str | None


def drill(
    target: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="A run under `zili launch`, or a recipe.")],
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same faults.")] = 0,
    faults: Annotated[int, typer.Option(min=1, max=100_000, help="How many.")] = 10,
    kinds: Annotated[str | None, typer.Option(help="Which, as kill,hang; else all that need no hand.")] = None,
    phases: Annotated[str | None, typer.Option(help="In which phases of a process, as save,load; else all.")] = None,
    every: Annotated[float, typer.Option(min=0, callback=finite, help="Seconds between two, at least.")] = 0,
    machines: Annotated[int, typer.Option(min=1, max=8, help="Of a recipe: machines, which are processes here.")] = 2,
    processes: Annotated[int, typer.Option(min=1, help="Of a recipe: processes on each.")] = 2,
    patience: Annotated[float, typer.Option(min=0.1, callback=finite, help="Of a recipe: as of `zili launch`.")] = 10,
    compare: Annotated[
        bool, typer.Option("--compare", help="Of a recipe: compare the weights with an undisturbed run's, bit by bit.")
    ] = False,
) -> None:
    """Break a run on purpose and report what it did. RUN trains under `zili launch`, and is yours; a RECIPE is begun
    here first. Each fault is made when a process is in the phase that it is meant for.

    Exit codes: 0 the run went on after each fault, or ended as it should; 14 it did not, or no fault could be made; 3
    the run is over, or somebody else's, or there is no such kind or phase.
    """
    from zili.supervision.drill import exit_code, sum_up
    from zili.supervision.faults import kinds_named, phases_named, schedule

    asked = _Asked(seed, faults, kinds_named(kinds), every, phases)
    schedule(seed, 1, asked.kinds, phases_named(phases, asked.kinds), ["a"], 1)  # what is refused is refused at once
    if _is_run(target):
        found, same = _on_a_run(target, asked), True
    else:
        found, same = _on_a_recipe(target, list(overrides or ()), asked, (machines, processes), patience, compare)
    _show(found)
    console().print(sum_up(found), highlight=False)
    raise typer.Exit(exit_code(found) if same else exit_code([]))


def _is_run(target: Path) -> bool:
    if target.is_dir() and not (target / "supervision").is_dir():
        raise ConfigError(f"{target} is no run that `zili launch` has begun")
    return target.is_dir()


def _on_a_run(run: Path, asked: _Asked, tend: Callable[[], None] = lambda: None) -> list[Followed]:
    from zili.supervision.drill import Drill, drilled
    from zili.supervision.faults import phases_named, schedule

    folder: SupervisionFolder
    folder, machines, processes = drilled(run)
    phases = phases_named(asked.phases, asked.kinds)
    planned = schedule(asked.seed, asked.faults, asked.kinds, phases, machines, processes)
    found = []
    for one in Drill(folder, asked.seed, tend).run(planned, asked.every):
        found.append(one)
        console(stderr=True).print(f"zili drill: {_line(one)}", highlight=False, markup=False)
    return found


def _on_a_recipe(
    recipe: Path, overrides: list[str], asked: _Asked, size: tuple[int, int], patience: float, compare: bool
) -> tuple[list[Followed], bool]:
    """What followed; whether the weights are those of an undisturbed run, where that is asked."""
    from zili.runs.recipes import read_recipe
    from zili.supervision.drill import Watched
    from zili.supervision.own_machines import OwnMachines, environment

    run = read_recipe(recipe, overrides).folder
    calm = run.with_name(f"{run.name}-calm")
    for folder in (run, calm) if compare else (run,):
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} has a run already: drill that one while it trains, or set another folder")
    words = [str(recipe), *(word for text in overrides for word in ("--set", text))]
    words += ["--processes", str(size[1]), "--patience", str(patience)]
    log = run.with_name(f"{run.name}-drill.log")
    own = OwnMachines(words, size[0], log, environment())
    try:
        own.await_steps(lambda: Watched(run).newest_step()[0], 2)
        found = _on_a_run(run, asked, own.tend)
        if not compare:
            return found, True
        codes = own.await_end(_TO_ITS_END)
    finally:
        own.close()
    if codes != {0}:
        console().print(f"the run ended with {sorted(codes)}: there is nothing to compare", highlight=False)
        return found, any(one.code is not None for one in found)
    return found, _is_same(run, calm, words, size[0], log)


def _is_same(run: Path, calm: Path, words: list[str], machines: int, log: Path) -> bool:
    """Train the recipe undisturbed, and compare."""
    from zili.supervision.own_machines import OwnMachines, different_weights, environment

    own = OwnMachines([*words, "--set", f"folder={calm}"], machines, log, environment())
    try:
        codes = own.await_end(_TO_ITS_END)
    finally:
        own.close()
    if codes != {0}:
        console().print(f"the undisturbed run ended with {sorted(codes)}; see {log}", highlight=False)
        return False
    count, differ = different_weights(run, calm)
    said = f"{len(differ)} differ: {', '.join(differ[:4])}" if differ else "bit by bit those of an undisturbed run"
    console().print(f"{count} tensors of the newest checkpoint: {said}", highlight=False, markup=False)
    return not differ


def _line(one: Followed) -> str:
    fault = one.fault
    what = f"fault {fault.number}: {fault.kind} in {fault.phase} of process {fault.process} on {fault.machine}"
    if not one.fired:
        return f"{what}: not fired: {one.why}"
    ended = f"the run ended with {one.code}" if one.code is not None else "NO STEP FOLLOWED"
    after = ended if one.seconds is None else f"next step after {one.seconds:.2f} s"
    return ". ".join(filter(None, (f"{what}: {after}", one.went_on, one.cause)))


def _show(found: Sequence[Followed]) -> None:
    out = console()
    columns = ("", "fault", "where", "phase", "fired in", "after step", "next step, s", "rule", "what the run said")
    rows = table(out, columns, left=("fault", "where", "phase", "fired in", "rule", "what the run said"))
    for one in found:
        fault, took = one.fault, "" if one.seconds is None else f"{one.seconds:.2f}"
        ended = took if one.code is None else f"ended: {one.code}"
        rows.add_row(
            *(str(fault.number), fault.kind, f"{fault.machine} {fault.process}", fault.phase),
            *(one.phase or "not fired", "" if one.step is None else str(one.step), ended, one.rule),
            one.cause or one.why,
        )
    out.print(rows)
