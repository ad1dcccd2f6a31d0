"""Files that a release has beside its weights: tokenizer, template, code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from zili.data.chat import ChatTemplate
from zili.data.tokenizer import Tokenizer, end_ids_in, has_tokenizer
from zili.release.folder import copy_companions, read_json, write_json
from zili.release.gguf.file import find_gguf, open_gguf
from zili.release.gguf.tokenizer import read_tokenizer
from zili.release.trust import REMOTE_CODE, foreign_code

_MODELSCOPE = {"framework": "pytorch", "task": "text-generation"}


def tokenizer_of(place: Path) -> Tokenizer | None:
    """The tokenizer of a folder or a GGUF file, if it has one.

    Raises:
        DataError, CheckpointError: it has one that cannot be read.
    """
    if place.is_dir() and has_tokenizer(place):
        return Tokenizer.from_folder(place, also_ends=_ends_of_origin(place))
    file = find_gguf(place)
    found = None if file is None else read_tokenizer(open_gguf(file)[2], file)
    if found is None:
        return None
    definition, config, generation = found
    return Tokenizer(
        definition,
        end_token=config.get("eos_token"),
        name=str(file),
        roles={role: config.get(role) for role in ("bos_token", "unk_token", "pad_token")},
        end_ids=end_ids_in(generation),
    )


def _ends_of_origin(place: Path) -> set[int]:
    """What the config.json of an imported model named, which its model.json keeps."""
    file = place / "model.json"
    source = read_json(file).get("source") if file.is_file() else None
    config = source.get("config") if isinstance(source, dict) else None
    return end_ids_in(config) if isinstance(config, dict) else set()


def bring(place: Path, folder: Path) -> None:
    """Copy into `folder` what belongs to the model of a folder or a GGUF file: tokenizer, templates, settings, code.

    The tokenizer is there as tokenizer.json afterwards, whatever it was.
    """
    if place.is_dir():
        copy_companions(place, folder)
        if has_tokenizer(folder) and not (folder / "tokenizer.json").is_file():
            (folder / "tokenizer.json").write_text(Tokenizer.from_folder(folder).definition, encoding="utf-8")
            _say_fast(folder / "tokenizer_config.json")
    file = find_gguf(place)
    found = None if file is None or has_tokenizer(folder) else read_tokenizer(open_gguf(file)[2], file)
    if found is not None:
        definition, config, generation = found
        (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
        write_json(folder / "tokenizer_config.json", config)
        if generation and not (folder / "generation_config.json").is_file():
            write_json(folder / "generation_config.json", generation)


def _say_fast(config: Path) -> None:
    """A tokenizer.json that was made here is what AutoTokenizer shall read, not code for the file it was made of."""
    if config.is_file():
        values = {key: value for key, value in read_json(config).items() if key != "auto_map"}
        write_json(config, {**values, "tokenizer_class": "PreTrainedTokenizerFast"})


def chat_template_of(place: Path) -> ChatTemplate | None:
    """The chat template of a folder or a GGUF file, if it has one."""
    if place.is_dir() and (found := ChatTemplate.of_folder(place)):
        return found
    file = find_gguf(place)
    field = None if file is None else open_gguf(file)[2].get_field("tokenizer.chat_template")
    return None if field is None else ChatTemplate(field.contents(), str(file))


def complete(folder: Path, tokenizer: Tokenizer | None, *, own_config: bool) -> None:
    """Add to a folder with weights, config.json and what came along what is missing of a release.

    `own_config`: config.json was written here. Then it gets the tokenizer's ids, and the code that its auto_map names
    is ours; a tokenizer that needs code of its own is left to its tokenizer.json alone.
    """
    config = read_json(folder / "config.json")
    if own_config:
        write_json(folder / "config.json", {**config, **_special_ids(tokenizer)})
        for pattern in ("configuration_*.py", "modeling_*.py", "generation_utils.py"):
            for foreign in folder.glob(pattern):
                foreign.unlink()  # of the layout that it came in
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
    """Whether whatever transformers would run of a folder is of `REMOTE_CODE`, byte for byte."""
    return not foreign_code(folder)


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    bos, pad = (tokenizer.roles.get(role) for role in ("bos_token", "pad_token"))
    ends = [tokenizer.end_id, *sorted(tokenizer.end_ids - {tokenizer.end_id})]
    special = tokenizer.special_tokens
    named = {
        "bos_token_id": tokenizer.token_id(bos) if bos else special.get("<s>"),
        "eos_token_id": ends if len(ends) > 1 else tokenizer.end_id,
        "pad_token_id": tokenizer.token_id(pad) if pad else special.get("<pad>"),
    }
    return {key: value for key, value in named.items() if value is not None}


def _complete_tokenizer(folder: Path, tokenizer: Tokenizer, *, rewrite: bool) -> None:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        tokenizer.save(folder)
        return
    if rewrite and "auto_map" in read_json(path):
        for file in folder.glob("tokenization_*.py"):
            file.unlink()
        _say_fast(path)
