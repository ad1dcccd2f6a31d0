"""A command of your own: `zili tokens PATH TEXT` says how many tokens a model's tokenizer makes of a text."""

from pathlib import Path
from typing import Annotated

import typer

from zili.cli.options import model_at


def tokens(
    path: Annotated[Path, typer.Argument(help="Run, checkpoint or model folder.", metavar="PATH")],
    text: Annotated[str, typer.Argument(help="The text.", metavar="TEXT")],
) -> None:
    """Count the tokens of a text."""
    model_at(path)  # an error that says what is there, before anything slow is imported
    from zili.serving.model_folder import find_tokenizer

    tokenizer, _ = find_tokenizer(path)
    typer.echo(f"{len(tokenizer.encode(text)):,} tokens")
