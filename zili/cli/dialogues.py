"""`zili dialogues`: files of conversations to token stores that `zili train` fine-tunes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zili.cli.options import OnError, OnErrorOption, finite, model_at, present
from zili.errors import DataError


def dialogues(
    files: Annotated[
        list[Path], typer.Argument(help="JSON lines, JSON or Parquet of conversations; folders are searched.")
    ],
    *,
    model: Annotated[Path, typer.Option(help="Model, run or tokenizer folder that the data is for.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to make: train, held_out, tokenizer.")],
    template: Annotated[
        str | None, typer.Option(help="Chat template in place of the model's own: a name, or a file.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of conversations held out for evaluation.", min=0, max=0.5, callback=finite)
    ] = 0.0,
    on_error: OnErrorOption = OnError.RAISE,
) -> None:
    """Render conversations for a model, with a mask of what the assistant says: the data of fine-tuning.

    Known forms: messages (OpenAI), conversations (ShareGPT), dialog (TeleChat2), instruction with output (Alpaca),
    query with response, prompt with completion (TRL); and pairs, chosen with rejected.
    """
    present(files)
    model_at(model)
    from zili.data.dialect import find_dialect
    from zili.data.dialogue_store import split_and_build
    from zili.release.companions import chat_template_of
    from zili.serving.model_folder import find_tokenizer

    tokenizer, place = find_tokenizer(model)
    dialect = find_dialect(tokenizer, chat_template_of(place), template)
    if dialect is None:
        raise DataError(f"{model} has no chat template, nor special tokens of one that is known; give --template")
    for report in split_and_build(files, dialect, to, held_out=held_out, on_error=on_error.value):
        typer.echo(report)
    typer.echo(f'data.sources = [{{ store = "{to}/train" }}], data.tokenizer = "{to}/tokenizer"')
