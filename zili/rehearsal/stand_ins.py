"""Operations as a chip runs them, where the stock form cannot be rehearsed: the same shapes, bytes kept and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zili.ops import product
from zili.ops.chunked_cross_entropy import as_on_an_accelerator, chunked_linear_cross_entropy


class _Grouped(torch.autograd.Function):
    """A grouped product in fp32: torch's own knows the shapes of bf16 alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        return x @ weights[0].t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        one = grad.t() @ x  # as many products as over all experts
        del one
        return grad @ weights[0], torch.empty_like(weights)


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`zili.ops.product.grouped` on tensors without memory."""
    if torch.is_autocast_enabled(x.device.type) or x.dtype == torch.bfloat16:
        return product.grouped(x, weights, ends)
    return _Grouped.apply(x, weights)


STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    # On the host it looks at values, and there are none.
    chunked_linear_cross_entropy: as_on_an_accelerator,
    product.grouped: grouped,
}


def stand_in(operation: str, version: Callable[..., Any]) -> Callable[..., Any]:
    """What is rehearsed in place of `version`; for `zili.ops.registry.replaced`."""
    return STAND_INS.get(version, version)
