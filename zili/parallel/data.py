"""Sharded data parallelism: FSDP2 over the processes that read different tokens, replicas around it.

Gradients are summed, never averaged: the trainer divides once by the number of targets of the whole batch. So no
divide factor is needed, nor the scaled reductions (PREMUL_SUM) that only NCCL has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from zili.models.decoder import Decoder
from zili.models.layers import local
from zili.models.mixture import Experts
from zili.parallel.world import World


def apply_sharding(model: Decoder, world: World, dtype: torch.dtype) -> None:
    """Shard `model`, still on the meta device: a group a block, and one for what lies around the blocks.

    Weights are gathered in `dtype`; gradients are reduced in fp32. What goes into a module keeps its own dtype: the
    residual stream and the angles of positions are fp32 also where products are not (autocast sees to those).
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    weights = world.mesh("weights")
    # A pipeline's micro-batches follow one another: gathering a block again for each would cost more than keeping it
    # through the step, and the schedules that put weight gradients off find only weights that are still there.
    again = world.layout.pipeline == 1
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        _shard_experts(experts, world, mp_policy=policy, reshard_after_forward=again)
    for block in [*model.layers, *([model.next_tokens] if model.next_tokens else [])]:
        fully_shard(block, mesh=weights, mp_policy=policy, reshard_after_forward=again)
    fully_shard(model, mesh=weights, mp_policy=policy, reshard_after_forward=False)
    for module in sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _shard_experts(experts: Experts, world: World, **settings: Any) -> None:
    """Experts have a mesh of their own: they are shared by other processes than the weights around them."""
    mesh = world.mesh("expert_weights")
    shards = world.layout.expert_shards
    here, ffn = len(local(experts.gate)), min(experts.gate.shape[1], experts.down.shape[1])
    # Cut inside each matrix where there are too few experts to give every process some.
    inside = here % shards != 0 and ffn % shards == 0
    fully_shard(experts, mesh=mesh, shard_placement_fn=(lambda _: Shard(1)) if inside else None, **settings)


def sharded(model: nn.Module) -> list[FSDPModule]:
    """Every module of `model` with a group of sharded parameters of its own."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass reduces gradients over processes, or adds them up where they are."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
