"""The processes of a run: who am I, who shares what with me, and how all of them agree."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from zili import errors
from zili.chips.device import Device
from zili.durable import refused_by_disk
from zili.errors import ZiliError
from zili.parallel.collectives import Communicator
from zili.parallel.layout import Layout, processes
from zili.parallel.lives import own_life

Result = TypeVar("Result")
_TIMEOUT = timedelta(minutes=30)
_PATIENCE = timedelta(seconds=10)
_others = False
"""Whether this process has begun to join others."""
_ROUND = 1.0
"""Seconds between two signs of life of processes that are at long work."""


def join(device: Device) -> None:
    """Enter the process group of the run; nothing where there is one process. `leave` ends it.

    Tensors of the device go by the backend's collectives, those of the host by Gloo.
    """
    global _others  # noqa: PLW0603 - so is the process group
    if processes()[1] > 1 and not dist.is_initialized():
        _others = True
        collectives = device.backend.collectives
        named = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{collectives}"
        store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
        life = own_life(store, rank, size, _TIMEOUT)
        dist.init_process_group(named, store=life, rank=rank, world_size=size, timeout=_TIMEOUT)


def has_others() -> bool:
    """Whether this process has begun to join others: what it says and how it ends is then their business too."""
    return _others


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def await_the_others() -> None:
    """Before this process ends by an error that all agreed on: wait, for seconds at most, until all have heard it.

    A process that ends while another still reads its last message can take that message along.
    """
    if dist.is_initialized():
        with suppress(RuntimeError):  # the others may be gone, which is as good
            dist.all_reduce(torch.zeros(1), async_op=True).wait(_PATIENCE)


def is_of_the_others(error: Exception) -> bool:
    """Whether `error` is how collectives say that another process is gone or does not answer. Gloo's have no class of
    their own (torch 2.13)."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "caused pair closure" in text)


class World:
    """The processes of one run on their mesh. With one process there is no mesh, and every sum is its argument."""

    def __init__(self, layout: Layout, device: Device) -> None:
        self.layout = layout
        self.device = device
        self.rank = dist.get_rank() if layout.world > 1 else 0
        self._meshes: dict[str, DeviceMesh] = {}
        if layout.world > 1:
            self._make_meshes()
        sizes = layout.sizes
        place, rest = [], self.rank
        for size in reversed(sizes):
            rest, coordinate = divmod(rest, size)
            place.append(coordinate)
        self.pipeline_rank, self._replica, self._shard, self.context_rank, self.tensor_rank = reversed(place)

    def _make_meshes(self) -> None:
        """Three ways to number the same processes: by what shares weights, experts, and sequences."""
        layout, kind = self.layout, self.device.type
        outer = (layout.pipeline, layout.replicas)
        # A mesh dimension of one replica would cost a reduction that reduces nothing.
        around = ("replicas",) if layout.replicas > 1 else ()
        dense = init_device_mesh(
            kind,
            (*outer, layout.weight_shards, layout.tensor),
            mesh_dim_names=("pipeline", "replicas", "weight_shards", "tensor"),
        )
        self._meshes = {name: dense[name] for name in ("pipeline", "tensor")}
        self._meshes["weights"] = dense[(*around, "weight_shards")]
        mixture = init_device_mesh(
            kind,
            (*outer, layout.expert_shards, layout.expert),
            mesh_dim_names=("pipeline", "replicas", "expert_shards", "expert"),
        )
        self._meshes["expert"] = mixture["expert"]
        self._meshes["expert_weights"] = mixture[(*around, "expert_shards")]
        together = layout.context * layout.tensor
        others = layout.world // together
        sequence = init_device_mesh(
            kind, (others, layout.context, layout.tensor), mesh_dim_names=("others", "context", "within")
        )
        self._meshes["context"] = sequence["context"]
        whole = init_device_mesh(kind, (others, together), mesh_dim_names=("others", "sequence"))
        self._meshes["sequence"] = whole["sequence"]

    def mesh(self, name: str) -> DeviceMesh:
        """The mesh named by what its processes share: `pipeline`, `tensor`, `context`, `sequence` (these two together),
        `expert`; `weights` and `expert_weights` are replicas x shards."""
        return self._meshes[name]

    @property
    def size(self) -> int:
        return self.layout.world

    @property
    def sharded(self) -> bool:
        """Whether weights are cut for storage; else each process holds those of its stage and matrices whole."""
        return self.size > 1 and self.device.capability("fsdp2").value

    def communicator(self, mesh: str) -> Communicator:
        """This process and those it shares `mesh` with, for collectives with gradients."""
        return Communicator(self.mesh(mesh).get_group(), self.device.capability("bf16_reduce").value)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: it shows, logs, and writes what is written once."""
        return self.rank == 0

    def rows(self, global_batch: int) -> slice:
        """The rows of a global batch that this process reads."""
        own = global_batch // self.layout.data
        first = (self._replica * self.layout.shards + self._shard) * own
        return slice(first, first + own)

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def count(self, true: bool) -> int:
        """On how many processes it is `true`; all of them ask and all of them learn."""
        return int(self.sum(torch.tensor(float(true))))

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What the first process makes, on every process; if it fails there, it fails everywhere."""
        made: list[Result | None] = [self.agree(lambda: make() if self.is_first else None)]
        if self.size > 1:
            dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        return made[0]  # type: ignore[return-value]

    def agree(self, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
        """`work()` on every process. If it fails on one, all of them raise: none is left waiting.

        Raises:
            ZiliError: of the first process that raised one; where one met a defect, which it raises itself, the others
                raise that this process failed.
        """
        failure: Exception | None = None
        result: Result | None = None
        try:
            result = work()
        except Exception as error:
            failure = refused_by_disk(error) or error
        if self.size > 1:
            everyones: list[tuple[str, str] | None] = [None] * self.size
            dist.all_gather_object(everyones, _said(failure, self.rank), group=group)
            failure = _agreed(failure, everyones)
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def agree_patiently(self, work: Callable[[], Result]) -> Result:
        """`agree`, for work that may take one process longer than the others may wait in a collective.

        It runs in a thread and must leave the device alone; meanwhile all tell one another that they are at it.
        """
        if self.size == 1:
            return self.agree(work)
        with ThreadPool(1) as thread:
            made, busy = thread.apply_async(work), True
            while busy:
                made.wait(_ROUND)
                busy = bool(self.sum(torch.tensor(float(not made.ready()))))
            return self.agree(made.get)


def _said(failure: Exception | None, rank: int) -> tuple[str, str] | None:
    """What the other processes get of an error: its class and its text."""
    if failure is None:
        return None
    if isinstance(failure, ZiliError):
        return type(failure).__name__, str(failure)
    return ZiliError.__name__, f"process {rank} failed: {type(failure).__name__}: {failure}"


def _agreed(own: Exception | None, everyones: list[tuple[str, str] | None]) -> Exception | None:
    """What this process raises when `everyones` failures are known; a defect keeps its own traceback."""
    first = next((said for said in everyones if said is not None), None)
    if first is None or not (own is None or isinstance(own, ZiliError)):
        return own
    kind, text = first
    failure = own if own is not None and (type(own).__name__, str(own)) == first else getattr(errors, kind)(text)
    failure.agreed = True
    return failure
