"""Learning from preferences: of two answers to a question, the chosen is to become likelier than the rejected."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pairs_in(document_ids: Tensor, documents: int) -> Tensor:
    """Which pairs are in rows `document_ids [B, S]` of up to `documents` documents, `[B, documents / 2]` bool.

    Documents 2j and 2j + 1 of a row are pair j, the chosen first. Padding may look like the first of one more pair.
    """
    second = torch.arange(1, documents, 2, device=document_ids.device)
    return (document_ids[:, :, None] == second).any(1)


class PreferenceLoss:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), of rows in which pairs of answers are packed.

    `-log sigmoid(beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))`, where p is the model
    and q the reference, which it began as; and `likelihood` times the mean loss of a chosen answer's tokens (Pang et
    al. 2024), since the margin also grows where both answers become less likely, the rejected faster.
    """

    def __init__(
        self,
        beta: float,
        likelihood: float = 0.0,
        total: Callable[[Tensor], Tensor] | None = None,
        sharers: int = 1,
    ) -> None:
        """`total` adds a tensor up over the `sharers` that have the positions of the same rows, of which each
        differentiates its own term."""
        self.beta, self.likelihood = beta, likelihood
        self._total, self._sharers = total, sharers
        self.figures: Tensor | None = None
        """Sums since the trainer last took them, `[3]`: rewards of the chosen answers, of the rejected (beta times what
        the model gives them over the reference), and pairs in which the chosen has the larger."""
        self.kept: list[Tensor] | None = None
        """Where it is a list: the terms of the log-probabilities of each call, `[B, N]`."""

    def __call__(
        self, losses: Tensor, counted: Tensor, document_ids: Tensor, whole_ids: Tensor, reference: Tensor
    ) -> Tensor:
        """This sharer's term of the sum over pairs, 0-d; the gradient is that of the positions here.

        Args:
            losses: cross entropies of the labels here, 0 where none counts, `[B, S / sharers]`.
            counted: which of them count, `[B, S / sharers]` bool.
            document_ids: of the positions here, `[B, S / sharers]`, and of the whole rows, `whole_ids [B, S]`.
            reference: log-probabilities of the documents under the reference, `[B, N]`.
        """
        of = document_ids[:, None] == torch.arange(reference.shape[1], device=losses.device)[:, None]
        # A sum in a fixed order, where scatter_add's is not on every chip.
        sums = torch.stack([torch.where(of, values[:, None], 0.0).sum(-1) for values in (-losses, counted)])
        if self.kept is not None:
            self.kept.append(sums[0].detach())
        probabilities, tokens = sums if self._total is None else self._total(sums)
        rewards = self.beta * (probabilities - reference)
        chosen, rejected = rewards[:, 0::2], rewards[:, 1::2]
        there = pairs_in(whole_ids, reference.shape[1])
        losses = -F.logsigmoid(chosen - rejected)
        if self.likelihood:
            losses = losses - self.likelihood * (probabilities / tokens.clamp(min=1))[:, 0::2]
        loss = torch.where(there, losses, 0.0).sum()
        figures = torch.stack((chosen, rejected, (chosen > rejected).float())).detach()
        figures = torch.where(there, figures, 0.0).sum((1, 2)) / self._sharers
        self.figures = figures if self.figures is None else self.figures + figures
        # Each sharer reports its share of the value, and differentiates the whole by what it has.
        return loss if self._sharers == 1 else loss - (loss - loss / self._sharers).detach()
