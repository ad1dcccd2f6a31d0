"""Zili's own model folder: weights under Zili's names beside a `model.json`.

`model.json` holds `format` and `version`, `model` (the ModelConfig), `source` and `files` (sha256 of each weight file).
`source` says where the weights came from: layout, variant and the original config.json, or null. So an export can give
back what the decoder does not model. A run or checkpoint folder may hold a `model.json` too, without weights: then only
its `source` is used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zili.checksums import several_at_once, sha256
from zili.config.model import ModelConfig
from zili.errors import CheckpointError
from zili.models.arithmetic import parameter_shapes
from zili.release.folder import read_json, write_json
from zili.release.layouts.layout import PublishedConfig, Variant
from zili.release.layouts.mapping import check_tensors
from zili.release.tensors import Tensors, open_tensors, write_tensors

MODEL_FILE = "model.json"
_FORMAT, _VERSION = "zili-model", 1


@dataclass(frozen=True)
class Origin:
    """The published folder some weights came from."""

    layout: str
    variant: Variant
    config: dict[str, Any]
    """Its config.json, whole."""


def is_native(folder: Path) -> bool:
    """Whether `folder` is a Zili model folder, weights included."""
    weights = ("model.safetensors", "model.safetensors.index.json")
    return (folder / MODEL_FILE).is_file() and any((folder / name).is_file() for name in weights)


def write_model_file(folder: Path, config: ModelConfig, origin: Origin | None, weights: list[str]) -> None:
    """`model.json`, with the sha256 of each of the `weights` files in `folder`."""
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": config.model_dump(),
        "source": asdict(origin) if origin else None,
        "files": {name: sha256(folder / name) for name in weights},
    }
    write_json(folder / MODEL_FILE, content)


def write_native(
    folder: Path, config: ModelConfig, origin: Origin | None, tensors: Tensors, max_shard_bytes: int
) -> None:
    """Weights and `model.json` into an existing folder."""
    write_model_file(folder, config, origin, write_tensors(tensors, folder, max_shard_bytes))


def read_model_file(folder: Path) -> tuple[ModelConfig, Origin | None, dict[str, str]]:
    """Config, origin and file checksums of `model.json`; CheckpointError where it is not one of ours."""
    path = folder / MODEL_FILE
    content = read_json(path)
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: format {content.get('format')!r} version {content.get('version')!r}; this Zili reads "
            f"{_FORMAT!r} version {_VERSION}"
        )
    source = content.get("source")
    origin = Origin(source["layout"], Variant(**source["variant"]), source["config"]) if source else None
    return PublishedConfig(path, content).model(content.get("model") or {}), origin, content.get("files", {})


def read_native(folder: Path) -> tuple[ModelConfig, Origin | None, Tensors]:
    """A Zili model folder, its checksums and its tensors' names and shapes verified."""
    config, origin, files = read_model_file(folder)
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{folder} names {name!r}, which is not a file of this folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; import the model again")
    for name, found in zip(files, several_at_once(sha256, [folder / name for name in files]), strict=True):
        if found != files[name]:
            raise CheckpointError(f"{folder / name} is not the file that was written (sha256); import the model again")
    tensors = open_tensors(folder)
    check_tensors(tensors.describe(), parameter_shapes(config), folder)
    return config, origin, tensors
