"""`zili quickstart`: from text to a trained, evaluated, talking model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
import tomllib
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zili.cli.launch import RECIPE_FILE, Launch, prepare_launch, print_choices, run, write_whole
from zili.cli.train import INTERRUPTED, Overrides
from zili.config import Choice, RunConfig, build_config, load_recipe

if TYPE_CHECKING:
    from zili.data.prepare import Prepared
    from zili.training.trainer import Trainer

_SECONDS_AFTER_TRAINING = 30
"""Kept for evaluation, compressors, samples and the report."""
_EVALUATION_BYTES = 500_000
_PROMPT_CHARACTERS = 60
_SAMPLES = 3


class OnError(StrEnum):
    """`--on-error`, as `read_documents` takes it."""

    RAISE = "raise"
    SKIP = "skip"


def quickstart(
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Files or folders to learn from; the running Python's standard library if not given."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(help="Time for everything, from text to report.", min=0.5)] = 5.0,
    text_field: Annotated[
        str, typer.Option(help="Field or column that holds the text, in JSON lines and Parquet.")
    ] = "text",
    on_error: Annotated[
        OnError, typer.Option(help="What to do with text that cannot be read; skipped text is counted.")
    ] = OnError.RAISE,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an earlier run in the folder.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train, evaluate and sample a small TeleChat2-shaped model, in minutes, on this machine."""
    console, started = Console(), time.perf_counter()
    if restart:
        _drop(folder)
    prepared = _prepare(text, folder, text_field, on_error, console)
    deadline = started + 60 * minutes - _SECONDS_AFTER_TRAINING
    launch, pace = _launch(prepared, folder, overrides or [], deadline, console)
    print_choices((*launch.choices, *pace), console)
    trainer = run(launch, console)
    if trainer.interrupted:
        console.print(f"Stopped at step {trainer.step}; the checkpoint is written. Go on with the same command:")
        console.print(f"  {_command(text, folder)}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    _conclude(launch, prepared, trainer, (*launch.choices, *pace), time.perf_counter() - started, console)


def _command(text: list[Path] | None, folder: Path) -> str:
    words = ["zili", "quickstart"]
    for path in text or []:
        words += ["--text", str(path)]
    if folder != Path("runs/quickstart"):
        words += ["--folder", str(folder)]
    return shlex.join(words)


def _drop(folder: Path) -> None:
    """Remove what a run leaves, and nothing else that may lie in the folder."""
    for name in ("checkpoints", "data", "tokenizer", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (RECIPE_FILE, "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _prepare(text: list[Path] | None, folder: Path, text_field: str, on_error: OnError, console: Console) -> Prepared:
    from zili.data.prepare import prepare

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading text", total=None, done="")

        def show(stage: str, done: int, total: int | None) -> None:
            names = {"read": "reading text", "tokenizer": "training the tokenizer", "encode": "encoding"}
            progress.update(task, description=names[stage], completed=done, total=total, done=f"{done / 1e6:.1f} MB")

        prepared = prepare(text or None, folder / "data", text_field=text_field, on_error=on_error.value, progress=show)
    for line in prepared.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return prepared


def _launch(
    prepared: Prepared, folder: Path, overrides: list[str], deadline: float, console: Console
) -> tuple[Launch, tuple[Choice, ...]]:
    """The run begun earlier in this folder, or a new one of as many steps as fit before the deadline."""
    if (folder / RECIPE_FILE).exists():
        return prepare_launch(load_recipe(folder / RECIPE_FILE, overrides)), ()
    table = _recipe_table(prepared, folder)
    asked_steps = any(override.split("=")[0].strip() == "training.steps" for override in overrides)
    if asked_steps:
        return prepare_launch(build_config(table, overrides, origin="quickstart")), ()
    table["training"]["steps"] = 1000  # any number will do: the steps timed below are thrown away
    launch = prepare_launch(build_config(table, overrides, origin="quickstart"))
    with console.status("compiling and timing a few steps"):
        from zili.training.pacing import seconds_per_step

        seconds = seconds_per_step(launch.setup.config, launch.loader, launch.setup.device)
    table["training"]["steps"] = _steps_that_fit(launch.recipe, seconds, deadline - time.perf_counter())
    choice = Choice(
        "training.steps", str(table["training"]["steps"]), f"what fits at {seconds:.2f} s a step (--minutes)"
    )
    return prepare_launch(build_config(table, overrides, origin="quickstart")), (choice,)


def _recipe_table(prepared: Prepared, folder: Path) -> dict[str, Any]:
    table = tomllib.loads((resources.files("zili.config") / "quickstart.toml").read_text(encoding="utf-8"))
    data = prepared.folder
    table["folder"] = str(folder)
    table["data"] = {
        "sources": [{"store": str(data / "train")}],
        "tokenizer": str(data / "tokenizer"),
        "held_out": str(data / "held_out"),
    }
    return table


def _steps_that_fit(recipe: RunConfig, seconds: float, left: float) -> int:
    """Steps in the seconds left, the evaluations on the way (a forward pass is a third of a step) paid for."""
    evaluated_tokens = recipe.evaluation.max_bytes / 3  # at about three bytes a token
    step_tokens = recipe.training.global_batch * recipe.training.sequence_length
    evaluation = seconds * evaluated_tokens / step_tokens / 2
    each = seconds + (evaluation / recipe.evaluation.every if recipe.evaluation.every else 0.0)
    return max(2 * recipe.schedule.warmup_steps, int(left * 0.95 / each))


def _conclude(
    launch: Launch,
    prepared: Prepared,
    trainer: Trainer,
    choices: tuple[Choice, ...],
    seconds: float,
    console: Console,
) -> None:
    """Evaluate on all held-out text, set the compressors beside it, sample, and write the report."""
    from zili.data.reading import read_documents
    from zili.evaluation.bits_per_byte import bits_per_byte, limit_bytes
    from zili.evaluation.compressors import reference_compressors
    from zili.evaluation.report import next_commands, write_report
    from zili.models.arithmetic import count_parameters
    from zili.training.callbacks import MetricsLog

    folder, length = launch.recipe.folder, launch.recipe.training.sequence_length
    texts = [document.text for document in read_documents([prepared.held_out_text])]
    with console.status("evaluating on held-out text"), trainer.uncompiled():
        score = bits_per_byte(
            trainer.model,
            launch.tokenizer,
            texts,
            sequence_length=length,
            batch_size=16,
            max_bytes=_EVALUATION_BYTES,
        )
        references = reference_compressors(limit_bytes(texts, _EVALUATION_BYTES))
    MetricsLog(folder).write("eval", step=trainer.step, tokens_trained=trainer.tokens, **score.as_json())
    console.print(f"\nheld-out text, {score.documents} documents, {score.bytes:,} bytes; bits per byte:")
    for name, value in [("this model", score.bits_per_byte), *((r.name, r.bits_per_byte) for r in references)]:
        console.print(f"  {name:<24} {value:.3f}", highlight=False)
    _sample(launch, trainer, texts, console)
    summary = {
        "model": {"parameters": count_parameters(launch.recipe.model).total},
        "data": {"lines": prepared.lines},
        "timing": {"seconds": seconds},
        "machine": {"name": launch.setup.device.name(), "cores": os.cpu_count()},
        "compressors": [reference.as_json() for reference in references],
        "choices": [choice._asdict() for choice in choices],
    }
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    report = write_report(folder)
    console.print(f"\nreport: {report}\n\nnext:", highlight=False)
    for command in next_commands(folder):
        console.print(f"  {command.line:<46} # {command.purpose}", highlight=False, markup=False, soft_wrap=True)


def _sample(launch: Launch, trainer: Trainer, texts: list[str], console: Console) -> None:
    """Continue the beginnings of a few held-out documents."""
    from zili.serving.continuation import sample_text
    from zili.serving.generation import Sampling
    from zili.serving.model_folder import open_folder

    model = open_folder(launch.recipe.folder).model  # as saved, so what is shown is what the next commands use
    lines = []
    for seed, text in enumerate([text for text in texts if len(text) > 2 * _PROMPT_CHARACTERS][:_SAMPLES]):
        prompt = text[:_PROMPT_CHARACTERS]
        sampling = Sampling(temperature=0.8, seed=seed)
        drawn = sample_text(model, launch.tokenizer, prompt, max_new_tokens=120, sampling=sampling)
        lines.append(json.dumps({"step": trainer.step, **drawn.as_json()}, ensure_ascii=False) + "\n")
        console.rule(f"sample {seed + 1}", align="left")
        console.print(f"[bold]{_plain(prompt)}[/bold]{_plain(drawn.text)}", highlight=False)
    write_whole(launch.recipe.folder / "samples.jsonl", "".join(lines))


def _plain(text: str) -> str:
    """Model output for the terminal: no control characters, no markup."""
    from rich.markup import escape

    from zili.serving.text_stream import visible

    return escape(visible(text))
