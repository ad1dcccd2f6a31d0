"""The base of objectives: from a model's outputs for a batch to a loss and to figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from zili.config.model import ModelConfig
from zili.data.loader import Batch
from zili.models.outputs import Outputs
from zili.ops import IGNORE_INDEX


@dataclass(frozen=True)
class Terms:
    """What one process adds for some rows to sums over all rows and processes. All are 0-d fp32."""

    loss: Tensor
    """Sum over targets: what is differentiated. Its value is what is reported."""
    figures: dict[str, Tensor]
    """Other sums over targets that are reported, without gradient, under the objective's `figures`."""
    count: Tensor
    """How many targets the sums are over."""


class Peers(Protocol):
    """The processes that have other positions of the same rows."""

    size: int
    """How many there are, this one included."""

    def take(self, rows: Tensor) -> Tensor:
        """`rows [B, S, ...]` -> this process's positions of them, `[B, S / size, ...]`."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of what all have, on each. Its gradient on each process is that of the process's own term."""


class Alone:
    """`Peers` of a process that has whole rows."""

    size = 1

    def take(self, rows: Tensor) -> Tensor:
        return rows

    def total(self, x: Tensor) -> Tensor:
        return x


class Objective:
    """What a model learns. Subclass it and override `terms`.

    An objective keeps nothing of a batch: everything that it found goes into `Terms`. So the same object serves every
    micro-batch, in any order, and evaluation too.
    """

    figures: tuple[str, ...] = ()
    """Names of `Terms.figures`: processes without the last layer must know them too."""

    teacher: ModelConfig | None = None
    """The shape of a model that is asked about the same rows and does not learn: `Outputs.teacher`. None: there is
    none."""

    def modules(self, model: ModelConfig) -> dict[str, nn.Module]:
        """What is learned beside the decoder, by name: it is put into the part with the last layer, where it is cut,
        sharded, saved and optimized as the decoder's own. Built on the `meta` device."""
        return {}

    def prepare(self, batch: Batch) -> Batch:
        """`batch` of whole rows, before processes take positions of them: for what looks at neighbours."""
        return batch

    def terms(self, outputs: Outputs, batch: Batch, peers: Peers) -> Terms:
        """Loss and figures of some rows, inside the forward pass of the part with the last layer.

        Args:
            outputs: hidden states of this process's positions, and the head.
            batch: ids and labels `[B, S / peers.size]` of this process's positions; documents and padding `[B, S]` of
                whole rows.
            peers: for what has to be summed over whole rows.
        """
        raise NotImplementedError


Ask = Callable[[Outputs, Batch, Peers], Tensor]
"""Something else that is asked of some rows, as `Objective.terms` is: one tensor, for instance a value a row."""


def checked_terms(objective: Objective, outputs: Outputs, batch: Batch, peers: Peers) -> Terms:
    """What `objective.terms` gives, if it is what can be added up and differentiated.

    Raises:
        TypeError: it is not; the message says what is and what should be.
    """
    terms = objective.terms(outputs, batch, peers)
    who = f"{type(objective).__name__}.terms"
    if not isinstance(terms, Terms):
        raise TypeError(f"{who} gives {type(terms).__name__}; return zili.Terms(loss, figures, count)")
    if set(terms.figures) != set(objective.figures):
        raise TypeError(
            f"{who} gives the figures {sorted(terms.figures)}, and `figures` names {sorted(objective.figures)}; "
            "they must be the same"
        )
    for name, value in {"loss": terms.loss, "count": terms.count, **terms.figures}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{who}: {name} is {type(value).__name__}; give a 0-d tensor, a sum over targets")
        if value.ndim:
            raise TypeError(f"{who}: {name} has the shape {list(value.shape)}; give a 0-d tensor, a sum over targets")
    if torch.is_grad_enabled() and not terms.loss.requires_grad:
        raise TypeError(f"{who}: loss has no gradient; make it of what `outputs` gives, without detach()")
    return terms


def targets(labels: Tensor) -> Tensor:
    """How many of `labels` count, 0-d fp32."""
    return (labels != IGNORE_INDEX).sum().float()
