"""Which part of a checkpoint each process writes: known to it from the layout alone, without a word to the others.

A process writes the parts of tensors that it holds. Where several hold the same part, one of them writes it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from zili.checksums import share_of
from zili.parallel.world import World
from zili.torch_private import compute_local_shape_and_global_offset
from zili.training.index import SHARDING, Box

_SMALL = 1 << 20
"""Bytes of a part below which the first of those that hold it writes it. Spread over all of them, small parts would
make every process open as many files as there are holders when it restores."""


class HeldPart(NamedTuple):
    """The part of a tensor that this process holds."""

    tensor: Tensor
    size: torch.Size
    """Of the whole tensor."""
    box: Box

    def copied(self) -> HeldPart:
        """With a copy on the host."""
        return self._replace(tensor=self.tensor.to("cpu", copy=True))


class _Holders(NamedTuple):
    """The processes that hold the same part of a tensor."""

    own: int
    """Which of them this one is."""
    of: int
    kind: object
    """The same for tensors whose parts have the same holders, in the same order."""


def box_of(tensor: Tensor) -> Box:
    """The part of `tensor` that this process holds."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    # A layout whose tensor parallel does not divide what it cuts is refused: torch 2.13 would place parts wrongly.
    assert tensor.to_local().shape == shape, (tensor.to_local().shape, shape)
    return Box(tuple(offset), tuple(shape))


def parts_to_write(tensors: Mapping[str, Tensor], world: World, alone: Callable[[str], bool]) -> dict[str, HeldPart]:
    """Of `tensors`, this process's part of a checkpoint, what it writes. Whoever holds a part calls it with the same.

    Large parts are dealt out among their holders by their bytes, small ones are the first holder's. `alone` says by
    its name that a plain tensor is this process's; others are held by all processes of a pipeline's stage.
    """
    held = held_parts(tensors)
    dealt: dict[_Holders, dict[str, int]] = defaultdict(dict)
    own = set()
    for name, tensor in tensors.items():
        holders = _Holders(0, 1, None) if alone(name) else _holders(tensor, world)
        if holders is None or (isinstance(tensor, DTensor) and 0 in held[name].box.shape):
            continue
        nbytes = held[name].tensor.nbytes
        if nbytes >= _SMALL and holders.of > 1:
            dealt[holders][name] = nbytes
        elif holders.own == 0:
            own.add(name)
    own.update(name for holders, sizes in dealt.items() for name in share_of(sizes, holders.own, holders.of))
    return {name: part for name, part in held.items() if name in own}


def held_parts(tensors: Mapping[str, Tensor]) -> dict[str, HeldPart]:
    """Of each tensor the part that this process holds."""
    # Layers are alike, and what torch computes of a matrix that is cut twice takes time.
    boxes: dict[object, Box] = {}
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = HeldPart(tensor.detach(), tensor.shape, box_of(tensor))
            continue
        key = (tensor.shape, tensor.device_mesh, tensor.placements)
        if key not in boxes:
            boxes[key] = box_of(tensor)
        found[name] = HeldPart(tensor.to_local().detach(), tensor.shape, boxes[key])
    return found


def _holders(tensor: Tensor, world: World) -> _Holders | None:
    """Who has the same part as this process; None where it is others' to write."""
    count = world.size // world.layout.pipeline
    first = world.pipeline_rank * count
    if not isinstance(tensor, DTensor):
        return _Holders(world.rank - first, count, None)
    mesh = tensor.device_mesh
    # Where a stage's processes have several whole copies of it, each on a mesh of its own, the first mesh writes.
    if not (mesh.mesh == first).any():
        return None
    own, count = 0, 1
    whole = tuple(placement.is_replicate() for placement in tensor.placements)
    for dimension, (coordinate, replicated) in enumerate(zip(mesh.get_coordinate() or (), whole, strict=True)):
        if replicated:
            own, count = own * mesh.size(dimension) + coordinate, count * mesh.size(dimension)
    return _Holders(own, count, (mesh.mesh_dim_names, tuple(mesh.shape), whole))


def write_parts(file: Path, parts: Mapping[str, HeldPart]) -> None:
    """Write `parts` so that torch.distributed.checkpoint reads them in any layout.

    Raises:
        OSError, SafetensorError: the disk refuses.
    """
    # Of a file whose header has this, torch's reader asks it for every tensor.
    info = {name: {"saved_offsets": part.box.offset, "size": tuple(part.size)} for name, part in parts.items()}
    tensors = {name: part.tensor.contiguous() for name, part in parts.items()}
    save_file(tensors, file, metadata={"format": "pt", SHARDING: json.dumps(info)})
