"""Muon for matrices of which each process may hold only a part, with the results of one process.

The Newton-Schulz iteration needs a whole matrix. So matrices of one shape are dealt out: each process gathers some of
them whole, orthogonalises those, and sends every process its part back. That is two all-to-alls a matrix, and each
matrix is worked on once; gathering all of them everywhere would repeat the work on every process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim import Optimizer

from zili.parallel.model import plain
from zili.torch_private import StridedShard

_COEFFICIENTS, _STEPS = (3.4445, -4.7750, 2.0315), 5
"""Jordan's of the iteration, as `torch.optim.Muon` has them by default."""
_LEAST_NORM = 1e-7
_ADAMW_SIZE = 0.2
"""Root mean square of AdamW's updates (Liu et al. 2025, eq. 4)."""


class Muon(Optimizer):
    """`torch.optim.Muon` with Nesterov momentum, for parts of matrices and for stacks of them too.

    A parameter `[E, O, I]` is E matrices, as the experts of a mixture are. `dtype` is that of the iteration. In bf16
    the results are torch's, bit for bit. In fp32 they do not depend on the last bit of a gradient, which bf16 rounds to
    one neighbour or the other. Sources: Jordan 2024, "Muon: an optimizer for hidden layers"; the update is scaled to
    AdamW's size (Liu et al. 2025, "Muon is scalable", eq. 4).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[_kind(parameter)].append(parameter)
            for parameters in alike.values():
                updates = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                for parameter, update in zip(
                    parameters, _orthogonalized(parameters, updates, self._dtype), strict=True
                ):
                    rate = group["lr"] * (_ADAMW_SIZE * sqrt(max(parameter.shape[-2:])))
                    own = plain(parameter)
                    own.mul_(1 - group["lr"] * group["weight_decay"])
                    own.add_(update, alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """This process's part of the update before it is orthogonalised."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer, own = plain(state["momentum_buffer"]), plain(gradient)
        buffer.lerp_(own, 1 - momentum)
        return own.lerp(buffer, momentum)


def _kind(parameter: Tensor) -> Any:
    """Equal for parameters that can be dealt out together."""
    if isinstance(parameter, DTensor):
        return tuple(parameter.shape), parameter.placements, parameter.device_mesh
    return tuple(parameter.shape)


def _orthogonalized(parameters: list[nn.Parameter], updates: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """This process's parts of the orthogonalised `updates`, which are parts of matrices cut as `parameters` are."""
    first = parameters[0]
    if not isinstance(first, DTensor) or first.device_mesh.size() == 1:
        return [_each(update, dtype) for update in updates]
    mesh, shape = first.device_mesh, (len(updates), *first.shape)
    # One more dimension in front: which matrix it is. Dealing out means to cut there instead of inside.
    inside = tuple(_one_further(placement) for placement in first.placements)
    dealt = tuple(Shard(0) for _ in inside)
    cut = _distributed(torch.stack(updates), mesh, inside, shape)
    whole = cut.redistribute(placements=dealt)
    done = _distributed(_each(whole.to_local(), dtype).to(updates[0].dtype), mesh, dealt, shape)
    return list(done.redistribute(placements=inside).to_local().unbind())


def _distributed(own: Tensor, mesh: Any, placements: tuple[Placement, ...], shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _one_further(placement: Placement) -> Placement:
    if isinstance(placement, StridedShard):
        return StridedShard(placement.dim + 1, split_factor=placement.split_factor)
    return Shard(placement.dim + 1) if isinstance(placement, Shard) else Replicate()


def _each(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Every matrix `[O, I]` of `x [..., O, I]` orthogonalised."""
    if x.ndim == 2:
        return orthogonal(x, dtype)
    return torch.stack([_each(matrix, dtype) for matrix in x]) if len(x) else x


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The orthogonal factor of `matrix [O, I]`, roughly: singular values between about 0.7 and 1.2.

    Five steps of the quintic Newton-Schulz iteration with Jordan's coefficients, as `torch.optim.Muon` does them.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=_LEAST_NORM))
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
