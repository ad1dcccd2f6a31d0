"""What a release has beside its weights, so that others run it without asking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from zili.data.tokenizer import Tokenizer
from zili.release.folder import read_json, write_json

REMOTE_CODE = Path(__file__).with_name("remote_code")
"""Files that a folder in TeleChat2's layout brings along; others have their class in transformers."""
_MODELSCOPE = {"framework": "pytorch", "task": "text-generation"}


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, if it has one.

    Raises:
        DataError: it has one that cannot be read.
    """
    return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None


def complete(folder: Path, tokenizer: Tokenizer | None, *, own_config: bool) -> None:
    """Add to a folder with weights, config.json and what came along what is missing of a release.

    `own_config`: config.json was written here. Then it gets the tokenizer's ids, and the code that its auto_map names
    is ours; a tokenizer that needs code of its own is left to its tokenizer.json alone.
    """
    config = read_json(folder / "config.json")
    if own_config:
        write_json(folder / "config.json", {**config, **_special_ids(tokenizer)})
        for named in config.get("auto_map", {}).values():
            file = f"{named.split('.')[0]}.py"
            shutil.copyfile(REMOTE_CODE / file, folder / file)
    if tokenizer is not None:
        _complete_tokenizer(folder, tokenizer, rewrite=own_config)
    if tokenizer is not None and not (folder / "generation_config.json").is_file():
        write_json(folder / "generation_config.json", _special_ids(tokenizer))
    if not (folder / "configuration.json").is_file():
        write_json(folder / "configuration.json", dict(_MODELSCOPE))


def is_our_code(folder: Path) -> bool:
    """Whether all Python files of a folder are those of `REMOTE_CODE`, byte for byte: safe to let transformers run."""
    files = list(folder.glob("*.py"))
    return all(
        (REMOTE_CODE / file.name).is_file() and (REMOTE_CODE / file.name).read_bytes() == file.read_bytes()
        for file in files
    )


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    special = tokenizer.special_tokens
    named = {
        "bos_token_id": special.get("<_start>", special.get("<s>")),
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": special.get("<_pad>", special.get("<pad>")),
    }
    return {key: value for key, value in named.items() if value is not None}


def _complete_tokenizer(folder: Path, tokenizer: Tokenizer, *, rewrite: bool) -> None:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        tokenizer.save(folder)
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    if rewrite and "auto_map" in values:
        del values["auto_map"]
        for file in folder.glob("tokenization_*.py"):
            file.unlink()
        write_json(path, {**values, "tokenizer_class": "PreTrainedTokenizerFast"})
