"""Errors to plant in operations: a factor in one output or one gradient, sums rounded on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zili.ops.examples import Example


class Place(NamedTuple):
    """A floating output or differentiable input, by its number among the outputs or arguments."""

    way: str
    index: int


def places(function: Callable[..., Any], case: Example) -> list[Place]:
    """Everywhere that a factor can be planted in a call."""
    out = function(*case.arguments, **case.keywords)
    outs = [out] if isinstance(out, Tensor) else list(out)
    found = [Place("output", i) for i, x in enumerate(outs) if x.is_floating_point()]
    tables = {i for i, x in enumerate(case.arguments) if isinstance(x, Tensor) and not x.requires_grad}
    given = enumerate(case.arguments)
    return found + [
        Place("gradient", i) for i, x in given if isinstance(x, Tensor) and x.is_floating_point() and i not in tables
    ]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.backward, None, None


def off_by(function: Callable[..., Any], factor: float, place: Place) -> Callable[..., Any]:
    """`function` with that output, or that gradient alone, multiplied by `factor`."""

    def called(*arguments: Any, **keywords: Any) -> Any:
        given = list(arguments)
        if place.way == "gradient":
            given[place.index] = _Scaled.apply(given[place.index], 1.0, factor)
            return function(*given, **keywords)
        out = function(*given, **keywords)
        if isinstance(out, Tensor):
            return _Scaled.apply(out, factor, 1.0)
        return tuple(_Scaled.apply(x, factor, 1.0) if i == place.index else x for i, x in enumerate(out))

    return called


def summed_in_bf16(a: Tensor, b: Tensor, block: int) -> Tensor:
    """`a @ b` whose sum is rounded after every `block` terms."""
    out = torch.zeros(len(a), b.shape[1], dtype=a.dtype)
    for start in range(0, len(b), block):
        out = out + a[:, start : start + block] @ b[start : start + block]
    return out
