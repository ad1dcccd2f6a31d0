"""What a step does, written down as it happens: memory, messages, arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from zili.ops import registry
from zili.parallel.model import plain
from zili.planning.exact.memory import (
    ACTIVATIONS,
    BACKWARD,
    BATCH,
    CHECKPOINT,
    GATHERED,
    GRADIENTS,
    LOGITS,
    MESSAGES,
    OPTIMIZER,
    WEIGHTS,
)
from zili.planning.exact.messages import Message
from zili.torch_private import (
    ShardingPropagator,
    TorchDispatchMode,
    arguments_by_name,
    current_autograd_node,
    resolve_process_group,
    tree_leaves,
    wait_tensor,
)

PARTS = {
    WEIGHTS: "this process's part of weights and buffers, fp32",
    GRADIENTS: "of its part of the weights, and of gathered ones before they are summed",
    OPTIMIZER: "moments of the optimizer",
    GATHERED: "weights gathered from other processes",
    ACTIVATIONS: "what forward passes left for their backward passes, and work of the forward pass at hand",
    LOGITS: "made inside the loss: logits, their gradient, that of the output matrix",
    BACKWARD: "gradients of activations, and work of the backward pass",
    MESSAGES: "sent or received, other than weights",
    BATCH: "token ids, labels, document numbers",
    CHECKPOINT: "copies of weights and moments for a save in the background, where the chip is the host",
}
"""What memory is for, in the order in which it is shown."""

_KINDS = {
    "all_gather": ("allgather", "all_gather"),
    "reduce_scatter": ("reduce_scatter",),
    "all_reduce": ("allreduce", "all_reduce"),
    "all_to_all": ("alltoall", "all_to_all", "shard_dim_alltoall"),
    "broadcast": ("broadcast",),
    "send": ("send",),
    "receive": ("recv",),
}
_MESSAGE_SPACES = ("c10d", "_c10d_functional", "_dtensor")
_PARTS_OF_SPACES = {"_c10d_functional": MESSAGES, "fsdp": GATHERED}


# torch has formulas for the kernels of NVIDIA's chips, and none for these.
@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


@register_flop_formula(torch.ops.aten._grouped_mm)
def _grouped_flops(rows: torch.Size, others: torch.Size, *_: Any, **__: Any) -> int:
    """Rows, cut into groups, by a matrix each; or, of weights' gradients, a product for each group of rows."""
    return 2 * rows[0] * rows[1] * others[-1]


