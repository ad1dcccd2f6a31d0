"""Reading checkpoints: each process its own part, of the files that have something of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.optim import Optimizer

from zili.config import ModelConfig
from zili.errors import CheckpointError
from zili.models.arithmetic import parameter_shapes
from zili.models.decoder import Decoder
from zili.training.checkpoints import (
    Named,
    SoundCheckpoint,
    check_decoder,
    find_checkpoint,
    generator_key,
    model_tensors,
    owners,
    read_state,
)
from zili.training.index import Box, TensorIndex, read_index
from zili.training.parts import box_of


def restore(
    found: SoundCheckpoint,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    named: Named,
    optimizers: list[Optimizer],
    rank: int,
) -> dict[str, Tensor]:
    """Fill weights and optimizer state in place; returns the generator states of process `rank` by name.

    `tensors` (from `model_tensors`) and the parameters `named` are what this process has a part of. It reads only those
    parts, whatever the layout was that wrote them. A process that was not there has no generator states: the result is
    empty then.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer.
    """
    path, index, alone = found
    wanted = set(tensors) if alone else {f"model.{name}" for name in parameter_shapes(config)}
    _check_same_keys(path, {key for key in index.names() if key.startswith("model.")}, wanted)
    states = _empty_optimizer_state(found, config, named, optimizers)
    tensors = {**tensors, **{key: tensor for key, (_, _, tensor) in states.items()}}
    rng = {key: torch.empty(index.size(key), dtype=torch.uint8) for key in _generators(index, rank)}
    _read(found, {**tensors, **rng})
    for key, (optimizer, parameter, tensor) in states.items():
        name = key.rpartition(".")[2]
        optimizer.state[parameter][name] = tensor.reshape(()) if name == "step" else tensor
    return {key.split(".")[1]: value for key, value in rng.items()}


def files_to_read(index: TensorIndex, tensors: dict[str, Tensor], named: Named, rank: int) -> set[str]:
    """The files that `restore` opens; of a checkpoint of another model, those of what is there."""
    known = {key: tensor for key, tensor in tensors.items() if key in index and index.size(key) == tensor.shape}
    boxes: dict[str, Box | None] = {key: box_of(tensor) for key, tensor in known.items()}
    boxes |= dict.fromkeys(_generators(index, rank))
    parameters = dict(named)
    for key in index.names():
        if not key.startswith("optimizer."):
            continue
        parameter = parameters.get(key.removeprefix("optimizer.").rpartition(".")[0])
        if parameter is not None:
            boxes[key] = box_of(parameter) if _is_like(index, key, parameter) else None
    return {part.file for key, box in boxes.items() for part in index.parts(key, box)}


class Needs(NamedTuple):
    """What a process is about to restore."""

    tensors: dict[str, Tensor]
    """From `model_tensors`."""
    named: Named
    rank: int

    def files(self, index: TensorIndex) -> set[str]:
        """Those of a checkpoint that it opens."""
        return files_to_read(index, *self)

    def refuse_parts_of_others(self, file: Path, index: TensorIndex) -> None:
        """See that a process's own file has just the parts that this process holds.

        Raises:
            CheckpointError: another layout wrote it.
        """
        boxes = {key: box_of(tensor) for key, tensor in self.tensors.items()}
        parameters = dict(self.named)
        for key in index.names():
            parameter = parameters.get(key.removeprefix("optimizer.").rpartition(".")[0])
            if key.startswith("optimizer.") and parameter is not None and _is_like(index, key, parameter):
                boxes[key] = box_of(parameter)
        for key, box in boxes.items():
            there = [part.box for part in index.parts(key, box)] if key in index else []
            if there != [box] and 0 not in box.shape:
                raise CheckpointError(f"{file} was written in another layout: it has not this process's part of {key}")


def _generators(index: TensorIndex, rank: int) -> list[str]:
    """The generator states of process `rank`."""
    rngs = (key for key in index.names() if key.startswith("rng."))
    return [key for key in rngs if generator_key(key.split(".")[1], rank) == key]


def load_model(path: Path, decoder: type[Decoder] = Decoder) -> Decoder:
    """The decoder of a checkpoint, in eval mode on the CPU. `path`: a checkpoint, or a run folder holding some;
    `decoder`: the kind that it was trained as.

    Raises:
        CheckpointError: no sound checkpoint there, or it is of another kind.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a run folder or a step-... folder")
    state = read_state(folder)
    check_decoder(folder, state, decoder)
    config = ModelConfig.model_validate(state.config["model"])
    with torch.device("meta"):
        model = decoder(config)
    model.to_empty(device="cpu")
    found, tensors = SoundCheckpoint(folder, read_index(folder)), model_tensors(model.named_tensors())
    # What an objective learned beside the decoder stays where it is.
    _check_same_keys(folder, set(found.contents.names()) & tensors.keys(), set(tensors))
    _read(found, tensors)
    return model.eval()


