"""What a forward pass leaves to its caller: hidden states, the head as an operation, and what the routers did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from zili import ops
from zili.models.layers import local
from zili.ops import Reduction, VocabularyPart
from zili.ops.reference import Whole

if TYPE_CHECKING:
    from zili.models.decoder import Decoder


class RouterFigures(NamedTuple):
    """What one router did with the rows of a forward pass that learns."""

    layer: int
    tokens: Tensor
    """Tokens that went to each expert, `[E]` fp32. Padding does not count."""
    balance_loss: Tensor
    """Summed over the tokens here, 0-d, without gradient: it is differentiated already."""


@dataclass
class Routing:
    """What the routers of a forward pass are told, and what they tell."""

    padding: Tensor | None = None
    """`[B, S]` bool of whole rows: positions that count neither in the balance loss nor as load. None: all count."""
    weight: float = 1.0
    """What the balance loss is multiplied by. It is a sum over all positions, and a trainer divides by the number of
    targets, which may be fewer: it gives the mean number of targets a position."""
    figures: list[RouterFigures] = field(default_factory=list)
    """One entry a router, in the order of layers. A block that is computed again for its backward pass adds its entry
    again, so read them right after the forward pass."""


@dataclass(frozen=True)
class Outputs:
    """What the part of a decoder with the last layer computed for some rows.

    It is to be used inside the forward pass only (`Decoder.forward`'s `then`): where weights are sharded, the head's
    are together only there.
    """

    decoder: Decoder
    hidden: Tensor
    """After the final norm, `[B, S, D]`. Where processes share the tokens of a row, the tokens of this process."""
    routers: tuple[RouterFigures, ...]
    """Figures of the routers in this part of the model."""
    run: Callable[[nn.Module, Tensor], Tensor]
    """Runs another block on hidden states `[B, S, D]` of the same rows, as the decoder runs its own."""

    teacher: Outputs | None = None
    """What a model beside the one that learns computed for the same rows, if the objective has one."""

    @property
    def vocabulary(self) -> VocabularyPart:
        """Which rows of the output matrix are here, and sums and maxima over those that have the others."""
        return self.decoder.vocabulary or Whole()

    def take(self, rows: Tensor) -> Tensor:
        """The part of `rows [B, S, ...]`, such as labels, that belongs to the tokens in `hidden`: fewer where processes
        share them."""
        return rows if self.decoder.tokens is None else self.decoder.tokens(rows)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes that share the tokens of `take`. On each the gradient is that of its own term."""
        return self.vocabulary.sum(x)

    def logits(self, hidden: Tensor | None = None) -> Tensor:
        """fp32 logits `[B, S, V]` of `hidden`, by default the model's own; of the part of the vocabulary that is here.

        The whole `[B, S, V]` exists at once: `cross_entropy` needs less.
        """
        return self.decoder.logits(self.decoder.gather(self.hidden if hidden is None else hidden))

    def cross_entropy(self, labels: Tensor, hidden: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        """Cross entropy of `labels [B, S]`, without whole logits and over all of the vocabulary.

        `IGNORE_INDEX` counts nothing. "sum" gives 0-d fp32, "none" `[B, S]`.
        """
        decoder = self.decoder
        states = decoder.gather(self.hidden if hidden is None else hidden).flatten(0, 1)
        weight, multiplier = local(decoder.head_weight), decoder.config.logit_multiplier
        found = ops.linear_cross_entropy(states, weight, labels.flatten(), multiplier, decoder.vocabulary, reduction)
        return found if reduction == "sum" else found.view(labels.shape)

    def logsumexp(self, logits: Tensor) -> Tensor:
        """The logsumexp `[B, S]` of `logits [B, S, V]`, as `logits` gives them, over the whole vocabulary."""
        top = self.vocabulary.max(logits.detach().amax(-1))
        return self.vocabulary.sum((logits - top[..., None]).exp().sum(-1)).log() + top

    def embed(self, ids: Tensor) -> Tensor:
        """`ids [B, S]` -> `[B, S, D]`, as the model embeds what it is given."""
        return self.decoder.embed(ids)


def logits(outputs: Outputs) -> Tensor:
    """`[B, S, V]` fp32: what a model is asked for most."""
    return outputs.logits()


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """`x` times a multiplier that most models do not have: then no pass over it for nothing."""
    return x if multiplier == 1.0 else x * multiplier
