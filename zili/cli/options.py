"""Options that several commands take, and how a command names itself."""

from __future__ import annotations

import os
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class OnError(StrEnum):
    """`--on-error`, as `read_documents` takes it."""

    RAISE = "raise"
    SKIP = "skip"


OnErrorOption = Annotated[
    OnError, typer.Option(help="What to do with text that cannot be read; skipped text is counted.")
]
TextField = Annotated[str, typer.Option(help="Field or column that holds the text, in JSON lines and Parquet.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="table.key=value, over the recipe; may be given often.")
]


def program() -> str:
    """What to type to run this program again: its name, or its path where the shell would not find it."""
    if shutil.which("zili"):
        return "zili"
    own = Path(sys.argv[0])
    return os.path.relpath(own) if own.name == "zili" else f"{os.path.relpath(sys.executable)} -m zili"
