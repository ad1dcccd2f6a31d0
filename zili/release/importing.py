"""Published models into Zili's own form."""

from __future__ import annotations

from pathlib import Path

import torch

from zili.durable import whole_folder
from zili.errors import CheckpointError
from zili.release.companions import bring
from zili.release.gguf.file import find_gguf
from zili.release.native import write_native
from zili.release.opening import OpenModel, is_published, open_gguf_model, open_published
from zili.release.tensors import DEFAULT_SHARD_BYTES, CastTensors


def import_model(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> OpenModel:
    """Write the model of a Hugging Face folder or a GGUF file as a Zili model folder.

    `dtype` None keeps each tensor's own; what is quantised becomes fp32.

    Raises:
        CheckpointError: as `load`, or `target` exists. Nothing half-written is left.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; give a Hugging Face model folder or a GGUF file")
    file = None if is_published(source) else find_gguf(source)
    if file is None and not is_published(source):
        raise CheckpointError(f"{source} is not a Hugging Face model folder: it has no config.json, and no .gguf file")
    model = open_published(source) if file is None else open_gguf_model(file)
    tensors = model.tensors if dtype is None else CastTensors(model.tensors, dtype)
    with whole_folder(target) as aside:
        write_native(aside, model.config, model.origin, tensors, max_shard_bytes)
        bring(model.companions, aside)
    return model
