"""`zili quickstart`: from text to a trained, evaluated, talking model."""

from __future__ import annotations

import math
import shlex
import shutil
import time
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zili import chips
from zili.cli.launch import RECIPE_FILE, Launch, prepare_launch, print_choices, print_next, run
from zili.cli.options import OnError, OnErrorOption, Overrides, TextField, program
from zili.cli.train import INTERRUPTED
from zili.config import Choice, RunConfig, build_config, load_recipe
from zili.errors import ConfigError
from zili.parallel.layout import processes

_SECONDS_AFTER_TRAINING = 20
"""Kept for compressors, samples and the report."""
_EVALUATIONS = 3
"""Times the held-out text is scored, the last at the end."""
_DATA = "data"
_ANY_STEPS = 1000
"""Until the steps that fit are known."""


def quickstart(
    more: Annotated[list[Path] | None, typer.Argument(help="Further text.", metavar="[PATH]...")] = None,
    *,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Files or folders to learn from; the running Python's standard library if not given."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(help="Time for everything, from text to report.", min=0.5)] = 5.0,
    text_field: TextField = "text",
    on_error: OnErrorOption = OnError.RAISE,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an earlier run in the folder.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train, evaluate and sample a small TeleChat2-shaped model, in minutes, on this machine."""
    text = [*(text or []), *(more or [])]
    console, started = Console(), time.perf_counter()
    _refuse_early(folder, restart, overrides or [])
    if restart and folder.exists():
        # The new text first: what cannot be read must not cost the earlier run.
        _prepare(text, folder / f"{_DATA}.new", text_field, on_error, console, rebuild=True)
        _drop(folder)
        (folder / f"{_DATA}.new").rename(folder / _DATA)
    # A run that has begun goes on with its own text or not at all.
    begun = (folder / "checkpoints").exists()
    _prepare(text, folder / _DATA, text_field, on_error, console, rebuild=not begun)
    deadline = started + 60 * minutes - _SECONDS_AFTER_TRAINING
    launch, pace = _launch(folder, overrides or [], deadline, console)
    print_choices((*launch.choices, *pace), console)
    trainer = run(launch, console)
    if trainer.interrupted:
        console.print(f"Stopped at step {trainer.step}; the checkpoint is written. Go on with the same command:")
        console.print(f"  {_command(text, folder, text_field, on_error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    _conclude(launch, (*launch.choices, *pace), time.perf_counter() - started, console)


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


def _refuse_early(folder: Path, restart: bool, overrides: list[str]) -> None:
    """A mistyped override or an unknown chip, before minutes of reading text and before an earlier run is dropped.

    And more than one process: each would prepare the text in the same folder at the same time.
    """
    if processes()[1] > 1:
        raise ConfigError(
            "zili quickstart runs as one process; go on with several: torchrun ... -m zili train RUN/recipe.toml"
        )
    earlier = folder / RECIPE_FILE
    if earlier.exists() and not restart:
        recipe = load_recipe(earlier, overrides)
    else:
        recipe = _new_recipe(folder, _ANY_STEPS, overrides)
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


def _launch(folder: Path, overrides: list[str], deadline: float, console: Console) -> tuple[Launch, tuple[Choice, ...]]:
    """The run begun earlier in this folder, or a new one of as many steps as fit before the deadline."""
    if (folder / RECIPE_FILE).exists():
        launch = prepare_launch(load_recipe(folder / RECIPE_FILE, overrides))
        own = str(launch.recipe.training.steps)
        return launch, (Choice("training.steps", own, "the run's own; --minutes counts for a new run"),)
    launch = prepare_launch(_new_recipe(folder, _ANY_STEPS, overrides))
    if any(override.split("=")[0].strip() == "training.steps" for override in overrides):
        return launch, ()
    with console.status("compiling and timing a few steps"):
        from zili.training.pacing import seconds_per_step

        seconds = seconds_per_step(launch.setup.config, launch.loader, launch.setup.device)
    steps = _steps_that_fit(launch.recipe, seconds, deadline - time.perf_counter())
    choice = Choice("training.steps", str(steps), f"what fits at {seconds:.2f} s a step (--minutes)")
    return launch.with_recipe(_new_recipe(folder, steps, overrides)), (choice,)


def _new_recipe(folder: Path, steps: int, overrides: list[str]) -> RunConfig:
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


def _steps_that_fit(recipe: RunConfig, seconds: float, left: float) -> int:
    """Steps in the seconds left, the evaluations paid for: a forward pass, run eagerly, is about half a step."""
    evaluated_tokens = 2 * recipe.evaluation.max_bytes / 3  # about three bytes a token; windows overlap by half
    step_tokens = recipe.training.global_batch * recipe.training.sequence_length
    evaluations = _EVALUATIONS * seconds * evaluated_tokens / step_tokens / 2
    return max(1, 2 * recipe.schedule.warmup_steps, int((left - evaluations) * 0.95 / seconds))


def _conclude(launch: Launch, choices: tuple[Choice, ...], seconds: float, console: Console) -> None:
    """Compare, sample, report, and say what comes next."""
    from zili.evaluation.conclusion import conclude

    with console.status("comparing with compressors, drawing samples"):
        end = conclude(launch.recipe, launch.tokenizer, launch.setup.device, choices, seconds)
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

    from zili.serving.text_stream import visible

    return escape(visible(text))
