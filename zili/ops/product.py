"""One matrix product, `a @ b^T`, by the faster of the libraries that torch carries.

torch sends fp32 products to its BLAS. That BLAS (MKL in the wheels) is slow on CPUs that are not its maker's. On an AMD
Zen 5 it reached 205 GFLOP/s, and oneDNN, in the same wheel, reached 465 (docs/benchmarks.md). oneDNN's fp32 product is
reachable only as `mkldnn::_linear_pointwise`, which has no gradient: `linear` adds one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zili import torch_private
from zili.ops.reference import grouped_matmul

Product = Callable[[Tensor, Tensor], Tensor]


def plain(a: Tensor, b: Tensor) -> Tensor:
    """`a [..., K] @ b [N, K]^T` -> `[..., N]`, by torch's own choice of library."""
    return F.linear(a, b)


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """The same through oneDNN; fp32 on the CPU, any strides."""
    return torch_private.onednn_product(a, b, None, "none", [], "")


LIBRARIES: dict[str, Product] = {"plain": plain, "onednn": onednn}
_library = "plain"


def library() -> str:
    """Name in `LIBRARIES` of the product that other operations build on; it goes with the choice of `linear`."""
    return _library


def use_library(name: str) -> None:
    """Make `library()` answer `name`."""
    global _library  # noqa: PLW0603 - one choice a process, as the registry's own
    _library = name


@torch.library.custom_op("zili::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return onednn(x, weight)


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("zili::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight. One operation, so that a compiled block keeps both products opaque and in order."""
    grad, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return onednn(grad, weight.t()).view(x.shape), weight_gradient(grad, rows, onednn).contiguous()


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def weight_gradient(grad: Tensor, x: Tensor, product: Product) -> Tensor:
    """`grad [N, O]^T @ x [N, I]` -> `[O, I]`, of any strides.

    oneDNN repacks its second operand when it is transposed, so the smaller of the two goes there.
    """
    if grad.shape[1] <= x.shape[1]:
        return product(grad.t(), x.t())
    return product(x.t(), grad.t()).t()


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.zili.linear_backward(grad, x, weight)


_linear.register_autograd(_gradients, setup_context=_save)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.linear` through oneDNN, with gradients; what is not fp32 takes torch's own way."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not x.numel():  # oneDNN refuses no rows
        return F.linear(x, weight, bias)
    # Without a gradient there is nothing to add to oneDNN's, and being an operation of its own costs as much as a small
    # product does. What is compiled keeps it.
    plainly = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    out = onednn(x, weight) if plainly else torch.ops.zili.linear(x, weight)
    return out if bias is None else out + bias


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`reference.grouped_matmul` as one operation; rows must be aligned to 16 bytes, or the reference runs."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), weights.to(dtype)
    if not len(x) or any(size * x.element_size() % 16 for size in weights.shape[1:]):
        return grouped_matmul(x, weights, ends)
    return F.grouped_mm(x, weights.transpose(-2, -1), offs=ends)
