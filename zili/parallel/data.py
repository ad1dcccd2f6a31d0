"""Sharded data parallelism: FSDP2 over the processes that read different tokens, replicas around it.

Gradients are summed, never averaged: the trainer divides once by the number of targets of the whole batch. So no
divide factor is needed, nor the scaled reductions (PREMUL_SUM) that only NCCL has.

What stays in fp32 in a lowered run, norms and routers, is small: every process keeps it whole, and its gradients are
summed once a step. On a chip without FSDP2 that is how all weights are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from zili.models.decoder import Decoder
from zili.models.layers import local
from zili.models.mixture import Experts
from zili.parallel.cuts import stays_fp32
from zili.parallel.world import World
from zili.torch_private import foreach_copy

_BUCKET = 64 << 20
"""Bytes of gradients that are summed by one call."""


def apply_sharding(model: Decoder, world: World, dtype: torch.dtype) -> None:
    """Shard `model`, still on the meta device: a group a block, and those of what lies around the blocks.

    Every weight is taken in the dtype in which one process takes it (autocast sees to that there). What products
    multiply is gathered in `dtype`, the embedding in fp32; norms and routers are left whole. Gradients are reduced in
    fp32. What goes into a module keeps its own dtype: the residual stream and the angles of positions are fp32.
    """
    weights = world.mesh("weights")
    whole = {parameter for name, parameter in model.named_parameters() if _left_whole(name, world, dtype)}
    # A pipeline's micro-batches follow one another: gathering a block again for each would cost more than keeping it
    # through the step, and the schedules that put weight gradients off find only weights that are still there.
    again = world.layout.pipeline == 1
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        _shard_experts(experts, world, mp_policy=_policy(experts, dtype), reshard_after_forward=again)
    for unit in model.units():
        policy = _policy(unit, dtype)
        fully_shard(unit, mesh=weights, mp_policy=policy, reshard_after_forward=again, ignored_params=whole)
    if dtype != torch.float32 and model.embedding is not None and model.head is not None:
        policy = _policy(model.embedding, torch.float32)
        fully_shard(model.embedding, mesh=weights, mp_policy=policy, reshard_after_forward=False)
    # Without a head of its own, it has the embedding or nothing. A tied one is lowered by the product.
    policy = _policy(model, torch.float32 if model.head is None else dtype)
    fully_shard(model, mesh=weights, mp_policy=policy, reshard_after_forward=False, ignored_params=whole)
    for module in sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _policy(module: nn.Module, dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights gathered in `dtype`, gradients reduced in fp32.

    What has no gradients is given no dtype to reduce them in: to add them up in another dtype FSDP2 looks at weights as
    they were gathered, and those that take no part, as multi-token prediction's beside preferences, never were.
    """
    learned = any(parameter.requires_grad for parameter in module.parameters())
    reduced = torch.float32 if learned else None
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)


def _left_whole(name: str, world: World, dtype: torch.dtype) -> bool:
    """Whether no process has only a shard of the weight of that name; tensor parallelism may cut it all the same."""
    return not world.sharded or (dtype != torch.float32 and stays_fp32(name))


def _shard_experts(experts: Experts, world: World, **settings: Any) -> None:
    """Experts have a mesh of their own: they are shared by other processes than the weights around them."""
    mesh = world.mesh("expert_weights")
    shards = world.layout.expert_shards
    here, ffn = len(local(experts.gate)), min(experts.gate.shape[1], experts.down.shape[1])
    # Cut inside each matrix where there are too few experts to give every process some.
    inside = here % shards != 0 and ffn % shards == 0
    fully_shard(experts, mesh=mesh, shard_placement_fn=(lambda _: Shard(1)) if inside else None, **settings)


def sharded(model: nn.Module) -> list[FSDPModule]:
    """The modules of `model` that FSDP2 shards as groups."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reduce_gradients(model: nn.Module, now: bool, replicas: bool) -> None:
    """Whether the next backward pass reduces gradients over shards, or adds them up where they are; and whether over
    `replicas`, or adds up its part."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_requires_all_reduce(replicas)


@torch.no_grad()
def sum_gradients(model: nn.Module, world: World, dtype: torch.dtype) -> None:
    """Add up the gradients of weights that processes hold whole, over those that do: FSDP2 does it for what it cuts."""
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    shared: dict[str, list[Tensor]] = {"weights": [], "expert_weights": []}
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not _left_whole(name, world, dtype):
            continue
        if isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor):
            # What tensor-parallel processes hold whole has terms of its gradient in each.
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        shared["expert_weights" if id(parameter) in experts else "weights"].append(own)
    for mesh, gradients in shared.items():
        for bucket in _buckets(gradients):
            _sum(bucket, world.mesh(mesh))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.nbytes for each in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _sum(tensors: list[Tensor], mesh: DeviceMesh) -> None:
    """Add up `tensors` over all processes of `mesh`, in place."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    for dimension in (dimension for dimension in range(mesh.ndim) if mesh.size(dimension) > 1):
        dist.all_reduce(together, group=mesh.get_group(dimension))
    parts = together.split([tensor.numel() for tensor in tensors])
    foreach_copy(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
