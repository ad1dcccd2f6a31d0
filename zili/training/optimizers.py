"""Optimizers: AdamW, or Muon on the matrices inside the blocks with AdamW on the rest."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from zili.config.run import OptimizerConfig
from zili.models.arithmetic import is_hidden_matrix
from zili.torch_private import fused_devices
from zili.training.muon import Muon

BASE_RATE = "base_lr"
"""Key in each parameter group that keeps its peak rate; `lr` is that times the schedule's share."""


def build_optimizers(
    named: list[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    dtype: torch.dtype = torch.float32,
    fused: bool = True,
) -> list[Optimizer]:
    """One AdamW over everything, or a Muon and an AdamW that share the parameters out.

    Muon takes the matrices of the blocks, experts' and multi-token prediction's among them. Embeddings, head, routers,
    norms and biases stay with AdamW, as in Jordan's description (2024, "Muon: an optimizer for hidden layers").
    Adapters are such matrices too, and leave AdamW nothing: then there is none. Muon's update is scaled to AdamW's size
    so that both share learning rate and decay, and its iteration runs in `dtype`, the precision of the run. `fused`:
    AdamW in one kernel, where torch has one for the device.
    """
    named = [(name, p) for name, p in named if p.requires_grad]
    hidden = [p for name, p in named if is_hidden_matrix(name, tuple(p.shape))]
    optimizers: list[Optimizer] = []
    if config.name == "muon" and hidden:
        rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "momentum": config.momentum}
        optimizers.append(Muon(hidden, dtype=dtype, **rates))
        taken = {id(p) for p in hidden}
        named = [(name, p) for name, p in named if id(p) not in taken]
    if named or not optimizers:
        optimizers.append(_adamw([p for _, p in named], config, fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group[BASE_RATE] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[Optimizer], share: float) -> None:
    """Set every group's rate to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[BASE_RATE] * share


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig, fused: bool) -> AdamW:
    groups = [
        {"params": alike, "weight_decay": config.weight_decay if matrices else 0.0}
        for matrices in (True, False)
        # A fused kernel takes no DTensors beside plain tensors: where weights are whole, only some of them are cut.
        for cut in (True, False)
        if (alike := [p for p in parameters if (p.ndim >= 2) is matrices and isinstance(p, DTensor) is cut])
    ]
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=fused and _fused_everywhere(parameters),
    )


def _fused_everywhere(parameters: list[nn.Parameter]) -> bool:
    # The list that torch itself keeps of devices with a fused kernel; a device without one takes the foreach loop.
    supported = fused_devices()
    return all(p.device.type in supported and p.is_floating_point() for p in parameters)
