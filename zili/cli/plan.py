"""`zili plan`: a model on chips that are not there: layout, speed with its error, memory, days, money, failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isinf
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal

from zili import api
from zili.chips.catalog import find_chip
from zili.cli.options import MOST_CHIPS, AsJson, Overrides, Page, count_of, finite, refuse_unwritable
from zili.cli.output import console, table
from zili.config import dump_recipe
from zili.durable import write_whole
from zili.errors import ConfigError, ZiliError
from zili.planning.search.goodput import LLAMA3_RATE, Failures
from zili.planning.search.layouts import seconds_text
from zili.planning.search.plan import MFU, Plan, make_plan
from zili.plurals import counted
from zili.runs.plans import NoChip

_SHOWN_DRAWBACKS = 8
_SMALL_GIB = 2**30
_NEARLY_ALL = 0.999
_COUNTS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_NEEDED = {
    "model": "a model: a preset (`zili config presets`), a recipe or a run folder",
    "chip": "--chip: the model of the chips (`zili chips` lists them), where the recipe names none in chip.model",
    "chips": "--chips: how many",
}


Model = Annotated[str | None, typer.Argument(help="Preset (`zili config presets`), TOML recipe or run folder.")]
ChipName = Annotated[
    str | None, typer.Option(help="Model of the chips, as `zili chips` lists them; else the recipe's.")
]
Chips = Annotated[int | None, typer.Option(min=1, max=MOST_CHIPS, help="Number of chips.")]
Tokens = Annotated[
    float | None,
    typer.Option(
        parser=count_of, metavar="COUNT", help="Tokens to train on, such as 300B or 1T; by default the recipe's."
    ),
]
SequenceLength = Annotated[int | None, typer.Option(min=1, max=2**24, help="Tokens in a sequence.")]
GlobalBatch = Annotated[int | None, typer.Option(min=1, max=2**22, help="Sequences in a step.")]
Compare = Annotated[str | None, typer.Option(help="Other chips to compare: NAME or NAME:COUNT, separated by commas.")]
LayoutText = Annotated[
    str | None,
    typer.Option(
        help='Predict this one: "tensor=8 pipeline=8 schedule=interleaved micro_batch=1 recompute=full"; '
        '"recipe" for the recipe\'s own.'
    ),
]
Doctor = Annotated[Path | None, typer.Option(help="Report of `zili doctor --json` from such a chip: measured speeds.")]
PeakTflops = Annotated[
    float | None, typer.Option(min=0.001, max=1e6, callback=finite, help="The chip's bf16 peak, if none is published.")
]
Price = Annotated[float | None, typer.Option(min=0, max=1e9, callback=finite, help="Price of a chip-hour.")]
PerChipDay = Annotated[float, typer.Option(min=0, max=1, callback=finite, help="Interruptions for each chip and day.")]
PerDay = Annotated[
    float,
    typer.Option(
        min=0, max=1000, callback=finite, help="Interruptions a day that do not depend on the number of chips."
    ),
]
Together = Annotated[int, typer.Option(min=1, max=4096, help="Chips that fail together, such as those of a node.")]
RestartMinutes = Annotated[
    float | None,
    typer.Option(min=0, max=10_000, callback=finite, help="Time from an interruption until the run trains again."),
]
CheckpointSeconds = Annotated[
    float,
    typer.Option(min=0.01, max=86_400, callback=finite, help="How long a checkpoint keeps the run from training."),
]
MeasuredRun = Annotated[
    Path | None,
    typer.Option(help="Take what failures cost, and how often they come, from this run under `zili launch`."),
]
Spares = Annotated[
    float, typer.Option(min=0, max=1, callback=finite, help="Spare chips, kept ready and paid for, as a share of all.")
]
Write = Annotated[
    Path | None,
    typer.Option(help="Write the layout to run as a recipe for `zili train`, with rate, warm-up and checkpoints."),
]
RunsTable = Annotated[Path | None, typer.Option(help="Predict the rows of this table of published runs instead.")]
Out = Annotated[Path | None, typer.Option(help="File for the table of --runs.")]


def plan(
    model: Model = None,
    chip: ChipName = None,
    chips: Chips = None,
    tokens: Tokens = None,
    sequence: SequenceLength = None,
    global_batch: GlobalBatch = None,
    compare: Compare = None,
    layout: LayoutText = None,
    doctor: Doctor = None,
    peak_tflops: PeakTflops = None,
    price: Price = None,
    failures: PerChipDay = LLAMA3_RATE,
    failures_per_day: PerDay = 0.0,
    failing_together: Together = 1,
    restart_minutes: RestartMinutes = None,
    checkpoint_seconds: CheckpointSeconds = Failures.checkpoint,
    spares: Spares = 0.02,
    measured: MeasuredRun = None,
    write: Write = None,
    as_json: AsJson = False,
    page: Page = None,
    runs: RunsTable = None,
    out: Out = None,
    overrides: Overrides = None,
) -> None:
    """Search the layouts of a model on chips, and say what the best takes: time with its error, memory, days, money.

    Exit codes: 0 done, 3 not understood, 6 the chip's peak is not known, 7 nothing divides or fits.
    """
    refuse_unwritable(write, page, out)
    if runs is not None:
        _predict_runs(runs, out, chip)
        return
    if model is None or chips is None:
        raise _missing(model=model, chips=chips)
    risk = _failures(failures, failures_per_day, failing_together, restart_minutes, checkpoint_seconds, spares)
    risk, notes = (risk, []) if measured is None else _measured(measured, risk, restart_minutes, checkpoint_seconds)
    try:
        made = api.plan(
            model,
            chips,
            chip,
            tokens=tokens,
            sequence_length=sequence,
            global_batch=global_batch,
            layout=layout,
            doctor=_report(doctor),
            peak_tflops=peak_tflops,
            price=price,
            failures=risk,
            overrides=overrides or (),
        )
    except NoChip:
        raise _missing(chip=None) from None
    _tell(replace(made, notes=(*made.notes, *notes)), compare, write, as_json, page)


def _tell(made: Plan, compare: str | None, recipe: Path | None, as_json: bool, page: Path | None) -> None:
    """What is asked for of a plan: shown, compared and written."""
    to = console(quiet=as_json)
    _show(made, to)
    others = [made, *_others(compare, made, console(stderr=as_json))] if compare else [made]
    if compare:
        _show_comparison(others, to)
    if recipe is not None:
        write_whole(recipe, _recipe(made))
        to.print(f"recipe: {recipe}: {made.chosen.text}{_chosen(made)}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        everything = made.as_json() | ({"compared": [one.as_json() for one in others]} if compare else {})
        typer.echo(json.dumps(everything, indent=1))
    if page is not None:
        from zili.planning.search.page import page as drawn

        write_whole(page, drawn(others, f"{made.setting.config.name} on {made.chips:,} {made.chip.name}"))
        to.print(f"page: {page}", highlight=False, soft_wrap=True)


def _missing(**given: object) -> typer.BadParameter:
    return typer.BadParameter("missing: " + "; ".join(_NEEDED[name] for name, value in given.items() if value is None))


def _failures(
    per_chip: float, per_day: float, together: int, restart_minutes: float | None, checkpoint: float, spares: float
) -> Failures:
    """With the usual parts of a restart, or these in proportion, adding up to `restart_minutes`."""
    risk = Failures(per_chip, per_day, checkpoint=checkpoint, blast=together, spares=spares)
    if restart_minutes is None:
        return risk
    factor = 60 * restart_minutes / risk.restart
    parts = {name: factor * getattr(risk, name) for name in ("detection", "replacement", "reload", "warm_up")}
    return replace(risk, **parts)


def _measured(
    run: Path, risk: Failures, restart_minutes: float | None, checkpoint: float
) -> tuple[Failures, list[str]]:
    """With what a run measured, and what to say of it; what was given otherwise stays."""
    from zili.supervision.measured import measured

    if restart_minutes is not None:
        raise ConfigError(f"--restart-minutes and --measured {run} both say what a restart takes: give one of them")
    found = measured(run, risk)
    if checkpoint != Failures.checkpoint:
        return replace(found.failures, checkpoint=checkpoint), [
            *found.notes,
            f"a checkpoint {checkpoint:g} s, as given",
        ]
    return found.failures, found.notes


def _report(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the report {path}: {error}") from error
    if not isinstance(report, dict):
        raise ConfigError(f"{path} is not a report of `zili doctor --json`")
    return report


def _others(compare: str, made: Plan, to: Console) -> list[Plan]:
    """The same model on other chips; one that does not work is said and left out."""
    # Measured on the first chip, and its peak, if they were given, are not the others'.
    other, found = replace(made.setting, doctor=None, peak_tflops=None), []
    for text in filter(None, (part.strip() for part in compare.split(","))):
        name, colon, count = text.partition(":")
        if colon and not (count.isdecimal() and 0 < int(count) <= MOST_CHIPS):
            raise ConfigError(f"--compare {text!r}: write it as {name}:2048")
        try:
            found.append(make_plan(other, find_chip(name), int(count) if colon else made.chips))
        except ZiliError as error:
            to.print(f"{text}: {error}", highlight=False, markup=False, soft_wrap=True)
    return found


def _recipe(made: Plan) -> str:
    chosen = made.chosen
    lines = [
        f"{made.chips:,} {made.chip.name}, by `zili plan`: {chosen.text}",
        f"{seconds_text(made.seconds(chosen)[0])} a step predicted, {_bytes(chosen.bytes)} a chip{_chosen(made)}.",
        *(f"{one.table}.{one.key} = {one.value:g}: {one.reason}" for one in made.left_open),
        "Name your data: [data] sources, tokenizer, held_out.",
    ]
    return "".join(f"# {line}\n" for line in lines) + dump_recipe(made.recipe)


def _chosen(made: Plan) -> str:
    """Why it is not the fastest, where it is not."""
    slower = made.chosen.time.total / made.best.time.total - 1
    if made.chosen is made.best:
        return ""
    return f"; the simplest of those that a prediction cannot tell apart, {max(0.0, slower):.1%} behind the fastest"


# ---- what is shown


def _show(made: Plan, to: Console) -> None:
    def say(text: str) -> None:
        to.print(text, highlight=False, markup=False, soft_wrap=True)

    best, config = made.best, made.setting.config
    run = best.run
    say(
        f"{config.name}: {counted(run.global_batch, 'sequence')} of {run.sequence:,} a step "
        f"({_count(run.tokens)} tokens), {_count(made.setting.tokens)} tokens, on {made.chips:,} {made.chip.name}; "
        f"{counted(made.found.searched, 'layout')} looked at"
    )
    for note in made.notes:
        say(f"  {note}")
    rows = table(to, ("", "s a step", "from", "to", "tokens/s", "MFU", "GiB"))
    for number, candidate in enumerate(made.found.best, 1):
        say(f"{number}: {candidate.text}")
        rows.add_row(
            str(number),
            *(f"{value:.4g}" for value in made.seconds(candidate)),
            f"{made.tokens_per_s(candidate):,.0f}",
            f"{100 * made.mfu(candidate):.1f} %",
            f"{candidate.bytes / 2**30:.{1 if candidate.bytes > _SMALL_GIB else 3}f}",
        )
    to.print(rows)
    say(f"from, to: where the truth was for nine of ten published runs. MFU: {MFU}")
    say("time: " + _parts(vars(best.time), seconds_text))
    say("memory: " + _parts(best.memory, _bytes))
    for drawback in made.found.drawbacks[:_SHOWN_DRAWBACKS]:
        say(f"  {drawback.choice}: {drawback.why}")
    good = made.goodput
    hours = good.mean_between / 3600
    often = "none" if isinf(hours) else f"one in {hours:,.1f} h, {made.interruptions:,.3g} in all"
    every = "" if isinf(good.interval) else f" every {good.interval / 60:.1f} min"
    size, most = decimal(round(made.checkpoint_bytes)), f", most is lost to {good.first_to_improve}"
    say(
        f"failures: {often}; a checkpoint ({size}){every}; {100 * good.share:.1f} % of the time is training"
        + (most if good.share < _NEARLY_ALL else "")
    )
    energy = made.megawatt_hours
    spares = f" with {counted(good.spares, 'spare')}" if good.spares else ""
    say(
        f"{_days(made.days)}, {_three(made.chip_hours)} chip-hours{spares}"
        + (f", {_three(energy)} MWh (an estimate)" if energy else "")
        + (f", {_three(made.cost)} at {made.setting.price:g} a chip-hour" if made.cost is not None else "")
    )
    if made.chosen is not best:
        say(f"--write takes {made.chosen.text}{_chosen(made)}")


def _days(days: float) -> str:
    """Days, hours, minutes or seconds, so that something of it is left."""
    for name, size in (("day", 1.0), ("hour", 1 / 24), ("minute", 1 / 1440)):
        if days >= 2 * size:
            return f"{days / size:,.1f} {name}s"
    return f"{_three(86_400 * days)} seconds"


def _three(figure: float) -> str:
    """A figure to the whole, a small one to three digits."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _count(count: float) -> str:
    """`12.3 M`, `1.5 T`."""
    unit, size = next(((unit, size) for unit, size in _COUNTS if count >= size), ("", 1.0))
    return f"{count / size:.3g} {unit}".rstrip()


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= _SMALL_GIB else decimal(round(size))


