"""Operations as a chip runs them, where the stock form cannot be rehearsed: the same shapes, bytes kept and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from zili.ops import product, reference
from zili.ops.chunked_cross_entropy import chunked_linear_cross_entropy
from zili.ops.grouped_heads import for_each_group

FUSED = "fused"
"""The stand-in for a chip's attention, beside the names of `chip.operations.attention`."""


class _Grouped(torch.autograd.Function):
    """A grouped product in fp32, or of matrices that are not aligned: torch's own knows the shapes of others alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        return x @ weights[0].t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weights = ctx.saved_tensors
        of_input, of_weights = ctx.needs_input_grad
        grad_x = grad @ weights[0] if of_input else None
        if of_weights:
            grad.t() @ x  # as many products as over all experts, which are not kept
        return grad_x, torch.empty_like(weights) if of_weights else None


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`zili.ops.product.grouped`, and its reference, on tensors without memory."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), weights.to(dtype)
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    if x.dtype == torch.bfloat16 and aligned:
        return product.grouped(x, weights, ends)
    return _Grouped.apply(x, weights)


# ---- attention by one kernel: what every vendor has, and the host has not


@torch.library.custom_op("zili::rehearsed_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only shapes are computed")


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    # The logarithm of each query's sum is kept, with which scores are made again backward.
    sums = query.new_empty(batch, heads, length, dtype=torch.float32)
    return query.new_empty(batch, length, heads, value.shape[-1]), sums


@torch.library.custom_op("zili::rehearsed_attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("only shapes are computed")


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, _, _ = ctx.saved_tensors
    return torch.ops.zili.rehearsed_attention_backward(grad, query, key, value)


_attention.register_autograd(_gradients, setup_context=_save)


def _heads_first(shape: torch.Size) -> tuple[int, ...]:
    return shape[0], shape[2], shape[1], shape[3]


@register_flop_formula(torch.ops.zili.rehearsed_attention)
def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, **_: Any) -> int:
    return sdpa_flop_count(*map(_heads_first, (query, key, value)))


@register_flop_formula(torch.ops.zili.rehearsed_attention_backward)
def _backward_flops(grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, **_: Any) -> int:
    return sdpa_backward_flop_count(*map(_heads_first, (grad, query, key, value)))


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, document_ids: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`zili.ops.reference.attention` as a kernel that takes the lengths of documents and makes no mask."""
    key, value = for_each_group(query, key, value, 2)
    return torch.ops.zili.rehearsed_attention(query, key, value)[0]


def stand_in(attention: str, on_host: bool) -> Callable[[str, Callable[..., Any]], Callable[..., Any]]:
    """What is rehearsed in place of a version; for `zili.ops.registry.replaced`."""
    stands: dict[Callable[..., Any], Callable[..., Any]] = {
        # On the host it looks at values, and there are none.
        chunked_linear_cross_entropy: partial(chunked_linear_cross_entropy, like="host" if on_host else "chip"),
        product.grouped: grouped,
        reference.grouped_matmul: grouped,
    }
    if attention == FUSED:
        stands[reference.attention] = fused_attention
    return lambda operation, version: stands.get(version, version)
