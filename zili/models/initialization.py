"""First values of the weights: a pure function of seed, name and shape."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from zili.config.model import ModelConfig

_RESIDUAL_OUTPUTS = (*("attention.output.weight", "feed_forward.down.weight", "shared.down.weight", "experts.down"),)
_EXPERT = re.compile(r"\.\d+$")


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """First value of the parameter `name`, fp32 on the CPU, the same for every layout, device and build
    order.

    Norms are ones, biases zeros, matrices N(0, init_std); the two matrices that write into the residual
    stream are scaled by 1/sqrt(2 * layers) (GPT-2, Radford et al. 2019, section 2.3; Megatron-LM
    `scaled_init_method_normal`).
    """
    if len(shape) == 3:  # a stack: each expert's matrix is drawn by itself, whoever holds it
        return torch.stack([initial_value(f"{name}.{i}", shape[1:], config, seed) for i in range(shape[0])])
    if name.endswith("norm.weight"):
        return torch.ones(shape, device="cpu")
    if name.endswith((".bias", ".lora_b")):
        return torch.zeros(shape, device="cpu")
    # An adapter adds nothing at first: its second factor is zero (Hu et al. 2021, section 4.1).
    std = shape[1] ** -0.5 if name.endswith(".lora_a") else config.init_std
    if _EXPERT.sub("", name).endswith(_RESIDUAL_OUTPUTS):
        std /= (2 * config.layers) ** 0.5
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=_generator(name, seed))


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fill(parameter: Tensor, value: Tensor) -> None:
    """Set `parameter` to `value`, given whole; one of which this process holds a part takes that part."""
    if isinstance(parameter, DTensor):
        # src_data_rank None: every process has the whole already, so nothing is sent.
        parts = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(parts.to_local())
    else:
        parameter.copy_(value)
