"""Learning from preferences: the chosen answer to a question becomes likelier than the rejected one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zili.data.loader import Batch
from zili.models.outputs import Outputs
from zili.objectives.objective import Objective, Peers, Terms
from zili.ops import IGNORE_INDEX


def pairs_in(document_ids: Tensor, documents: int) -> Tensor:
    """Which pairs are in rows `document_ids [B, S]` of up to `documents` documents, `[B, documents / 2]` bool.

    Documents 2j and 2j + 1 of a row are pair j, the chosen first. Padding may look like the first of one more pair.
    """
    second = torch.arange(1, documents, 2, device=document_ids.device)
    return (document_ids[:, :, None] == second).any(1)


def log_probabilities(outputs: Outputs, batch: Batch, peers: Peers) -> Tensor:
    """This process's terms of what the model gives each document of a row, `[B, N]` as `batch.reference` is."""
    return _of_documents(outputs, batch, peers)[0]


def _of_documents(outputs: Outputs, batch: Batch, peers: Peers) -> Tensor:
    """This process's terms of log-probability and number of learned tokens of each document, `[2, B, N]`."""
    assert batch.reference is not None
    losses = outputs.cross_entropy(batch.labels, reduction="none")
    number = torch.arange(batch.reference.shape[1], device=losses.device)
    of = peers.take(batch.document_ids)[:, None] == number[:, None]
    # A sum in a fixed order, where scatter_add's is not on every chip.
    counted = batch.labels != IGNORE_INDEX
    return torch.stack([torch.where(of, values[:, None], 0.0).sum(-1) for values in (-losses, counted)])


class Preference(Objective):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), of rows in which pairs of answers are packed.

    `-log sigmoid(beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))`, where p is the model
    and q the reference, which it began as; and `likelihood` times the mean loss of a chosen answer's tokens (Pang et
    al. 2024), since the margin also grows where both answers become less likely, the rejected faster.
    """

    figures = ("reward_chosen", "reward_rejected", "reward_accuracy")
    """Rewards of the chosen answers and of the rejected (beta times what the model gives them over the reference), and
    pairs in which the chosen has the larger."""

    def __init__(self, beta: float, likelihood: float = 0.0) -> None:
        self.beta, self.likelihood = beta, likelihood

    def terms(self, outputs: Outputs, batch: Batch, peers: Peers) -> Terms:
        """The sum over pairs. Each process of `peers` reports its share of the value, and differentiates the whole by
        the positions that it has."""
        assert batch.reference is not None
        probabilities, tokens = peers.total(_of_documents(outputs, batch, peers))
        rewards = self.beta * (probabilities - batch.reference)
        chosen, rejected = rewards[:, 0::2], rewards[:, 1::2]
        there = pairs_in(batch.document_ids, batch.reference.shape[1])
        losses = -F.logsigmoid(chosen - rejected)
        if self.likelihood:
            losses = losses - self.likelihood * (probabilities / tokens.clamp(min=1))[:, 0::2]
        loss = torch.where(there, losses, 0.0).sum()
        figures = torch.stack((chosen, rejected, (chosen > rejected).float())).detach()
        figures = torch.where(there, figures, 0.0).sum((1, 2)) / peers.size
        own = loss if peers.size == 1 else loss - (loss - loss / peers.size).detach()
        return Terms(own, dict(zip(self.figures, figures, strict=True)), there.sum() / peers.size)
