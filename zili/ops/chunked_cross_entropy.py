"""Linear and cross entropy together, some rows at a time, so that `[N, V]` logits never exist at once.

The gradient is made in the forward pass, while a chunk's probabilities are at hand (the idea of Cut Cross-Entropy,
Wijmans et al. 2024, and of Liger's fused linear cross entropy): one softmax a row instead of two passes over it. That
needs a sum: where each row's loss is asked for, what it will weigh is not known yet, and the backward pass makes the
chunk's logits once more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zili.ops.product import LIBRARIES, Product, library, weight_gradient
from zili.ops.reference import IGNORE_INDEX, Reduction, VocabularyPart, Whole

_CHUNK = 4 * 1024 * 1024
"""Logits at a time: 16 MB of fp32, which stays in a CPU's last-level cache and in its allocator's reach."""
_CHUNK_ELSEWHERE = 512 * 1024 * 1024
"""2 GB on an accelerator: each chunk reads and writes the whole weight gradient, so few, large ones. Not measured."""


OneChunk = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Summed loss of some rows, given which they are, `[n, D]`, and the output matrix `[V, D]`; and its gradient by their
logits before any multiplier, `[n, V]` fp32."""


class _ChunkedSum(torch.autograd.Function):
    """A sum over rows of a loss of their logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        one_chunk: OneChunk,
        product: Product,
        needs_gradient: bool,
        elements: int,
    ) -> Tensor:
        matrix = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight: Tensor | None = None
        learned = ctx.needs_input_grad[1]  # beside adapters the output matrix is not
        size = max(64, elements // len(weight))

        # In a function: what a chunk makes is given back before the next one's logits are there.
        def chunk(these: slice, grad_weight: Tensor | None) -> Tensor | None:
            rows = hidden[these]
            loss, scores = one_chunk(these, rows, matrix)
            total.add_(loss)
            if grad_hidden is None:
                return None
            scores = scores.to(hidden.dtype)
            grad_hidden[these] = product(scores, matrix.t())
            if not learned:
                return None
            part = weight_gradient(scores, rows, product)
            # Summed in the strides it comes in, and straightened once at the end: it is as large as the weight.
            return part.to(weight.dtype) if grad_weight is None else grad_weight.add_(part)

        for start in range(0, len(hidden), size):
            grad_weight = chunk(slice(start, start + size), grad_weight)
        if needs_gradient and learned:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.contiguous()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, None if grad_weight is None else grad_weight * grad, *(None,) * 4


class _ChunkedRowLosses(torch.autograd.Function):
    """The loss of each row. The backward pass keeps rows and the logarithms of their sums."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        multiplier: float,
        vocabulary: VocabularyPart,
        product: Product,
        elements: int,
    ) -> Tensor:
        matrix = weight.to(hidden.dtype)
        losses, sums = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        ctx.size = max(64, elements // len(weight))

        def chunk(these: slice) -> None:
            logits = product(hidden[these], matrix).float().mul_(multiplier)
            mine, target = targets_of_a_part(vocabulary, labels[these], len(matrix))
            top = vocabulary.max(logits.amax(1))
            wanted = logits.gather(1, target).squeeze(1).sub_(top) * mine
            total, wanted = vocabulary.sum(torch.stack((logits.sub_(top[:, None]).exp_().sum(1), wanted)))
            losses[these] = (total.log() - wanted) * (labels[these] != IGNORE_INDEX)
            sums[these] = top + total.log()

        for start in range(0, len(hidden), ctx.size):
            chunk(slice(start, start + ctx.size))
        ctx.save_for_backward(hidden, weight, labels, sums)
        ctx.multiplier, ctx.vocabulary, ctx.product = multiplier, vocabulary, product
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, sums = ctx.saved_tensors
        matrix = weight.to(hidden.dtype)
        grad = grad * (labels != IGNORE_INDEX) * ctx.multiplier
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None

        def chunk(these: slice) -> None:
            rows, by = hidden[these], grad[these, None]
            logits = ctx.product(rows, matrix).float().mul_(ctx.multiplier)
            mine, target = targets_of_a_part(ctx.vocabulary, labels[these], len(matrix))
            scores = logits.sub_(sums[these, None]).exp_().mul_(by).scatter_add_(1, target, -mine[:, None] * by)
            scores = scores.to(hidden.dtype)
            grad_hidden[these] = ctx.product(scores, matrix.t())
            if grad_weight is not None:
                grad_weight.add_(weight_gradient(scores, rows, ctx.product))

        for start in range(0, len(hidden), ctx.size):
            chunk(slice(start, start + ctx.size))
        return grad_hidden, grad_weight, *(None,) * 5


def targets_of_a_part(part: VocabularyPart, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which `labels [n]` are among the part's `size` tokens, `[n]` fp32, where `[n, 1]` (0: nowhere)."""
    target = labels - part.first
    mine = (labels != IGNORE_INDEX) & (target >= 0) & (target < size)
    return mine.float(), target.where(mine, 0)[:, None]


def _one_chunk(
    labels: Tensor, multiplier: float, product: Product, these: slice, rows: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed loss of `rows [n, D]`, and its gradient by their logits before the multiplier, `[n, V]` fp32.

    Of the host alone: it looks at values twice, for which an accelerator would have to be waited for.
    """
    labels, logits = labels[these], product(rows, matrix).float()
    if multiplier != 1.0:
        logits.mul_(multiplier)
    counted = labels != IGNORE_INDEX
    targets = labels.where(counted, 0)[:, None]
    probabilities = torch.softmax(logits, -1, out=logits)
    loss = -probabilities.gather(1, targets).log().squeeze(1)
    lost = loss.isinf()
    if bool(lost.any()):  # a probability below 1e-38 is zero in fp32; its logarithm is not
        logits = product(rows[lost], matrix).float() * multiplier
        loss[lost] = logits.logsumexp(1) - logits.gather(1, targets[lost]).squeeze(1)
    probabilities.scatter_add_(1, targets, torch.full_like(targets, -1.0, dtype=torch.float32))
    if multiplier != 1.0 or not bool(counted.all()):
        probabilities.mul_(counted.to(torch.float32)[:, None] * multiplier)
    return loss.where(counted, 0.0).sum(), probabilities


def _one_chunk_of_a_part(
    part: VocabularyPart,
    labels: Tensor,
    multiplier: float,
    product: Product,
    these: slice,
    rows: Tensor,
    matrix: Tensor,
) -> tuple[Tensor, Tensor]:
    """`_one_chunk` where `matrix` is some rows of the whole output matrix; the gradient is by this part's logits.

    On any device: what happens depends on no value.
    """
    labels, logits = labels[these], product(rows, matrix).float()
    if multiplier != 1.0:
        logits.mul_(multiplier)
    counted = labels != IGNORE_INDEX
    mine, target = targets_of_a_part(part, labels, len(matrix))
    top = part.max(logits.amax(1))
    wanted = logits.gather(1, target).squeeze(1).sub_(top) * mine
    exponentials = logits.sub_(top[:, None]).exp_()
    # One message for both sums: a chunk's messages are small, and their latency is what they cost.
    total, wanted = part.sum(torch.stack((exponentials.sum(1), wanted)))
    scale = counted * multiplier
    gradient = exponentials.mul_((scale / total)[:, None]).scatter_add_(1, target, -(mine * multiplier)[:, None])
    return ((total.log() - wanted) * counted).sum(), gradient


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    multiplier: float = 1.0,
    part: VocabularyPart | None = None,
    reduction: Reduction = "sum",
    *,
    like: Literal["host", "chip"] | None = None,
) -> Tensor:
    """`reference.linear_cross_entropy` without `[N, V]` logits, on any device.

    `like`: as it runs there, whatever the device is, and without a look at values: for rehearsals.
    """
    on_host = hidden.device.type == "cpu" if like is None else like == "host"
    elements = elements_at_once(on_host)
    if part is None and (reduction == "none" or like is not None or not on_host):
        part = Whole()
    # oneDNN's product knows fp32 alone; every other dtype goes torch's way.
    product = LIBRARIES[library() if hidden.dtype == torch.float32 else "plain"]
    if reduction == "none":
        return _ChunkedRowLosses.apply(hidden, weight, labels, multiplier, part, product, elements)
    if part is None:
        return chunked_sum(hidden, weight, partial(_one_chunk, labels, multiplier, product), product, elements)
    one_chunk = partial(_one_chunk_of_a_part, part, labels, multiplier, product)
    return chunked_sum(hidden, weight, one_chunk, product, elements)


def elements_at_once(on_host: bool) -> int:
    """How many logits are made at a time."""
    return _CHUNK if on_host else _CHUNK_ELSEWHERE


def chunked_sum(hidden: Tensor, weight: Tensor, one_chunk: OneChunk, product: Product, elements: int) -> Tensor:
    """The sum over rows `hidden [N, D]` of a loss of their logits, 0-d fp32: `elements` logits at a time, and gradients
    made with the loss."""
    # Asked here: inside an autograd function gradients are off, whether the caller wants them or not.
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedSum.apply(hidden, weight, one_chunk, product, needs_gradient, elements)