def _parts(parts: dict[str, float], told: Callable[[float], str]) -> str:
    """The largest first; what is less than a half per cent of all is left out."""
    least = sum(parts.values()) / 200
    ranked = sorted(((size, part) for part, size in parts.items() if size >= least > 0), reverse=True)
    return ", ".join(f"{part} {told(size)}" for size, part in ranked)


def _show_comparison(plans: Sequence[Plan], to: Console) -> None:
    columns = ("chip", "chips", "s a step", "from", "to", "tokens/s each", "MFU", "GiB", "days")
    rows = table(to, columns, left=("chip",))
    for made in plans:
        rows.add_row(
            made.chip.name,
            f"{made.chips:,}",
            *(f"{value:.3g}" for value in made.seconds(made.best)),
            f"{made.tokens_per_s(made.best) / made.chips:,.0f}",
            f"{100 * made.mfu(made.best):.1f} %",
            f"{made.best.bytes / 2**30:.1f}",
            f"{made.days:,.1f}",
        )
    to.print(rows)
    for made in plans:
        to.print(f"{made.chip.name}: {made.best.text}", highlight=False, markup=False, soft_wrap=True)


def _predict_runs(runs: Path, out: Path | None, chip: str | None) -> None:
    from zili.planning.fitted.runs import predict_table

    if out is None:
        raise typer.BadParameter("--runs needs --out")
    try:
        text = runs.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot read the table {runs}: {error}") from error
    table, said = predict_table(text, find_chip(chip) if chip else None)
    write_whole(out, table)
    console().print(f"{said}: {out}", highlight=False, markup=False, soft_wrap=True)
