"""The command table, and how errors reach the user."""

from __future__ import annotations

import logging
import platform
import sys
from contextlib import suppress
from enum import StrEnum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import zili
from zili.cli.ending import INTERRUPTED, end_by, leave_the_others, leave_word, place, stay_behind


class LogLevel(StrEnum):
    """Levels of the standard library's `logging`."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


_UsageError: Any = typer.BadParameter.__base__
"""click's, which typer brings along under a name of its own."""


def _lead_on(error: Any) -> None:
    """Say of an unknown option which key of the recipe it is here."""
    option, called = getattr(error, "option_name", None), getattr(error.ctx, "command", None)
    if option is not None and any("--set" in parameter.opts for parameter in getattr(called, "params", ())):
        from zili.config.explaining import key_of_option

        hint = key_of_option(option)
        error.message += f". Keys of a recipe are set by --set KEY=VALUE; {hint}" if hint else ""


class _Commands(TyperGroup):
    """The commands; typer would import all of them at once, and end an interrupted one without a word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and command(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if place()[0] == 0:
                print("zili: interrupted; run the same command again to go on", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except _UsageError as error:
            _lead_on(error)
            first = place()[2] == 0
            if not first:
                stay_behind()
            leave_word(f"zili: {error.format_message()}", error.exit_code)
            if first:
                raise
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 a defect of ours, 2 wrong usage, 3 configuration, 4 data, 5 checkpoint, 6 chip, "
    "7 layout, 8 training diverged, 9 and 10 what doctor and align found, 11 another process of the run is gone, "
    "12 no progress, 13 other bits than there should be, "
    "14 what drill found, 130 interrupted, or out of time (a run that had begun wrote a checkpoint).",
)
_GROUPS = {
    "Begin here": {
        "quickstart": (
            "quickstart:quickstart",
            "Train, evaluate and sample a small model in minutes.",
        ),
    },
    "Train": {
        "train": ("train:train", "Train a recipe, or go on from its newest checkpoint."),
        "launch": ("launch:app", "Train on several processes or machines, and begin anew what breaks."),
        "drill": ("drill:drill", "Break a run on purpose, by a seeded schedule, and see it go on."),
        "dialogues": ("dialogues:dialogues", "Make the data of fine-tuning from conversations."),
        "top": ("top:top", "Watch a run in the terminal: step, loss, where the time goes, what happened last."),
        "report": ("report:report", "Write a run's report.html, or compare several runs."),
        "config": ("config:app", "Show what a recipe means, list presets."),
    },
    "Use a model": {
        "sample": ("sample:sample", "Continue a prompt."),
        "chat": ("chat:chat", "Talk with a model in the terminal."),
        "serve": ("serve:serve", "Answer over HTTP as OpenAI's API does."),
        "eval": ("eval:eval_", "Measure bits per byte, answers, or tasks of lm-eval."),
    },
    "Models in, releases out": {
        "import": ("import_export:import_", "Read a published model into a Zili model folder."),
        "export": ("import_export:export", "Write a model as a release that vLLM, transformers or llama.cpp run."),
        "verify": ("import_export:verify", "Check a release's files, and what its model says."),
    },
    "Before the cluster": {
        "plan": ("plan:plan", "Search the layouts of a model on chips, and predict what the best takes."),
        "rehearse": ("rehearse:rehearse", "Run a step as one of many processes, without them and without memory."),
    },
    "Chips": {
        "chips": ("chips:chips", "List the chips that are here, and those that are known."),
        "doctor": ("doctor:doctor", "Examine a chip: what computes rightly, and how fast."),
        "align": ("align:align", "Find the first operation of a training step that is wrong on a chip."),
    },
}
"""Where each command is, and what it does in a line. A command is imported when it is called: all of them take half a
second, and whoever asks for help waits for none."""


def _unloaded() -> None:
    """What stands for a command until it is called."""


for _group, _commands in _GROUPS.items():
    for _name, (_, _help) in _commands.items():
        app.command(name=_name, rich_help_panel=_group, help=_help)(_unloaded)


def command(name: str) -> Any:
    """The command `zili NAME`, or the group of that name."""
    place, _ = next(commands[name] for commands in _GROUPS.values() if name in commands)
    module, _, member = place.partition(":")
    found = getattr(import_module(f"zili.cli.{module}"), member)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(name=name)(found)
        found = alone
    return get_command(found)


def _tell_version(wanted: bool) -> None:
    if wanted:
        from zili.chips import registry

        versions = [f"zili {zili.__version__}", f"Python {platform.python_version()}"]
        for package in ("torch", *(backend.plugin for backend in registry().backends if backend.plugin)):
            with suppress(PackageNotFoundError):
                versions.append(f"{package} {version(package)}")
        typer.echo(", ".join(versions))
        raise typer.Exit


@app.callback()
def _every_command(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Say which versions these are.")
    ] = False,
    log_level: Annotated[
        LogLevel, typer.Option(help="How much of Zili's own log to write to standard error.")
    ] = LogLevel.WARNING,
) -> None:
    """Train, check, release and serve TeleChat-class language models on whatever chips you can get.

    First: `zili quickstart` trains a small model in minutes; `zili COMMAND --help` has the options of each command.
    """
    _write_log(log_level)


def _write_log(level: LogLevel) -> None:
    """Zili's log goes to standard error. Its names are those of the modules, `zili.training.saving`."""
    log, told = logging.getLogger("zili"), logging.StreamHandler()
    plain = level in (LogLevel.WARNING, LogLevel.ERROR)
    told.setFormatter(logging.Formatter("%(message)s" if plain else "%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.setLevel(level.upper())
    log.handlers, log.propagate = [told], False


def main() -> None:
    """Run the command line; an error the user can cure is one message on standard error and its exit code."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            leave_word("interrupted; a run that had begun wrote a checkpoint", INTERRUPTED)
        raise
    except Exception as error:
        end_by(error)
    finally:
        leave_the_others()
