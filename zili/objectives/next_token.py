"""Learning to predict the next token, and beside it the one after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zili.config.model import ModelConfig
from zili.data.loader import Batch
from zili.models.decoder import Block
from zili.models.layers import Linear, RMSNorm
from zili.models.outputs import Outputs
from zili.objectives.objective import Objective, Peers, Terms, targets
from zili.ops import IGNORE_INDEX

NEXT_TOKENS = "next_tokens"
"""Name of multi-token prediction's module in a decoder, and so of its weights in checkpoints."""


class NextToken(Objective):
    """Cross entropy of the token after each position."""

    def terms(self, outputs: Outputs, batch: Batch, peers: Peers) -> Terms:
        return Terms(outputs.cross_entropy(batch.labels), {}, targets(batch.labels))


class NextTokens(nn.Module):
    """One more block, which predicts the token after the next (DeepSeek-V3, section 2.2).

    It sees the hidden state of a position and the embedding of its next token. Embedding and output matrix are the
    model's own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.projection = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, config.layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, outputs: Outputs, following: Tensor) -> Tensor:
        """Hidden states `[B, S, D]` that predict the token after `following [B, S]`."""
        joined = torch.cat((self.embedding_norm(outputs.embed(following)), self.hidden_norm(outputs.hidden)), -1)
        hidden: Tensor = self.norm(outputs.run(self.block, self.projection(joined)))
        return hidden


class MultiToken(Objective):
    """The next token, and with a weight the one after it (DeepSeek-V3, section 2.2). The value is the next token's."""

    figures = ("next_loss",)
    """The loss of the token after the next, summed over the targets of the next."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def modules(self, model: ModelConfig) -> dict[str, nn.Module]:
        return {NEXT_TOKENS: NextTokens(model)}

    def prepare(self, batch: Batch) -> Batch:
        """Labels `[B, S, 2]`: beside each the one after it.

        None where that is another document's, nor after a token that is not learned: it is predicted from the label
        before it, and there is none.
        """
        labels, documents = batch.labels, batch.document_ids
        following = labels.roll(-1, 1)
        following[:, -1] = IGNORE_INDEX
        counted = (documents == documents.roll(-1, 1)) & (labels != IGNORE_INDEX)
        return batch._replace(labels=torch.stack((labels, following.where(counted, IGNORE_INDEX)), -1))

    def terms(self, outputs: Outputs, batch: Batch, peers: Peers) -> Terms:
        """Without gradients the token after the next is not predicted: it is there for learning alone."""
        labels, following = batch.labels.unbind(-1)
        loss = outputs.cross_entropy(labels)
        if not torch.is_grad_enabled():
            return Terms(loss, {"next_loss": torch.zeros_like(loss)}, targets(labels))
        predicts = outputs.decoder.get_submodule(NEXT_TOKENS)
        further = outputs.cross_entropy(following, predicts(outputs, labels.clamp(min=0)))
        weighted = self.weight * further
        # Differentiated together, reported apart.
        loss = loss + (weighted - weighted.detach())
        return Terms(loss, {"next_loss": further.detach()}, targets(labels))
