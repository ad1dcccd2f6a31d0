"""Published models into Zili's own form."""

from __future__ import annotations

from pathlib import Path

import torch

from zili.errors import CheckpointError
from zili.release.folder import copy_companions, whole_folder
from zili.release.native import write_native
from zili.release.opening import OpenModel, is_published, open_published
from zili.release.tensors import DEFAULT_SHARD_BYTES, CastTensors


def import_model(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> OpenModel:
    """Write a Hugging Face folder's model as a Zili model folder; `dtype` None keeps each tensor's own.

    Raises:
        CheckpointError: as `load`, or `target` exists. Nothing half-written is left.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist; give a Hugging Face model folder")
    if not is_published(source):
        raise CheckpointError(f"{source} is not a Hugging Face model folder: it has no config.json")
    model = open_published(source)
    tensors = model.tensors if dtype is None else CastTensors(model.tensors, dtype)
    with whole_folder(target) as aside:
        write_native(aside, model.config, model.origin, tensors, max_shard_bytes)
        copy_companions(model.companions, aside)
    return model
