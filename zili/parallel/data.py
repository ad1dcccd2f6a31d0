"""Sharded data parallelism: FSDP2 over the processes that read different tokens, replicas around it.

Gradients are summed, never averaged: the trainer divides once by the number of targets of the whole batch. So no
divide factor is needed, nor the scaled reductions (PREMUL_SUM) that only NCCL has.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from zili.models.decoder import Decoder
from zili.parallel.world import World


def apply_sharding(model: Decoder, world: World, dtype: torch.dtype) -> None:
    """Shard `model`, still on the meta device: a group a block, and one for what lies around the blocks.

    Weights are gathered in `dtype`; gradients are reduced in fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    weights = world.mesh("weights")
    # A pipeline's micro-batches follow one another: gathering a block again for each would cost more than keeping it
    # through the step, and the schedules that put weight gradients off find only weights that are still there.
    again = world.layout.pipeline == 1
    for block in model.layers:
        fully_shard(block, mesh=weights, mp_policy=policy, reshard_after_forward=again)
    fully_shard(model, mesh=weights, mp_policy=policy, reshard_after_forward=False)
    for module in sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded(model: nn.Module) -> list[FSDPModule]:
    """Every module of `model` with a group of sharded parameters of its own."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass reduces gradients over processes, or adds them up where they are."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
