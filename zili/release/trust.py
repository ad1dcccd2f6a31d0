"""Decides whether the Python code of a folder is Zili's own, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

REMOTE_CODE = Path(__file__).with_name("remote_code")
"""Files that a folder in TeleChat2's layout brings along; others have their class in transformers."""


def foreign_code(folder: Path) -> list[str]:
    """What transformers, trusting a folder's code, would run of it that is not ours: files, and classes that its
    configurations name, which may be those of another repository."""
    ours = {file.name for file in REMOTE_CODE.glob("*.py") if _same(file, folder / file.name)}
    files = [
        str(file.relative_to(folder)) for file in folder.rglob("*.py") if file.parent != folder or file.name not in ours
    ]
    files += ["custom_generate"] if (folder / "custom_generate").is_symlink() else []
    named = {name for file in folder.glob("*config*.json") for name in _classes(_json_of(file))}
    return sorted({*files, *(name for name in named if f"{name.partition('.')[0]}.py" not in ours)})


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _json_of(file: Path) -> Any:
    try:
        return from_json(file.read_bytes())
    except (OSError, ValueError):
        return None  # nobody reads classes from it


def _classes(value: Any) -> Iterator[str]:
    """All that stands under `auto_map`, at any depth."""
    if isinstance(value, dict):
        yield from _words(value.get("auto_map"))
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _classes(inner)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _words(inner)
