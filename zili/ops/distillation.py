"""A teacher's probabilities as targets beside labels: linear and both losses together, some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zili.ops.chunked_cross_entropy import chunked_sum, elements_at_once, targets_of_a_part
from zili.ops.product import LIBRARIES, library
from zili.ops.reference import IGNORE_INDEX, VocabularyPart


@dataclass(frozen=True)
class Head:
    """Rows of hidden states, and the output matrix that makes logits of them."""

    hidden: Tensor
    """`[N, D]`; a teacher's D may be another one."""
    weight: Tensor
    """`[V, D]`, or the part of it that `VocabularyPart` says."""
    multiplier: float = 1.0
    """What the product is multiplied by."""


def linear_distillation(
    student: Head, teacher: Head, labels: Tensor, weight: float, temperature: float, part: VocabularyPart
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of `labels [N]` and divergence from the teacher, summed over the labels that count (Hinton et al.
    2015, section 2).

    With p and q the teacher's and the student's probabilities at `temperature` t, the divergence of a row is
    `t^2 sum_v p_v (log p_v - log q_v)`: t^2 keeps its gradient as large at every temperature. Whole logits never exist,
    and only the student is differentiated.

    Returns:
        `(1 - weight) * cross entropy + weight * divergence`, to be differentiated, and both sums without gradient; each
        0-d fp32.
    """
    product = LIBRARIES[library() if student.hidden.dtype == torch.float32 else "plain"]
    matrix = teacher.weight.detach().to(teacher.hidden.dtype)
    sums = torch.zeros(2, device=student.hidden.device)

    def one_chunk(these: slice, rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        logits = product(rows, own).float() * student.multiplier
        wanted = product(teacher.hidden[these], matrix).float() * (teacher.multiplier / temperature)
        counted = (labels[these] != IGNORE_INDEX).float()
        plain, soft, given = _log_softmax(part, logits, temperature, wanted)
        mine, target = targets_of_a_part(part, labels[these], len(own))
        probabilities = given.exp()
        terms = (plain.gather(1, target).squeeze(1) * -mine, (probabilities * (given - soft)).sum(1))
        said, apart = part.sum(torch.stack(terms)).unbind()
        apart = temperature**2 * apart
        sums.add_(torch.stack(((said * counted).sum(), (apart * counted).sum())))
        by_labels = plain.exp_().scatter_add_(1, target, -mine[:, None])
        gradient = by_labels.mul_(1 - weight).add_(soft.exp_().sub_(probabilities), alpha=weight * temperature)
        loss = (((1 - weight) * said + weight * apart) * counted).sum()
        return loss, gradient.mul_(student.multiplier * counted[:, None])

    elements = elements_at_once(student.hidden.device.type == "cpu") // _ALIVE
    loss = chunked_sum(student.hidden, student.weight, one_chunk, product, elements)
    return loss, sums[0], sums[1]


_ALIVE = 6
"""Tensors of a chunk's logits at once, where cross entropy alone has one."""


def _log_softmax(part: VocabularyPart, logits: Tensor, temperature: float, wanted: Tensor) -> list[Tensor]:
    """Log-probabilities by `logits`, by the same at `temperature`, and by `wanted`: `[n, V]` each, of which `part` is
    here. There is one message for all maxima and one for all sums, since small messages cost their latency."""
    top, other = part.max(torch.stack((logits.amax(1), wanted.amax(1)))).unbind()
    plain = logits - top[:, None]
    shifted = [plain, plain / temperature, wanted - other[:, None]]
    sums = part.sum(torch.stack([x.exp().sum(1) for x in shifted]))
    return [x.sub_(total.log()[:, None]) for x, total in zip(shifted, sums, strict=True)]
