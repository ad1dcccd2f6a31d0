"""The plain PyTorch form of every operation: what each faster version is checked against."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zili.ops.grouped_heads import scaled_dot_product_attention

IGNORE_INDEX = -100
Reduction = Literal["sum", "none"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., I] @ weight [O, I]^T + bias [O]` -> `[..., O]`."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of `x [..., D]` (Zhang and Sennrich 2019, eq. 4).

    Normalised in fp32, cast back, then multiplied by `weight [D]`: the order of the TeleChat and Llama reference code.
    The result has the input's dtype, also where the weight is finer.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * weight).to(x.dtype)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of `x + branch`, and that sum, in the dtype of `x`: a residual stream and what joins it."""
    total = x + branch
    return rms_norm(total, weight, eps), total


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x [B, S, H, d]` by `cos, sin [S, d]`, rotate-half convention (Su et al. 2021, as in GPT-NeoX)."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020)."""
    return F.silu(gate) * up


def grouped_matmul(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows `x [M, I]`, some for each of `weights [E, O, I]`: rows up to `ends[e]` (int32 `[E]`) by `weights[e]^T`.

    Returns `[M, O]`. An expert may have no rows.
    """
    starts = [0, *ends.tolist()]
    rows = [x[start:end] for start, end in pairwise(starts)]
    return torch.cat([linear(part, weight) for part, weight in zip(rows, weights.unbind(), strict=True)])


def permute(x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `x [N, D]`, one for each of its `experts [N, k]`, sorted by expert: `[N k, D]`; and `places [N k]`, where
    the row for each token and choice went."""
    order = experts.flatten().argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return x[order // experts.shape[1]], places


def unpermute(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Sum of each token's `rows [N k, D]`, found by the `places` of `permute`, times `weights [N, k]`: `[N, D]`."""
    # Each result beside the others of its token, so that a token's sum has one order.
    return (rows[places].unflatten(0, weights.shape) * weights[..., None]).sum(1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, document_ids: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention within documents, scale 1/sqrt(d).

    Args:
        query: `[B, S, H, d]`.
        key, value: `[B, T, K, d]` with H a multiple of K; T >= S when earlier tokens come from a cache, the
            queries being the last S positions.
        document_ids: `[B, T]` integers; a query sees only keys of its own document. They must not decrease along
            a row, as documents laid end to end do not: faster versions rely on it. None: one document.
        dropout: probability on the attention weights.
    Returns:
        `[B, S, H, d]`.
    """
    queries, keys = query.shape[1], key.shape[1]
    visible = None
    if document_ids is not None:
        rows = document_ids[:, keys - queries :, None]
        visible = (rows == document_ids[:, None, :])[:, None]
    if queries != keys or visible is not None:
        causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        visible = causal if visible is None else visible & causal
    out = scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        visible,
        dropout,
        is_causal=visible is None,
    )
    return out.transpose(1, 2)


class VocabularyPart(Protocol):
    """Which rows of an output matrix a process has, and how the processes that have the others are heard."""

    first: int
    """Row of the whole matrix that this part begins with."""

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over all parts, with its gradient: each part's share is the whole upstream gradient."""

    def max(self, x: Tensor) -> Tensor:
        """Largest of `x` over all parts, element by element; no gradient."""


class Whole:
    """The only part of a vocabulary that is not shared out."""

    first = 0

    def sum(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    multiplier: float = 1.0,
    part: VocabularyPart | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """Sum over rows of the cross entropy of `multiplier * hidden [N, D] @ weight [V, D]^T` against `labels [N]`.

    Rows whose label is `IGNORE_INDEX` count nothing. Logits are taken to fp32. Returns a 0-d fp32 sum; the
    caller divides by the number of targets of the whole batch, which one rank or micro-batch does not know. With the
    `reduction` "none" the rows' own, `[N]` fp32.

    With `part`, `weight` is some rows of the whole matrix. The sum is that of all of it, on every process alike, and
    the gradient of `hidden` is this process's term (Shoeybi et al. 2019, section 3).
    """
    logits = linear(hidden, weight).float() * multiplier
    if part is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction=reduction)
    counted = labels != IGNORE_INDEX
    target = labels - part.first
    mine = counted & (target >= 0) & (target < len(weight))
    top = part.max(logits.detach().amax(1))
    total = part.sum((logits - top[:, None]).exp().sum(1))
    wanted = part.sum(logits.gather(1, target.where(mine, 0)[:, None]).squeeze(1) * mine)
    losses = (total.log() + top - wanted) * counted
    return losses.sum() if reduction == "sum" else losses
