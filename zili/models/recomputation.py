"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from zili.torch_private import OpOverload, profiler_enter, profiler_exit

Recompute = Literal["none", "selective", "full"]
"""full: only a block's input is kept. selective: products and attention are kept, the rest is computed again."""

_KEPT = frozenset(
    (
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "zili::linear"),
        # What came from other processes: asking for it again would cost more than keeping it.
        *("_c10d_functional::all_gather_into_tensor", "_c10d_functional::reduce_scatter_tensor"),
        *("_c10d_functional::all_to_all_single", "_c10d_functional::wait_tensor"),
    )
)
"""Operations whose results are dear: matrix products, collectives (Korthikanti et al. 2022, section 5)."""
_KEPT_BY_NAME = ("attention", "grouped_matmul")
"""Expensive operations that vendors name differently, by a part of their names."""

# Torch wants no more calls of an operation when a block is recomputed than there were at first. FSDP2's hooks inside it
# mark for profilers what they do, and that is another time: the first weights asked for in a backward pass are taken
# for a model's, and a pipeline's are there already at its second micro-batch.
SAC_IGNORED_OPS.update((profiler_enter, profiler_exit))


def recomputed(block: nn.Module, how: Recompute, *arguments: Any) -> Tensor:
    """`block(*arguments)`, keeping for the backward pass what `how` says."""
    if how == "full":
        return checkpoint(block, *arguments, use_reentrant=False)
    context = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=context)


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    name = operation.name().split(".")[0] if isinstance(operation, OpOverload) else ""
    kept = name in _KEPT or any(part in name for part in _KEPT_BY_NAME)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
