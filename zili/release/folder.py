"""The small files that travel with a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from zili.data.pointers import what_it_is
from zili.errors import CheckpointError

_COMPANIONS = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    # config.json's auto_map names these; without them a Hugging Face folder with custom code does not load.
    "configuration_*.py",
    "modeling_*.py",
    "generation_utils.py",
)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template, generation settings and custom code across; returns the names."""
    files = sorted({file for pattern in _COMPANIONS for file in source.glob(pattern) if file.is_file()})
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(what_it_is(path, f"{path} is not valid JSON ({error}); fetch it again")) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, an object is needed")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented, UTF-8, newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
