"""A training checkpoint's weights as tensors that are read when they are asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from zili.config.mixture import LoraConfig
from zili.config.model import ModelConfig
from zili.errors import CheckpointError
from zili.models.arithmetic import is_adapter, parameter_shapes
from zili.models.decoder import Decoder
from zili.release.layouts.mapping import check_tensors
from zili.release.tensors import Index, Tensors, open_safetensors
from zili.training.index import Box, read_index

_PREFIX = "model."


class CheckpointTensors(Tensors):
    """The model in a checkpoint's shards, each tensor of which may lie in pieces over several of them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._index = folder, read_index(folder)
        self._described = {
            name.removeprefix(_PREFIX): torch.empty(
                self._index.size(name), dtype=self._index.dtype(name), device="meta"
            )
            for name in self._index.names()
            if name.startswith(_PREFIX)
        }

    def describe(self) -> dict[str, Tensor]:
        return self._described

    def read(self, name: str, index: Index | None = None) -> Tensor:
        whole = self._described[name]
        index = index or tuple(slice(0, size) for size in whole.shape)
        out = torch.empty([part.stop - part.start for part in index], dtype=whole.dtype)
        filled = 0
        asked = Box(tuple(part.start for part in index), tuple(out.shape))
        for file, box in self._index.parts(_PREFIX + name, asked):
            here, there = _overlap(box, index)
            if all(part.start < part.stop for part in here):
                with open_safetensors(self._folder / file) as opened:
                    out[here] = opened.get_slice(_PREFIX + name)[there]
                filled += out[here].numel()
        if filled != out.numel():
            raise CheckpointError(
                f"{self._folder}: {filled} of {out.numel()} elements of {name} are there; a shard is missing, take an "
                "earlier checkpoint"
            )
        return out


def _overlap(box: Box, index: Index) -> tuple[Index, Index]:
    """What `box`, in a file, has of the part `index`: as a part of that part, and as a part of the box."""
    here, there = [], []
    for part, start, size in zip(index, box.offset, box.shape, strict=True):
        first, end = max(part.start, start), min(part.stop, start + size)
        here.append(slice(first - part.start, end - part.start))
        there.append(slice(first - start, end - start))
    return tuple(here), tuple(there)


def open_checkpoint(
    folder: Path, *, hashed: bool = False, decoder: type[Decoder] = Decoder
) -> tuple[ModelConfig, Tensors, Path]:
    """A checkpoint, or a run folder's newest sound one, and where it is: its model, hashes, names and shapes verified.

    `hashed`: `folder` is a checkpoint whose hashes were verified already. `decoder`: the kind to be made of it.

    Raises:
        CheckpointError: nothing there, damaged, or of another model or kind.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a model, checkpoint or run folder")
    # Late: reading a published model needs no trainer.
    from zili.training.checkpoints import check_decoder, find_checkpoint, read_state

    found = folder if hashed else find_checkpoint(folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint; give a run folder or a step-... folder")
    state = read_state(found)
    check_decoder(found, state, decoder)
    config = ModelConfig.model_validate(state.config["model"])
    tensors = CheckpointTensors(found)
    described, shapes = tensors.describe(), parameter_shapes(config)
    # What an objective learned beside the model stays where it is.
    check_tensors({name: tensor for name, tensor in described.items() if name in shapes}, shapes, found)
    if config.lora is None:
        return config, tensors, found
    return config.changed(lora=None), MergedTensors(tensors, config.lora), found


class MergedTensors(Tensors):
    """The matrices of a model with adapters, `W + alpha / rank B A` in fp32, and what it has beside them."""

    def __init__(self, tensors: Tensors, lora: LoraConfig) -> None:
        self._tensors, self._lora = tensors, lora
        self._there = tensors.describe()

    @property
    def stored(self) -> Tensors:
        return self._tensors

    def describe(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._there.items() if not is_adapter(name)}

    def read(self, name: str, index: Index | None = None) -> Tensor:
        module = name.removesuffix(".weight")
        whole = self._tensors.read(name, index)
        if f"{module}.lora_a" not in self._there:
            return whole
        rows, columns = index or (slice(None), slice(None))
        first = self._tensors.read(f"{module}.lora_a").float()[:, columns]
        second = self._tensors.read(f"{module}.lora_b").float()[rows]
        return (whole.float() + self._lora.scale * second @ first).to(whole.dtype)
