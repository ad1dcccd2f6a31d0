"""What a process hands to others and takes from them, seen below autograd: its bits, and the time it waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from zili.chips.device import Device
from zili.torch_private import TorchDispatchMode, functional_collectives, tree_leaves, wait_tensor

_SPACES = ("c10d", "_c10d_functional", "_dtensor")
"""Namespaces of torch's collectives: in place, which groups of weights use; functional; DTensor's own."""
_COLLECTIVES = (
    *("allgather", "all_gather", "reduce_scatter", "allreduce", "all_reduce"),
    *("alltoall", "all_to_all", "shard_dim_alltoall", "broadcast", "send", "recv"),
)
"""How their names begin."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MADE_OF_PLAIN = {DTensor, functional_collectives.AsyncCollectiveTensor}
"""Kinds of tensors whose operations on plain ones come by after them."""


class BitMark(NamedTuple):
    """Something that a process received, or that it made itself."""

    received: bool
    sum: Tensor
    """Of its bits, 0-d int64, on its device."""


def bits_of(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, taken as whole numbers: 0-d int64. One bit that flips always changes it."""
    plain = tensor.detach().contiguous()
    return plain.view(_BITS[plain.element_size()]).sum(dtype=torch.int64)


class Witness(TorchDispatchMode):
    """Marks all that goes out of this process and all that comes in, in order.

    What comes in is looked at when it is first used: the process has waited for it by then. Two equal passes have equal
    marks, up to the first thing that went wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[BitMark] = []
        self._awaited: dict[int, Tensor] = {}

    def made(self, tensors: Iterator[Tensor]) -> None:
        """BitMark results of this process, after the pass."""
        for tensor in self._awaited.values():
            self.marks.append(BitMark(True, bits_of(tensor)))
        self._awaited.clear()
        self.marks += [BitMark(False, bits_of(tensor)) for tensor in tensors]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if _MADE_OF_PLAIN.intersection(types):
            return NotImplemented
        if types:  # fake ones, by which DTensor tries out shapes
            return function(*arguments, **(keywords or {}))
        if function is wait_tensor:
            out = function(*arguments)
            self.marks.append(BitMark(True, bits_of(out)))
            return out
        if self._awaited:
            self._use(tree_leaves((arguments, keywords)))
        sent, received = _messages(function, arguments)
        self.marks += [BitMark(False, bits_of(tensor)) for tensor in sent]
        out = function(*arguments, **(keywords or {}))
        # Kept until it is used, so that no other tensor gets its memory meanwhile.
        self._awaited |= {tensor.untyped_storage().data_ptr(): tensor for tensor in received}
        return out

    def _use(self, used: list[Any]) -> None:
        for tensor in used:
            if isinstance(tensor, Tensor):
                there = self._awaited.pop(tensor.untyped_storage().data_ptr(), None)
                if there is not None:
                    self.marks.append(BitMark(True, bits_of(there)))


class Waits(TorchDispatchMode):
    """Adds up the seconds that this process waits for others. Each collective is waited for where it begins, so that
    nothing overlaps: for a step now and then. Messages of a pipeline are left out, as two would wait for each other."""

    def __init__(self, device: Device, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.seconds = 0.0
        self._device, self._clock = device, clock

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if _MADE_OF_PLAIN.intersection(types):
            return NotImplemented
        sent, received = _messages(function, arguments)
        if not sent or (function.namespace == "c10d" and not received):
            return function(*arguments, **(keywords or {}))
        self._device.synchronize()
        begun = self._clock()
        out = function(*arguments, **(keywords or {}))
        for part in tree_leaves(out):
            if isinstance(part, Tensor) and function.namespace != "c10d":
                wait_tensor(part)
            elif isinstance(part, torch.ScriptObject):
                dist.Work.unbox(part).wait()
        self._device.synchronize()
        self.seconds += self._clock() - begun
        return out


def _messages(function: Any, arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What an operation sends, and what it will have received in place."""
    name = str(function).partition(".")[2].lstrip("_")
    # Not what waits, or passes on a tensor that is not there yet.
    if function.namespace not in _SPACES or not name.startswith(_COLLECTIVES):
        return [], []
    if function.namespace != "c10d":
        return _tensors(arguments), []
    first = _tensors(arguments[0])
    if name.startswith(("send", "recv")):
        return (first, []) if name.startswith("send") else ([], first)
    return first if name.startswith(("allreduce", "broadcast")) else _tensors(arguments[1]), first


def _tensors(some: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(some) if isinstance(leaf, Tensor)]
