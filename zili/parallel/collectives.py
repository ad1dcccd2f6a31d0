"""Collectives with gradients, on plain tensors: each is the other's backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zili.torch_private import functional_collectives as funcol


class Communicator(NamedTuple):
    """A process group, and the precision in which its processes add up."""

    group: dist.ProcessGroup
    sums_bf16: bool = True
    """Whether their collectives sum bfloat16; else such sums travel in fp32."""


def gather(x: Tensor, dimension: int, communicator: Communicator) -> Tensor:
    """The parts of all processes joined along `dimension`; backward, gradients are summed and each gets its part."""
    return _Gather.apply(x, dimension, communicator)


def scatter_sum(x: Tensor, dimension: int, communicator: Communicator) -> Tensor:
    """The sum over all processes, of which each gets its part of `dimension`; backward, gradients are joined."""
    return _ScatterSum.apply(x, dimension, communicator)


def gathered(x: Tensor, dimension: int, group: dist.ProcessGroup) -> Tensor:
    """`gather` without a gradient."""
    # Joined along the first dimension, which is what every collectives library has.
    parts = funcol.wait_tensor(funcol.all_gather_single(x.contiguous(), 0, group))
    return parts if dimension == 0 else torch.cat(parts.chunk(dist.get_world_size(group)), dimension)


def _scattered(x: Tensor, dimension: int, communicator: Communicator) -> Tensor:
    if dimension != 0:
        x = torch.cat(x.chunk(dist.get_world_size(communicator.group), dimension))
    travelling = x.float() if x.dtype == torch.bfloat16 and not communicator.sums_bf16 else x
    summed = funcol.reduce_scatter_single(travelling.contiguous(), "sum", 0, communicator.group)
    return funcol.wait_tensor(summed).to(x.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dimension: int, communicator: Communicator) -> Tensor:
        ctx.dimension, ctx.communicator = dimension, communicator
        return gathered(x, dimension, communicator.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grad, ctx.dimension, ctx.communicator), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dimension: int, communicator: Communicator) -> Tensor:
        ctx.dimension, ctx.communicator = dimension, communicator
        return _scattered(x, dimension, communicator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gathered(grad, ctx.dimension, ctx.communicator.group), None, None


class AllSum(torch.autograd.Function):
    """The sum over all processes, on each; backward, the gradient passes as it is: every process has all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return funcol.wait_tensor(funcol.all_reduce(x, "sum", group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def exchange(x: Tensor, sizes_in: list[int], sizes_out: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows `x [M, D]`, `sizes_in[p]` of them for process p, against `sizes_out[p]` from it; backward, the reverse."""
    return _Exchange.apply(x, sizes_in, sizes_out, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes_in: list[int], sizes_out: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sizes_in, sizes_out), group
        return exchanged(x, sizes_in, sizes_out, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sizes_in, sizes_out = ctx.sizes
        return exchanged(grad, sizes_out, sizes_in, ctx.group), None, None, None


def exchanged(x: Tensor, sizes_in: list[int], sizes_out: list[int], group: dist.ProcessGroup) -> Tensor:
    """`exchange` without a gradient."""
    return funcol.wait_tensor(funcol.all_to_all_single(x.contiguous(), sizes_out, sizes_in, group))
