"""The command table, and how errors reach the user."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

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
from zili.errors import ZiliError
from zili.parallel.layout import processes


class _Commands(TyperGroup):
    """The commands; typer would end an interrupted one without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("zili: interrupted; run the same command again to go on", file=sys.stderr)
            raise typer.Exit(train.INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, check, release and serve TeleChat-class language models on whatever chips you can get.",
    epilog="Exit codes: 0 done, 1 a defect of ours, 2 wrong usage, 3 configuration, 4 data, 5 checkpoint, 6 chip, "
    "7 layout, 8 training diverged, 9 and 10 what doctor and align found, 130 interrupted (a run that had begun wrote "
    "a checkpoint).",
)
app.command()(quickstart.quickstart)
app.command()(train.train)
app.command()(dialogues.dialogues)
app.command()(plan.plan)
app.command()(rehearse.rehearse)
app.command(name="eval")(eval.eval_)
app.command()(sample.sample)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(report.report)
app.command(name="import")(import_export.import_)
app.command()(import_export.export)
app.command()(import_export.verify)
app.command()(chips.chips)
app.command()(doctor.doctor)
app.command()(align.align)
app.add_typer(config.app, name="config")


def main() -> None:
    """Run the command line; an error the user can cure is one message on standard error and its exit code."""
    try:
        app()
    except ZiliError as error:
        if _is_heard(error):
            print(f"zili: {_who()}{error}", file=sys.stderr)
        _end(error.exit_code, agreed=error.agreed)
    except Exception:
        traceback.print_exc()
        _end(ZiliError.exit_code)
    finally:
        if _joined():
            from zili.parallel.world import leave

            leave()


def _end(code: int, agreed: bool = False) -> NoReturn:
    """End this process; one among others without tidying up."""
    if not _joined():
        sys.exit(code)
    from zili.parallel.world import await_the_others

    if agreed:
        await_the_others()
    sys.stdout.flush()
    sys.stderr.flush()
    # The traceback holds what uses the process group, and a group that is taken apart under it sometimes ends the
    # process with a signal instead of this code, or waits for processes that are gone.
    os._exit(code)


def _joined() -> bool:
    """Whether this process has others beside it."""
    return _place()[1] > 1 and "zili.parallel.world" in sys.modules


def _place() -> tuple[int, int, int]:
    """`processes()`; where torchrun's variables are no numbers, which is then the error, this process speaks."""
    try:
        return processes()
    except ZiliError:
        return 0, 1, 0


def _is_heard(error: ZiliError) -> bool:
    """Whether this process says what all of them may have met. One that is alone with its error always does."""
    rank, _, here = _place()
    if error.agreed:
        return rank == 0
    # Before they join, the processes of a machine have read the same recipe, and the first of them says what is wrong.
    return _joined() or error.alone or here == 0


def _who() -> str:
    rank = _place()[0]
    return f"process {rank}: " if rank else ""
