"""The command table, and how errors reach the user."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import zili
from zili.chips import registry
from zili.cli import (
    align,
    chat,
    chips,
    config,
    dialogues,
    doctor,
    eval,
    import_export,
    plan,
    quickstart,
    rehearse,
    report,
    sample,
    serve,
    train,
)
from zili.cli.ending import end_by, leave_the_others, leave_word, place, stay_behind
from zili.config.explaining import key_of_option

_UsageError: Any = typer.BadParameter.__base__
"""click's, which typer brings along under a name of its own."""


def _lead_on(error: Any) -> None:
    """Say of an unknown option which key of the recipe it is here."""
    option, command = getattr(error, "option_name", None), getattr(error.ctx, "command", None)
    if option is not None and any("--set" in parameter.opts for parameter in getattr(command, "params", ())):
        hint = key_of_option(option)
        error.message += f". Keys of a recipe are set by --set KEY=VALUE; {hint}" if hint else ""


class _Commands(TyperGroup):
    """The commands; typer would end an interrupted one without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if place()[0] == 0:
                print("zili: interrupted; run the same command again to go on", file=sys.stderr)
            raise typer.Exit(train.INTERRUPTED) from None
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
    "7 layout, 8 training diverged, 9 and 10 what doctor and align found, 11 another process of the run is gone, 130 "
    "interrupted, or out of time (a run that had begun wrote a checkpoint).",
)
_GROUPS: dict[str, dict[str, Any]] = {
    "Begin here": {"quickstart": quickstart.quickstart},
    "Train": {"train": train.train, "dialogues": dialogues.dialogues, "report": report.report},
    "Use a model": {"sample": sample.sample, "chat": chat.chat, "serve": serve.serve, "eval": eval.eval_},
    "Models in, releases out": {
        "import": import_export.import_,
        "export": import_export.export,
        "verify": import_export.verify,
    },
    "Before the cluster": {"plan": plan.plan, "rehearse": rehearse.rehearse},
    "Chips": {"chips": chips.chips, "doctor": doctor.doctor, "align": align.align},
}
for _group, _commands in _GROUPS.items():
    for _name, _command in _commands.items():
        app.command(name=_name, rich_help_panel=_group)(_command)
app.add_typer(config.app, name="config", rich_help_panel="Train")


def _tell_version(wanted: bool) -> None:
    if wanted:
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
) -> None:
    """Train, check, release and serve TeleChat-class language models on whatever chips you can get.

    First: `zili quickstart` trains a small model in minutes; `zili COMMAND --help` has the options of each command.
    """


def main() -> None:
    """Run the command line; an error the user can cure is one message on standard error and its exit code."""
    try:
        app()
    except SystemExit as end:
        if end.code == train.INTERRUPTED:
            leave_word("interrupted; a run that had begun wrote a checkpoint", train.INTERRUPTED)
        raise
    except Exception as error:
        end_by(error)
    finally:
        leave_the_others()
