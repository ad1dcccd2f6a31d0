"""Every operation of a training step, checked as it runs: its inputs go to the CPU too, in their precision and in fp64.

Errors do not add up, since each operation begins with what the chip has. The first one outside of its band is where the
chip leaves the reference, and every other one found is wrong by itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from zili.ops.grouped_heads import scaled_dot_product_attention
from zili.ops.registry import OPERATIONS
from zili.ops.yardstick import Distance, compared, distance, on_cpu
from zili.torch_private import (
    DispatchKey,
    ExcludeDispatchKeys,
    TorchDispatchMode,
    arguments_by_name,
    current_autograd_node,
    disable_current_modes,
    get_sequence_nr,
    tree_leaves,
)

_OPTIMIZER = "the optimizer"
_WITHOUT_NUMBERS = (
    "aten.empty",
    "aten.new_empty",
    "aten.detach",
    "aten._local_scalar_dense",
    "aten.set_",
    "aten.resize_",
)
_ON_THE_CPU_TOO = ("aten", "prims", "zili")
"""Namespaces of operations; what a vendor's has is compared a whole operation of this house at a time."""
_OTHER_PROCESSES = ("c10d", "_c10d_functional")


@dataclass(frozen=True)
class Offence:
    """An operation whose result rounding does not explain."""

    step: int
    way: str
    """forward, backward or optimizer."""
    module: str
    """Name in the model; of a backward operation, that of the forward operation whose gradient it is."""
    operation: str
    shape: tuple[int, ...]
    dtype: str
    distance: Distance

    def __str__(self) -> str:
        place = f"{self.way} of {self.module}" if self.way != "optimizer" else _OPTIMIZER
        return f"step {self.step}, {place}: {self.operation} -> {list(self.shape)} {self.dtype}: {self.distance}"


@dataclass
class Checked:
    """What was checked of one kind of operation."""

    calls: int = 0
    worst: float = 0.0
    """Largest error, as a share of what it may be."""


class Shadow(TorchDispatchMode):
    """Runs every operation that touches `device_type` on the CPU as well, and notes those that differ."""

    def __init__(self, model: nn.Module, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.offences: list[Offence] = []
        self.seen: dict[str, Checked] = {}
        self.unchecked: set[str] = set()
        """Operations that were not compared: random ones, a vendor's own, and what the CPU does not have."""
        self.step = 0
        self._optimizing = False
        self._names = {module: name or "the model" for name, module in model.named_modules()}
        self._inside: list[str] = []
        self._begun: list[tuple[int, str]] = []

    @contextmanager
    def watching(self) -> Iterator[Shadow]:
        """Check operations, and follow which module they belong to."""
        hooks = (
            register_module_forward_pre_hook(lambda module, inputs: self._enter(self._names.get(module))),
            register_module_forward_hook(
                lambda module, inputs, out: self._leave(self._names.get(module)), always_call=True
            ),
            register_optimizer_step_pre_hook(lambda *_: self._optimize(True)),
            register_optimizer_step_post_hook(lambda *_: self._optimize(False)),
        )
        self._inside.clear()
        self._begun.clear()
        try:
            with self:
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _optimize(self, now: bool) -> None:
        self._optimizing = now

    def _enter(self, name: str | None) -> None:
        if name is not None:
            self._inside.append(name)
            self._mark()

    def _leave(self, name: str | None) -> None:
        if name is not None and self._inside:
            self._inside.pop()
            self._mark()

    def _mark(self) -> None:
        # Autograd numbers its nodes in the order of the forward pass: from here on they belong to this module.
        self._begun.append((get_sequence_nr(), self._inside[-1] if self._inside else "the loss"))

    def _place(self) -> tuple[str, str]:
        """Way and module of the operation that runs now."""
        if self._optimizing:
            return "optimizer", _OPTIMIZER
        node = current_autograd_node()
        if node is None:
            return "forward", self._inside[-1] if self._inside else "the loss"
        # Marks are in the order of time, so their numbers ascend.
        found = bisect_right(self._begun, node._sequence_nr(), key=lambda mark: mark[0]) - 1
        return "backward", self._begun[found][1] if found >= 0 else "the loss"

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if self._has_no_numbers(function, (arguments, keywords)):
            return function(*arguments, **keywords)
        if _is_random(function, arguments, keywords) or function.namespace not in _ON_THE_CPU_TOO:
            self.unchecked.add(str(function))
            return function(*arguments, **keywords)
        lists = [i for i, argument in enumerate(arguments) if _is_list_of_tensors(argument)]
        if not lists or not any(part in str(function) for part in ("_foreach_", "_fused_ad")):
            return self._checked(function, arguments, keywords)
        # An optimizer's step over all parameters, one after the other: the host need not hold copies of all.
        length = len(arguments[lists[0]])
        alone = [
            [
                argument[i : i + 1] if isinstance(argument, list | tuple) and len(argument) == length else argument
                for argument in arguments
            ]
            for i in range(length)
        ]
        outs = [self._checked(function, own, keywords) for own in alone]
        return [out[0] for out in outs] if outs and outs[0] is not None else None

    def _checked(self, function: Any, arguments: Any, keywords: Any) -> Any:
        """The operation's result, compared with the CPU's."""
        same, exact = on_cpu((arguments, keywords)), on_cpu((arguments, keywords), torch.float64)
        out = function(*arguments, **keywords)
        on_the_cpu = partial(_attention, function) if _is_attention(function) else function
        try:
            same_out = on_the_cpu(*same[0], **same[1])
        except (NotImplementedError, RuntimeError, TypeError):
            self.unchecked.add(str(function))
            return out
        try:
            exact_out = on_the_cpu(*exact[0], **exact[1])
        except (NotImplementedError, RuntimeError, TypeError):
            exact, exact_out = same, same_out
        results = zip(
            *(_results(function, *call) for call in ((arguments, out), (same[0], same_out), (exact[0], exact_out))),
            strict=True,
        )
        for found, cpus, right in results:
            self._judge(function, found, cpus, right)
        if _is_attention(function):
            self._judge_gradients(function, arguments_by_name(function, arguments, keywords))
        return out

    def _judge_gradients(self, function: Any, given: dict[str, Any]) -> None:
        """Judge the gradients of one of torch's fused attentions. What it keeps for its backward pass is its own
        affair, so that the CPU cannot take that pass over; it is done once more from the beginning."""
        inputs = [given[name] for name in ("query", "key", "value")]
        others, place = {key: value for key, value in given.items() if key not in ("query", "key", "value")}, inputs[0]

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            own = {key: value.to(query.device) if isinstance(value, Tensor) else value for key, value in others.items()}
            return _attention(function, query, key, value, **own)[0]

        # Below autograd, where operations are seen, nothing is differentiated unless it is asked for.
        above = ExcludeDispatchKeys(DispatchKey.AutogradFunctionality, False)
        with disable_current_modes(), above, torch.enable_grad():
            reached = compared(attention, attention, on_cpu(inputs), {}, place.device)
        for way, measured in reached.items():
            if way.startswith("backward"):
                self._note(f"gradients of {function}", "backward", self._place()[1], place, measured)

    def with_reference(self, operation: str, version: Callable[..., Any]) -> Callable[..., Any]:
        """`version` of one of this house's operations, compared with the reference at each call, forward and backward.

        For `zili.ops.registry.replaced`: the CPU has no kernel of a vendor's fused operation to compare with.
        """
        reference = OPERATIONS[operation]

        def called(*arguments: Any, **keywords: Any) -> Any:
            place = next(leaf.device for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
            lowered = torch.is_autocast_enabled(place.type)
            # Where the chip lowers what it is given, the CPU does too; fp64 is left as it is by both.
            cpus = torch.autocast("cpu", torch.get_autocast_dtype(place.type), lowered)
            with disable_current_modes(), torch.enable_grad(), cpus:
                host, host_keywords = on_cpu((arguments, keywords))
                reached = compared(version, reference, host, host_keywords, place)
            _, module = self._place()
            first = next(leaf for leaf in host if isinstance(leaf, Tensor))
            for way, measured in reached.items():
                self._note(f"zili.{operation}", way.split()[0], module, first, measured)
            return version(*arguments, **keywords)

        return called

    def _has_no_numbers(self, function: Any, given: Any) -> bool:
        """Whether there is nothing to compare: no tensor of the device, only a view, or of other processes."""
        name = str(function)
        if not any(isinstance(leaf, Tensor) and leaf.device.type == self.device_type for leaf in tree_leaves(given)):
            return True
        return function.is_view or name.startswith((*_WITHOUT_NUMBERS, *_OTHER_PROCESSES))

    def _judge(self, function: Any, found: Tensor, same: Tensor, exact: Tensor) -> None:
        self._note(str(function), *self._place(), found, distance(found, same, exact))

    def _note(self, operation: str, way: str, module: str, result: Tensor, measured: Distance) -> None:
        dtype = str(result.dtype).removeprefix("torch.")
        kind = self.seen.setdefault(f"{operation} {dtype}", Checked())
        kind.calls += 1
        kind.worst = max(kind.worst, measured.share)
        if not measured.fits:
            self.offences.append(Offence(self.step, way, module, operation, tuple(result.shape), dtype, measured))


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Tensor) for one in value)


