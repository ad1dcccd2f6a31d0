"""Context parallelism: each process has some of every sequence's tokens, and sees the keys of all of them.

Keys and values are gathered; K heads of them are fewer than H of queries, and their gradients are summed on the way
back. Masks stay what they are in one process, whatever the documents and the backend: a piece of consecutive queries
attends to the keys up to its end (`ops.attention` with fewer queries than keys). Ring attention would hold fewer keys
at a time, but its stock form is tied to kernels that return their log-sum-exp.

A causal sequence cut into equal consecutive parts gives the last process most of the work. So it is cut into twice as
many pieces and a process has one from the front and its mirror image from the back (Llama 3, section 3.3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zili.models.attention import CausalAttention
from zili.models.decoder import Decoder
from zili.parallel.collectives import AllSum, gather
from zili.parallel.world import World


def pieces(length: int, size: int, rank: int) -> tuple[range, range]:
    """The positions of a row of `length` tokens that process `rank` of `size` has."""
    width = length // (2 * size)
    starts = (rank * width, (2 * size - 1 - rank) * width)
    return range(starts[0], starts[0] + width), range(starts[1], starts[1] + width)


class ContextPart:
    """What this process has of each row."""

    def __init__(self, world: World) -> None:
        self.size, self.rank = world.layout.context, world.context_rank
        self.communicator = world.communicator("context")

    def pieces(self, length: int) -> tuple[range, range]:
        """Positions of this process in rows of `length` tokens, in two runs."""
        return pieces(length, self.size, self.rank)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """The same as one tensor `[length / size]`."""
        return torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in self.pieces(length)])

    def take(self, rows: Tensor) -> Tensor:
        """`rows [B, S, ...]` -> this process's positions of them."""
        return torch.cat([rows[:, piece.start : piece.stop] for piece in self.pieces(rows.shape[1])], 1)

    def total(self, x: Tensor) -> Tensor:
        """The sum of what all have, on each; the gradient is each one's own."""
        return AllSum.apply(x, self.communicator.group)

    def gather(self, x: Tensor) -> Tensor:
        """`[B, S / size, ...]` -> `[B, S, ...]`, in the order of positions."""
        parts = gather(x, 1, self.communicator).chunk(2 * self.size, 1)
        # Each process's two pieces lie side by side; the second ones run backwards.
        return torch.cat((*parts[0::2], *reversed(parts[1::2])), 1)


class ContextAttention(CausalAttention):
    """Attention of this process's queries to the keys of whole rows."""

    def __init__(self, part: ContextPart) -> None:
        super().__init__()
        self.part = part

    def forward(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None, dropout: float) -> Tensor:
        """`query [B, S / c, H, d]`, `key, value [B, S / c, K, d]`, `document_ids [B, S]` -> `[B, S / c, H, d]`."""
        key, value = self.part.gather(key), self.part.gather(value)
        attended = []
        for piece, queries in zip(self.part.pieces(key.shape[1]), query.chunk(2, 1), strict=True):
            seen = slice(0, piece.stop)
            documents = None if document_ids is None else document_ids[:, seen]
            attended.append(super().forward(queries, key[:, seen], value[:, seen], documents, dropout))
        return torch.cat(attended, 1)


def apply_context_parallel(model: Decoder, part: ContextPart) -> None:
    """Let every block's attention see the keys of all processes, and the model know its positions."""
    model.positions = part.positions
    for module in model.modules():
        if isinstance(getattr(module, "core", None), CausalAttention):
            module.core = ContextAttention(part)