@contextmanager
def one_process() -> Iterator[None]:
    """Without torch's warning that there is one process: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _empty_optimizer_state(
    found: SoundCheckpoint, config: ModelConfig, named: Named, optimizers: list[Optimizer]
) -> dict[str, tuple[Optimizer, nn.Parameter, Tensor]]:
    """Room for the `optimizer.*` tensors of the checkpoint, shaped and placed like the parameters they belong to."""
    path, index, _ = found
    owned = {name: (optimizer, parameter) for name, parameter, optimizer in owners(named, optimizers)}
    known = parameter_shapes(config)
    states = {}
    for key in index.names():
        if not key.startswith("optimizer."):
            continue
        name = key.removeprefix("optimizer.").rpartition(".")[0]
        if name not in known:
            raise CheckpointError(f"{path} holds optimizer state of {name}, which this run does not train")
        if name not in owned:
            continue  # another process of the pipeline has it
        optimizer, parameter = owned[name]
        # A fused optimizer counts its steps on the device, the others on the host.
        device = parameter.device if optimizer.defaults.get("fused") else None
        alike = _is_like(index, key, parameter)
        room = torch.empty_like(parameter) if alike else torch.empty(index.size(key), device=device)
        states[key] = (optimizer, parameter, room.detach())
    _check_state_kinds(path, states, optimizers)
    return states


def _is_like(index: TensorIndex, key: str, parameter: Tensor) -> bool:
    """Whether a tensor of an optimizer lies over the processes as the parameter does."""
    return index.size(key) == parameter.shape and not key.endswith(".step")


def _check_state_kinds(path: Path, states: dict[str, Any], optimizers: list[Optimizer]) -> None:
    """Refuse Muon's state for AdamW and the reverse: momentum under another name would be silently lost."""
    wanted = {type(optimizer).__name__: optimizer for optimizer in optimizers}
    for key, (optimizer, _, _) in states.items():
        muon_state = key.endswith(".momentum_buffer")
        if muon_state != (type(optimizer).__name__ == "Muon"):
            raise CheckpointError(
                f"{path} was saved with another optimizer ({key}) than this run's {' + '.join(wanted)}; "
                "resume with the same optimizer.name or start in a new folder"
            )


class _Reader(HuggingFaceStorageReader):
    """Torch's reader, which need not open every file to know what is in it."""

    def __init__(self, found: SoundCheckpoint, tensors: dict[str, Tensor]) -> None:
        super().__init__(str(found.path))
        self._found, self._tensors = found, tensors

    def read_metadata(self) -> Metadata:
        """Of what this process reads, the parts that it meets."""
        folder, index, _ = self._found
        described: dict[str, Any] = {}
        places = {}
        for name, tensor in self._tensors.items():
            dtype, chunks = index.dtype(name), []
            for file, box in index.parts(name, box_of(tensor)):
                offset, shape = torch.Size(box.offset), torch.Size(box.shape)
                chunks.append(ChunkStorageMetadata(offset, shape))
                places[MetadataIndex(name, offset)] = _Stored(str(folder / file), shape, dtype)
            described[name] = TensorStorageMetadata(TensorProperties(dtype), index.size(name), chunks)
        return Metadata(described, storage_data=places)


class _Stored(NamedTuple):
    """What torch's reader has to know of a part; its own class for it is private."""

    relative_path: str
    shape: torch.Size
    dtype: torch.dtype


def _read(found: SoundCheckpoint, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        size = found.contents.size(key)
        if size != tensor.shape:
            raise CheckpointError(
                f"{found.path}: {key} has shape {list(size)}, this model expects {list(tensor.shape)}"
            )
    with one_process():
        dcp.load(tensors, storage_reader=_Reader(found, tensors), no_dist=True)


def _check_same_keys(path: Path, found: set[str], wanted: set[str]) -> None:
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        parts = [
            f"{len(names)} {what} (first: {names[0]})"
            for what, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise CheckpointError(f"{path} is of another model: {', '.join(parts)} tensors")