def _is_attention(function: Any) -> bool:
    """Whether it is one of torch's fused attentions, forward."""
    name = str(function)
    return "scaled_dot_product" in name and "backward" not in name and "_math" not in name


def _is_random(function: Any, arguments: Any, keywords: Any) -> bool:
    """Whether it draws numbers. Fused attentions say that they may, and do with dropout alone."""
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return False
    if not _is_attention(function):
        return True
    return bool(arguments_by_name(function, arguments, keywords).get("dropout_p", 0.0))


def _attention(function: Any, *arguments: Any, **keywords: Any) -> tuple[Tensor]:
    """What each of torch's fused attentions computes."""
    given = arguments_by_name(function, arguments, keywords)
    query, key, value = given["query"], given["key"], given["value"]
    bias = given.get("attn_bias", given.get("attn_mask"))
    causal = bool(given.get("is_causal"))
    return (scaled_dot_product_attention(query, key, value, bias, is_causal=causal, scale=given.get("scale")),)


def _results(function: Any, arguments: Any, out: Any) -> list[Tensor]:
    """What an operation wrote: the arguments it changed, and its outputs."""
    changed = [
        argument
        for given, argument in zip(function._schema.arguments, arguments, strict=False)
        if given.alias_info is not None and given.alias_info.is_write
    ]
    # A sort's indices may differ where its values tie; what a fused attention keeps for its gradient is its own affair.
    outputs = [] if changed else (list(out[:1]) if _ranks(function) or _is_attention(function) else [out])
    return [leaf for leaf in tree_leaves((changed, outputs)) if isinstance(leaf, Tensor)]


def _ranks(function: Callable[..., Any]) -> bool:
    return str(function).startswith(("aten.sort", "aten.topk", "aten.max.dim", "aten.min.dim"))


@dataclass
class Alignment:
    """What `zili align` found."""

    chip: str
    losses: list[tuple[float, float]]
    """The chip's and the CPU's, for each step."""
    offences: list[Offence]
    seen: dict[str, Checked] = field(default_factory=dict)
    unchecked: set[str] = field(default_factory=set)

    @property
    def first(self) -> Offence | None:
        """Where the chip first leaves the reference."""
        return self.offences[0] if self.offences else None
