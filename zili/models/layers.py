"""The leaf modules: a linear map, an embedding, a norm. Each computes through `zili.ops`.

They leave their weights unset: `Decoder.init_weights` fills them by name, so that a weight does not depend on
the order in which modules are built, nor on the global random state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zili import ops


class Linear(nn.Linear):
    """`x [..., I]` -> `[..., O]`, weight `[O, I]`. An `nn.Linear`, so tensor-parallel styles know it."""

    def reset_parameters(self) -> None:
        """Does nothing; see the module's docstring."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Ids `[B, S]` -> rows of weight `[V, D]`, `[B, S, D]`."""

    def reset_parameters(self) -> None:
        """Does nothing; see the module's docstring."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, weight `[D]`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
