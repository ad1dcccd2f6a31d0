"""The processes of a run: who am I, who shares what with me, and how all of them agree."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from zili import errors
from zili.chips.device import Device
from zili.durable import refused_by_disk
from zili.errors import PeerError, ZiliError
from zili.parallel.collectives import Communicator
from zili.parallel.control.crumbs import own_crumbs
from zili.parallel.control.member import AGENT, AGENT_SECRET, Control, Heard, meet
from zili.parallel.control.member import PATIENCE as SECONDS
from zili.parallel.control.recorder import answer_for_collectives
from zili.parallel.layout import Layout, processes
from zili.parallel.lives import own_life

Result = TypeVar("Result")
_PATIENCE = 10.0
"""Seconds in which the others hear what this process has said, before it ends."""
_FAILED, _MADE = b"F", b"M"
"""First byte of a word: why a process failed, or what the first one made."""
_others = False
"""Whether this process has begun to join others."""
_control: Control | None = None
_store: dist.Store | None = None


def join(device: Device) -> None:
    """Enter the run: its control messages and its process group; nothing where there is one process. `leave` ends it.

    No group over Gloo spans the processes of accelerators: what is not a tensor of theirs goes by control messages.
    """
    global _others
    _, size, _ = processes()
    if size > 1 and not dist.is_initialized():
        _others, patience = True, timedelta(seconds=SECONDS)
        with own_crumbs().within("join"):
            rank, store = _enter(size, patience)
            collectives = device.backend.collectives
            dist.init_process_group(collectives, store=store, rank=rank, world_size=size, timeout=patience)
        answer_for_collectives()


def _enter(size: int, patience: timedelta) -> tuple[int, dist.Store]:
    """Begin the control messages; this process's rank, and a store that is this life's alone."""
    global _control, _store  # noqa: PLW0603
    if address := os.environ.get(AGENT):
        from zili.parallel.control.store import NodeStore

        rank, secret = processes()[0], bytes.fromhex(os.environ[AGENT_SECRET])
        _control, _store = Control(address, secret, rank), NodeStore(address, secret)
        return rank, _store
    found, rank, _ = next(rendezvous("env://", timeout=patience))
    store = own_life(found, rank, size, patience)
    _control = meet(store, rank, size)
    return rank, store


def has_others() -> bool:
    """Whether this process has begun to join others: what it says and how it ends is then their business too."""
    return _others


def leave() -> None:
    """Leave the process group and the control messages, if there are any."""
    global _control  # noqa: PLW0603
    if dist.is_initialized():
        dist.destroy_process_group()
    if _control is not None:
        _control.close(_PATIENCE)
        _control = None


def await_the_others() -> None:
    """Before this process ends by an error that all agreed on: wait, for seconds at most, until all have heard it.

    The process that has a machine's node would take the last answers along.
    """
    if _control is not None:
        with suppress(PeerError):  # the others may be gone, which is as good
            _control.turn(patience=_PATIENCE)
        _control.close(_PATIENCE)


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
        return int(true) if self.size == 1 else self._turn(b"" if true else None).spoke

    def from_first(self, make: Callable[[], Result], channel: int = 0, patience: float | None = SECONDS) -> Result:
        """What the first process makes, on every process; if it fails there, it fails everywhere. `channel` and
        `patience` are as of `agree`."""
        if self.size == 1:
            return self.agree(make)
        made, failure = _tried(make) if self.is_first else (None, None)
        word = _failed(failure, self.rank) or (_MADE + pickle.dumps(made) if self.is_first else None)
        told = self._turn(word, channel=channel, patience=patience).word
        if told.startswith(_FAILED):
            raise _agreed(failure, told)
        return made if self.is_first else pickle.loads(told[1:])  # type: ignore[return-value]  # a process of this run

    def agree(self, work: Callable[[], Result], channel: int = 0, patience: float | None = SECONDS) -> Result:
        """`work()` on every process. If it fails on one, all of them raise: none is left waiting.

        Args:
            channel: another one for a thread that works beside the steps.
            patience: seconds that one process may take longer than another; None: whatever it takes.

        Raises:
            ZiliError: of the first process that raised one; where one met a defect, which it raises itself, the others
                raise that this process failed.
        """
        result, failure = _tried(work)
        if self.size > 1:
            turn = self._turn(_failed(failure, self.rank), channel=channel, patience=patience)
            failure = _agreed(failure, turn.word) if turn.word else None
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def gathered(self, value: str, channel: int = 0) -> list[str]:
        """The `value` of every process, by rank, on the first; nothing elsewhere."""
        if self.size == 1:
            return [value]
        return [one.decode() for one in self._turn(None, value.encode(), channel=channel).values]

    def _turn(
        self,
        word: bytes | None,
        value: bytes | None = None,
        *,
        channel: int = 0,
        patience: float | None = SECONDS,
    ) -> Heard:
        assert _control is not None, "World is made by processes that have joined"
        return _control.turn(word, value, channel=channel, patience=patience)


def _tried(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """What `work` makes, or why it failed."""
    try:
        return work(), None
    except Exception as error:
        return None, refused_by_disk(error) or error


def _failed(failure: Exception | None, rank: int) -> bytes | None:
    """What the other processes get of a failure: its class and its text."""
    if failure is None:
        return None
    kind, text = type(failure).__name__, str(failure)
    if not isinstance(failure, ZiliError):
        kind, text = ZiliError.__name__, f"process {rank} failed: {kind}: {failure}"
    return _FAILED + json.dumps([kind, text]).encode()


def _agreed(own: Exception | None, word: bytes) -> Exception:
    """What this process raises where `word` is what the first to fail said; a defect keeps its own traceback."""
    if own is not None and not isinstance(own, ZiliError):
        return own
    kind, text = json.loads(word[1:])
    same = own is not None and (type(own).__name__, str(own)) == (kind, text)
    failure: ZiliError = own if own is not None and same else getattr(errors, kind)(text)
    failure.agreed = True
    return failure
