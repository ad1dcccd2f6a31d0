"""`zili quickstart`: from text to a trained, evaluated, talking model."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zili import api
from zili.cli.ending import INTERRUPTED
from zili.cli.options import OnError, OnErrorOption, Overrides, TextField, finite, program
from zili.cli.output import print_next, print_opened
from zili.runs.quickstart import Quickstart

if TYPE_CHECKING:
    from zili.data.prepare import Progress as Tell
    from zili.evaluation.conclusion import Conclusion

_STAGES = {"read": "reading text", "tokenizer": "training the tokenizer", "encode": "encoding"}


def quickstart(
    more: Annotated[
        list[Path] | None, typer.Argument(help="More files or folders of text.", metavar="[PATH]...")
    ] = None,
    *,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Files or folders to learn from; the running Python's standard library if not given."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/quickstart"),
    minutes: Annotated[
        float, typer.Option(help="Time for everything, from text to report.", min=0.5, callback=finite)
    ] = 5.0,
    text_field: TextField = "text",
    on_error: OnErrorOption = OnError.RAISE,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an earlier run in the folder.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train, evaluate and sample a small TeleChat2-shaped model, in minutes, on this machine."""
    text = [*(text or []), *(more or [])]
    console, started = Console(), time.perf_counter()
    asked = Quickstart(folder, minutes, overrides or (), restart)
    asked.refuse_early()
    with _reading(console) as progress:
        said = asked.prepare(text, text_field, on_error.value, progress)
    for line in said:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    recipe, length, paced = asked.recipe()

    opened = api.setup(recipe)  # it sets the chip's environment, before what comes next imports torch
    from zili.evaluation.conclusion import compress, conclude

    choices = (*opened.choices, *length)
    print_opened(choices, opened.loader.report, console)
    # Before training, which gets the time that is left: how long it takes has nothing to do with a step.
    with console.status("compressing the held-out text, to compare with"):
        compressors = compress(recipe, opened.tokenizer)
    trainer = api.train(opened, callbacks=[asked.pacer(opened, started)] if paced else ())
    if trainer.interrupted:
        _tell_how_to_go_on(trainer.step, _command(text, folder, text_field, on_error), console)
    with console.status("drawing samples"):
        seconds = time.perf_counter() - started
        end = conclude(recipe, opened.tokenizer, opened.setup.device, choices, compressors, seconds)
    _show(end, recipe.folder, console)


@contextmanager
def _reading(console: Console) -> Iterator[Tell]:
    """A bar while text is read and encoded; gives what to tell it by."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading text", total=None, done="")

        def show(stage: str, done: int, total: int | None) -> None:
            shown = f"{done / 1e6:.1f} MB"
            progress.update(task, description=_STAGES[stage], completed=done, total=total, done=shown)

        yield show


def _tell_how_to_go_on(step: int, command: str, console: Console) -> None:
    from zili.training.interruption import ignore_repeats

    ignore_repeats()
    console.print(f"Stopped at step {step}; the checkpoint is written. Go on with the same command:")
    console.print(f"  {command}", highlight=False, soft_wrap=True)
    raise typer.Exit(INTERRUPTED)


def _command(text: list[Path], folder: Path, text_field: str, on_error: OnError) -> str:
    """The command line that goes on; overrides are in the run's recipe already."""
    words = [*program().split(), "quickstart"]
    for path in text:
        words += ["--text", str(path)]
    if folder != Path("runs/quickstart"):
        words += ["--folder", str(folder)]
    if text_field != "text":
        words += ["--text-field", text_field]
    if on_error is not OnError.RAISE:
        words += ["--on-error", on_error.value]
    return shlex.join(words)


def _show(end: Conclusion, folder: Path, console: Console) -> None:
    """What came of it, and what comes next."""
    console.print("\nbits per byte of {documents} held-out documents, {bytes:,} bytes:".format(**end.evaluation))
    rows = [("this model", end.evaluation["bits_per_byte"]), *((r.name, r.bits_per_byte) for r in end.compressors)]
    for name, value in rows:
        console.print(f"  {name:<26} {value:.3f}", highlight=False)
    for number, sample in enumerate(end.samples, 1):
        console.rule(f"sample {number}: the prompt in bold, then the model", align="left")
        console.print(f"[bold]{_plain(sample.prompt)}[/bold]{_plain(sample.text)}", highlight=False)
    console.print(f"\nreport: {end.report}\n\nnext:", highlight=False)
    print_next(folder, console)


def _plain(text: str) -> str:
    """Model output for the terminal: no control characters, no markup."""
    from rich.markup import escape

    from zili.serving.generate.text_stream import visible

    return escape(visible(text))
