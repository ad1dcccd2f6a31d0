"""The leaf modules: a linear map, an embedding, a norm. Each computes through `zili.ops`.

They leave their weights unset: `Decoder.init_weights` fills them by name, so that a weight does not depend on
the order in which modules are built, nor on the global random state.

A weight may be a DTensor, one process's part of a whole that many hold. The arithmetic is always on plain tensors:
`local` takes this process's part. What the parts need from one another happens in *seams*, modules that do nothing
here and that `zili.parallel` replaces by a collective.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from zili import ops


class Seam(nn.Module):
    """A place where tensors may have to cross processes. Alone, a process passes them on."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def lowered(x: Tensor) -> Tensor:
    """`x` in the dtype in which products take it under autocast: lowered once, not by each product for itself."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


class Entrance(Seam):
    """The seam before products that share their input."""

    def forward(self, x: Tensor) -> Tensor:
        return lowered(x)


def local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter, as a plain tensor.

    A parameter that tensor-parallel processes hold whole acts on different tokens in each of them. So what each
    computes is a term of its gradient, and the terms are still to be summed.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(
        grad_placements=[Partial() if isinstance(p, Replicate) else p for p in parameter.placements]
    )


class Linear(nn.Linear):
    """`x [..., I]` -> `[..., O]`, weight `[O, I]`."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.leave: Seam | None = None
        """Where a product whose inner dimension is cut is summed up, before the bias; None where it is whole."""
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.scale = 0.0

    def adapt(self, rank: int, scale: float) -> None:
        """Put an adapter of low rank beside the matrix, which itself stays as it is."""
        self.weight.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank))
        self.scale = scale

    def reset_parameters(self) -> None:
        """Does nothing; see the module's docstring."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias)
        if self.leave is None:
            return self._adapted(ops.linear(x, local(self.weight), bias), x)
        out = self.leave(self._adapted(ops.linear(x, local(self.weight)), x))
        return out if bias is None else out + bias.to(out.dtype)  # as a product takes it

    def _adapted(self, out: Tensor, x: Tensor) -> Tensor:
        if self.lora_a is None or self.lora_b is None:
            return out
        return out + self.scale * ops.linear(ops.linear(x, local(self.lora_a)), local(self.lora_b))


class Embedding(nn.Embedding):
    """Ids `[B, S]` -> rows of weight `[V, D]`, `[B, S, D]`."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__(rows, size)
        self.first_row = 0
        """Row of the whole table that this process's part begins with."""
        self.leave = Seam()

    def reset_parameters(self) -> None:
        """Does nothing; see the module's docstring."""

    def forward(self, ids: Tensor) -> Tensor:
        weight = local(self.weight)
        if len(weight) == self.num_embeddings:
            return self.leave(F.embedding(ids, weight))
        row = ids - self.first_row
        mine = (row >= 0) & (row < len(weight))
        return self.leave(F.embedding(row.where(mine, 0), weight) * mine[..., None])


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, weight `[D]`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, local(self.weight), self.eps)

    def after_adding(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `x + branch`, and that sum."""
        return ops.add_rms_norm(x, branch, local(self.weight), self.eps)