@dataclass
class Allocation:
    """Some memory, from when to when, and what for."""

    part: str
    made_by: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Recorder(TorchDispatchMode):
    """Notes every operation below autograd. Times are numbers of operations."""

    groups: dict[str, str]
    """Name of what its processes share, by a process group's own name."""
    now: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    """FLOPs of matrix products and attention, forward and backward, by phase."""
    operations: Counter[str] = field(default_factory=Counter)
    messages: Counter[Message] = field(default_factory=Counter)
    changes: list[tuple[int, int, int]] = field(default_factory=list)
    """Time, number of the allocation, bytes more or less."""
    allocations: list[Allocation] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._held: dict[int, ref[torch.UntypedStorage]] = {}
        self._optimizing = False
        self._in_loss = False
        self._asked_for_shapes = False

    # ---- memory

    def is_for(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Say what `tensors` are, whatever they looked like when they were made."""
        for tensor in tensors:
            self.allocations[self._number(plain(tensor), part, "before the step")].part = part

    def _number(self, tensor: Tensor, part: str, made_by: str) -> int:
        """The allocation of a tensor's memory; a new one where it was not known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            number = len(self.allocations)
            self.allocations.append(
                Allocation(part, made_by, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            )
            self._numbers[key], self._sizes[key] = number, 0
            self._held[key] = ref(storage, lambda _: self._freed(key))
            self._resized(key, storage.nbytes())
        return self._numbers[key]

    def _resized(self, key: int, size: int) -> None:
        difference = size - self._sizes[key]
        if difference:
            self.changes.append((self.now, self._numbers[key], difference))
        self._sizes[key] = size

    def _freed(self, key: int) -> None:
        self._resized(key, 0)
        del self._numbers[key], self._sizes[key], self._held[key]

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record what happens inside."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            if (key := storage._cdata) in self._numbers:
                self._resized(key, storage.nbytes())
                if size:  # FSDP2 gives and takes the memory of gathered weights so, by no operation
                    self.allocations[self._numbers[key]].part = GATHERED
            return done

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
            stack.enter_context(registry.replaced(self._marked))
            # DTensor tries out what operations do to shapes, on whole tensors that nobody has.
            propagate = ShardingPropagator._propagate_tensor_meta_non_cached

            def shapes(propagator: Any, schema: Any) -> Any:
                self._asked_for_shapes = True
                try:
                    return propagate(propagator, schema)
                finally:
                    self._asked_for_shapes = False

            stack.enter_context(mock.patch.object(ShardingPropagator, propagate.__name__, shapes))
            for hook in (
                register_optimizer_step_pre_hook(self._before_optimizer),
                register_optimizer_step_post_hook(self._after_optimizer),
            ):
                stack.callback(hook.remove)
            stack.enter_context(self)
            yield self

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._optimizing = True
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self.is_for(GRADIENTS, (parameter.grad for parameter in parameters if parameter.grad is not None))

    def _after_optimizer(self, *_: Any) -> None:
        self._optimizing = False

    def _marked(self, name: str, version: Callable[..., Any]) -> Callable[..., Any]:
        """A loss during which it is known that it is one."""
        if name != "linear_cross_entropy":
            return version

        def loss(*arguments: Any, **keywords: Any) -> Any:
            self._in_loss = True
            try:
                return version(*arguments, **keywords)
            finally:
                self._in_loss = False

        return loss

    @property
    def _phase(self) -> str:
        if self._optimizing:
            return "optimizer"
        return "forward" if current_autograd_node() is None else "backward"

    def _part(self) -> str:
        if self._in_loss:
            return LOGITS
        return {"forward": ACTIVATIONS, "backward": BACKWARD, "optimizer": OPTIMIZER}[self._phase]

    # ---- operations

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its operations on plain tensors come by here
        keywords = keywords or {}
        if self._asked_for_shapes or function is torch.ops.prim.device.default:
            return function(*arguments, **keywords)
        self.now += 1
        if function.namespace in _MESSAGE_SPACES:
            self._note_message(function, arguments)
        # What was waited for is the very tensor that was given; a fake one would be another.
        waits = function is wait_tensor
        out = arguments[0] if waits else function(*arguments, **keywords)
        self.operations[str(function)] += 1
        if (formula := flop_registry.get(function._overloadpacket)) is not None:
            self.flops[self._phase] += formula(*arguments, **keywords, out_val=out)
        part, name = _PARTS_OF_SPACES.get(function.namespace, self._part()), str(function)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and not leaf.is_meta:
                self._number(leaf, part, name)
        if function.namespace == "fsdp":
            self._note_sharding(function, arguments, keywords)
        return out

    def _note_sharding(self, function: Any, arguments: Any, keywords: Any) -> None:
        """What FSDP2 allocates is known when it is used: gathered weights, gradients that are cut and sent."""
        name = function._schema.name
        given = arguments_by_name(function, arguments, keywords)
        if name == "fsdp::all_gather_copy_in":
            self.is_for(GATHERED, [given["all_gather_output"]])
        elif name == "fsdp::split_with_sizes_copy":
            self.is_for(GATHERED, given["out"])
        elif name == "fsdp::chunk_cat":
            self.is_for(GRADIENTS, given["tensors"])
            self.is_for(MESSAGES, [given["out"]])

    def _note_message(self, function: Any, arguments: Any) -> None:
        name = function._schema.name.partition("::")[2].lstrip("_")
        kind = next((kind for kind, names in _KINDS.items() if name.startswith(names)), None)
        if kind is None:  # waiting, and what only passes a tensor on
            return
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            allocation = self.allocations[self._number(tensor, MESSAGES, str(function))]
            if allocation.part in (ACTIVATIONS, BACKWARD):
                allocation.part = MESSAGES
        group = _group(function, arguments)
        size = max(tensor.nbytes for tensor in tensors)
        if kind == "all_gather" and function.namespace == "_c10d_functional":
            size *= group.size()
        self.messages[Message(kind, self.groups.get(group.group_name, "world"), group.size(), size)] += 1


def _group(function: Any, arguments: Any) -> dist.ProcessGroup:
    """The process group among an operation's arguments: itself, or its name."""
    given = arguments_by_name(function, arguments, {})
    if "process_group" in given:
        return dist.ProcessGroup.unbox(given["process_group"])
    group = given["group_name"]
    return group if isinstance(group, dist.ProcessGroup) else resolve_process_group(group)
