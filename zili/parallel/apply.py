"""From a configuration to this process's part of the model: every dimension, in order."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zili.config import RunConfig
from zili.models.decoder import Decoder
from zili.models.mixture import MixtureOfExperts
from zili.parallel.context import ContextPart, apply_context_parallel
from zili.parallel.data import apply_sharding
from zili.parallel.expert import apply_expert_parallel
from zili.parallel.layout import stage_ranges, stages_of
from zili.parallel.tensor import apply_tensor_parallel
from zili.parallel.world import World

Materialize = Callable[[Decoder, str, int], None]
"""Gives a part on the meta device memory on a type of device, and what its weights begin with, from a seed."""


def with_first_weights(part: Decoder, device_type: str, seed: int) -> None:
    """`Materialize` of a run: every weight is drawn."""
    part.to_empty(device=device_type)
    part.init_weights(seed)


def build_parts(
    config: RunConfig,
    world: World,
    dtype: torch.dtype,
    make: Callable[[range], Decoder],
    materialize: Materialize = with_first_weights,
) -> list[Decoder]:
    """The stages this process has, their weights set: one, the whole model, where there is no pipeline.

    `make` builds the part of the model with some layers. The order of what follows matters. Matrices are cut first,
    since everything after must see the parts. Blocks are compiled before they are sharded, so that gathering stays
    outside of what is compiled. Memory is taken last, for what is left.
    """
    ranges = stage_ranges(config.parallel, config.model.layers)
    parts = []
    for number in stages_of(config.parallel, world.pipeline_rank):
        with torch.device("meta"):
            parts.append(make(ranges[number]))
        _apply(parts[-1], config, world, dtype)
    for part in parts:
        materialize(part, world.device.type, config.seed)
    return parts


def _apply(part: Decoder, config: RunConfig, world: World, dtype: torch.dtype) -> None:
    """Every dimension, on a part that is still on the meta device."""
    layout = world.layout
    part.recompute = config.training.recompute
    if layout.tensor > 1:
        apply_tensor_parallel(part, world)
    if config.model.mixture is not None and world.size > 1:
        apply_expert_parallel(part, world)
    if layout.context > 1:
        apply_context_parallel(part, ContextPart(world))
    if config.chip.compile:
        _compile(part)
    if world.sharded:
        apply_sharding(part, world, dtype)


def _compile(part: Decoder) -> None:
    for block in part.layers:
        # Which rows go to which expert is known only when it runs, so there is no graph to compile. Said here and not
        # where a mixture is defined, since it imports the compiler, and that takes a second.
        for mixture in (module for module in block.modules() if isinstance(module, MixtureOfExperts)):
            mixture.forward = torch.compiler.disable(mixture.forward)  # type: ignore[method-assign]
        # One graph serves every block of the same shape, so the first costs the time of all.
        block.compile(dynamic=False)
