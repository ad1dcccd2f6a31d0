"""The few operations worth fusing. Callers use these names; which version runs is chosen once, at start.

`reference` holds the plain PyTorch form and the meaning of every operation; `registry` chooses among the faster ones.
"""

from __future__ import annotations

from torch import Tensor

from zili.ops.reference import IGNORE_INDEX, Reduction, VocabularyPart
from zili.ops.registry import active, choose, chosen, runs_on, versions

__all__ = [
    "IGNORE_INDEX",
    "Reduction",
    "VocabularyPart",
    "add_rms_norm",
    "attention",
    "choose",
    "chosen",
    "grouped_matmul",
    "linear",
    "linear_cross_entropy",
    "permute",
    "rms_norm",
    "rotate",
    "runs_on",
    "swiglu",
    "unpermute",
    "versions",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear`."""
    return active("linear")(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return active("rms_norm")(x, weight, eps)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    return active("add_rms_norm")(x, branch, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotate`."""
    return active("rotate")(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    return active("swiglu")(gate, up)


def grouped_matmul(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """See `reference.grouped_matmul`."""
    return active("grouped_matmul")(x, weights, ends)


def permute(x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.permute`."""
    return active("permute")(x, experts)


def unpermute(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """See `reference.unpermute`."""
    return active("unpermute")(rows, places, weights)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, document_ids: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """See `reference.attention`."""
    return active("attention")(query, key, value, document_ids=document_ids, dropout=dropout)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    multiplier: float = 1.0,
    part: VocabularyPart | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """See `reference.linear_cross_entropy`."""
    return active("linear_cross_entropy")(hidden, weight, labels, multiplier, part, reduction)
