"""A process that believes itself one of N: its world, its device, its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import InferenceMode
from torch.distributed.tensor import placement_types

from zili.chips.activation import Activation
from zili.chips.backend import Backend
from zili.chips.catalog import Chip
from zili.chips.device import Device
from zili.models.decoder import Decoder
from zili.parallel.world import World
from zili.torch_private import FakeStore, FakeTensorMode, exchange_of_cuts

Result = TypeVar("Result")
_ENDLESS = 1 << 60
_taken = False
_SEND_AND_RECEIVE = schedules._batch_p2p


class FakeWorld(World):
    """The processes of a run, of which only this one is there: what it decides, all decide."""

    def agree(self, work: Callable[[], Result], channel: int = 0, patience: float | None = None) -> Result:
        return work()

    def from_first(self, make: Callable[[], Result], channel: int = 0, patience: float | None = None) -> Result:
        return make()


class RehearsedDevice(Device):
    """A device of `backend`, of the model `chip` where it is given: what it can is theirs, its tensors the host's."""

    def __init__(self, backend: Backend, chip: Chip | None, capabilities: dict[str, bool]) -> None:
        """`capabilities` as for `Device`."""
        self._model = chip
        # Of the vendor's software nothing is here, so nothing of it is loaded.
        here = replace(backend, device_type="cpu", collectives="fake", plugin=None, operations=None)
        place = torch.device("cpu")
        super().__init__(Activation(here, place, 1, (), (), None, {}, ()), capabilities)

    def name(self) -> str:
        return self._model.name if self._model else self.backend.name

    def memory(self) -> dict[str, int]:
        """All of the chip's, free; without end where the chip is not known."""
        total = int(self._model.require("memory_gb") * 1e9) if self._model else _ENDLESS
        return {"allocated": 0, "peak": 0, "free": total, "total": total}


@contextmanager
def as_rank(rank: int, size: int, *, on_host: bool) -> Iterator[FakeTensorMode]:
    """Be process `rank` of `size` for a while; gives the mode in which tensors have no memory. `on_host`: the chips are
    the host itself.

    Once a process: torch keeps what it knows of meshes, and another world's would be taken for the same.
    """
    global _taken  # noqa: PLW0603
    if size > 1:
        if _taken:
            raise RuntimeError("this process was one of a world before; rehearse each process in a new one")
        _taken = True
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    # Stages agree by a vote whether their messages have fixed sizes, and there is nobody to vote; given their shapes,
    # as here, all of them say yes.
    unanimous = mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", _all_static)
    # What chips exchange, the host's collectives gather.
    exchanged = nullcontext() if on_host else mock.patch.object(placement_types, "shard_dim_alltoall", _exchanged)
    try:
        with unanimous, exchanged, mock.patch.object(schedules, "_batch_p2p", _held_until_waited_for):
            # Modules are built outside of it, where meshes count their processes with real tensors.
            yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        if size > 1:
            dist.destroy_process_group()


class _Messages:
    """Messages on their way, which hold what they are of; those of a fake group hold nothing."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> bool:
        self._tensors = []
        return True


def _held_until_waited_for(messages: list[dist.P2POp], desc: str | None = None) -> list[_Messages]:
    _SEND_AND_RECEIVE(messages, desc)
    return [_Messages([message.tensor for message in messages])] if messages else []


def _exchanged(x: torch.Tensor, gather_dim: int, shard_dim: int, mesh: Any, mesh_dim: int) -> torch.Tensor:
    """torch's exchange of one cut dimension for another, as any device but the host has it."""
    group = mesh.get_group(mesh_dim).group_name
    return exchange_of_cuts(x, gather_dim, shard_dim, group)


def _all_static(schedule: Any, stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


def without_memory(mode: FakeTensorMode) -> Callable[[Decoder, str, int], None]:
    """`zili.parallel.apply.Materialize` that allocates nothing."""

    def materialize(part: Decoder, device_type: str, seed: int) -> None:
        with mode:
            part.to_empty(device=device_type)

    return materialize


def evenly(by_process: torch.Tensor, arriving: torch.Tensor, rows: int) -> tuple[list[int], list[int]]:
    """`ProcessExchange.sizes` where every expert is equally wanted: nobody knows, and routers are trained to be so."""
    size = len(by_process)
    each = [rows // size + (process < rows % size) for process in range(size)]
    return each, each
