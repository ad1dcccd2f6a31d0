"""`zili quickstart`: from text to a trained, evaluated, talking model."""

from __future__ import annotations

import math
import shlex
import shutil
import time
import tomllib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zili import chips
from zili.cli.launch import RECIPE_FILE, Launch, keep_length, prepare_launch, print_choices, print_next, run
from zili.cli.options import OnError, OnErrorOption, Overrides, TextField, finite, program, read_recipe
from zili.cli.train import INTERRUPTED
from zili.config import Choice, RunConfig, build_config
from zili.errors import ConfigError, LayoutError
from zili.parallel.layout import processes

if TYPE_CHECKING:
    from zili.evaluation.compressors import Reference
    from zili.training.pacing import Pacer

_SECONDS_AFTER_TRAINING = 5
"""Kept for the last checkpoint, samples and the report, beside the last evaluation, whose time is measured."""
_EVALUATIONS = 3
"""Times the held-out text is scored, the last at the end."""
_DATA = "data"
_STEPS_A_MINUTE = 200
"""Until the steps that fit are known."""


def quickstart(
    more: Annotated[list[Path] | None, typer.Argument(help="Further text.", metavar="[PATH]...")] = None,
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
    _refuse_early(folder, restart, overrides or [], minutes)
    if restart and folder.exists():
        # The new text first: what cannot be read must not cost the earlier run.
        _prepare(text, folder / f"{_DATA}.new", text_field, on_error, console, rebuild=True)
        _drop(folder)
        (folder / f"{_DATA}.new").rename(folder / _DATA)
    # A run that has begun goes on with its own text or not at all.
    begun = (folder / "checkpoints").exists()
    _prepare(text, folder / _DATA, text_field, on_error, console, rebuild=not begun)
    deadline = started + 60 * minutes - _SECONDS_AFTER_TRAINING
    recipe, length, paced = _recipe(folder, overrides or [], minutes)
    launch = prepare_launch(recipe)
    choices = (*launch.choices, *length)
    print_choices(choices, console)
    references = _compress(launch, console)
    trainer = run(launch, console, _pacer(recipe, deadline) if paced else None)
    if trainer.interrupted:
        from zili.training.interruption import ignore_repeats

        ignore_repeats()
        console.print(f"Stopped at step {trainer.step}; the checkpoint is written. Go on with the same command:")
        console.print(f"  {_command(text, folder, text_field, on_error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    _conclude(launch, choices, references, time.perf_counter() - started, console)


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


def _refuse_early(folder: Path, restart: bool, overrides: list[str], minutes: float) -> None:
    """A mistyped override, an unknown chip or torchrun, before minutes of reading text and before an earlier run is
    dropped."""
    if processes()[1] > 1:
        raise LayoutError("zili quickstart is one process: run it by itself, without torchrun; zili train takes many")
    earlier = folder / RECIPE_FILE
    if earlier.exists() and not restart:
        recipe = read_recipe(earlier, overrides)
    else:
        recipe = _new_recipe(folder, overrides, minutes)
    if recipe.folder != folder:
        raise ConfigError(f"--set folder={recipe.folder} and the run folder {folder} differ; use --folder alone")
    chips.choose(recipe.chip.name)


def _drop(folder: Path) -> None:
    """Remove what a run leaves, and nothing else that may lie in the folder."""
    for name in ("checkpoints", _DATA, "tokenizer", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (RECIPE_FILE, "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _prepare(
    text: list[Path], folder: Path, text_field: str, on_error: OnError, console: Console, *, rebuild: bool
) -> None:
    from zili.data.prepare import prepare

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading text", total=None, done="")

        def show(stage: str, done: int, total: int | None) -> None:
            names = {"read": "reading text", "tokenizer": "training the tokenizer", "encode": "encoding"}
            progress.update(task, description=names[stage], completed=done, total=total, done=f"{done / 1e6:.1f} MB")

        prepared = prepare(
            text or None,
            folder,
            text_field=text_field,
            on_error=on_error.value,
            rebuild=rebuild,
            progress=show,
        )
    for line in prepared.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _recipe(folder: Path, overrides: list[str], minutes: float) -> tuple[RunConfig, tuple[Choice, ...], bool]:
    """The run begun earlier in this folder, or a new one; why it has its length; whether that is found as it runs."""
    if (folder / RECIPE_FILE).exists():
        recipe = read_recipe(folder / RECIPE_FILE, overrides)
        own = Choice("training.steps", str(recipe.training.steps), "the run's own; --minutes counts for a new run")
        return recipe, (own,), False
    recipe = _new_recipe(folder, overrides, minutes)
    if any(override.split("=")[0].strip() == "training.steps" for override in overrides):
        return recipe, (), False
    fitting = Choice("training.steps", "as many as fit", f"--minutes {minutes:g}; found while it runs")
    return recipe, (fitting,), True


def _pacer(recipe: RunConfig, deadline: float) -> Pacer:
    from zili.training.pacing import Pacer

    return Pacer(deadline, lambda config: keep_length(recipe, config))


def _new_recipe(folder: Path, overrides: list[str], minutes: float) -> RunConfig:
    steps = math.ceil(_STEPS_A_MINUTE * minutes)
    table = tomllib.loads((resources.files("zili.config") / "quickstart.toml").read_text(encoding="utf-8"))
    data = folder / _DATA
    table["folder"] = str(folder)
    table["training"]["steps"] = steps
    table["evaluation"]["every"] = math.ceil(steps / _EVALUATIONS)
    table["data"] = {
        "sources": [{"store": str(data / "train")}],
        "tokenizer": str(data / "tokenizer"),
        "held_out": str(data / "held_out"),
    }
    return build_config(table, overrides, origin="quickstart")


def _compress(launch: Launch, console: Console) -> list[Reference]:
    """Before training, which gets the time that is left: how long they take has nothing to do with a step."""
    from zili.evaluation.conclusion import compress

    with console.status("compressing the held-out text, to compare with"):
        return compress(launch.recipe, launch.tokenizer)


def _conclude(
    launch: Launch, choices: tuple[Choice, ...], references: list[Reference], seconds: float, console: Console
) -> None:
    """Sample, report, and say what comes next."""
    from zili.evaluation.conclusion import conclude

    with console.status("drawing samples"):
        end = conclude(launch.recipe, launch.tokenizer, launch.setup.device, choices, references, seconds)
    console.print("\nbits per byte of {documents} held-out documents, {bytes:,} bytes:".format(**end.evaluation))
    rows = [("this model", end.evaluation["bits_per_byte"]), *((r.name, r.bits_per_byte) for r in end.references)]
    for name, value in rows:
        console.print(f"  {name:<26} {value:.3f}", highlight=False)
    for number, sample in enumerate(end.samples, 1):
        console.rule(f"sample {number}: the prompt in bold, then the model", align="left")
        console.print(f"[bold]{_plain(sample.prompt)}[/bold]{_plain(sample.text)}", highlight=False)
    console.print(f"\nreport: {end.report}\n\nnext:", highlight=False)
    print_next(launch.recipe.folder, console)


def _plain(text: str) -> str:
    """Model output for the terminal: no control characters, no markup."""
    from rich.markup import escape

    from zili.serving.generate.text_stream import visible

    return escape(visible(text))
