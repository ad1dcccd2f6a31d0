"""Pipeline parallelism: a run of layers on each process, and torch's schedules to keep them busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from zili.config import RunConfig
from zili.config.parallel import Schedule
from zili.data.loader import Batch
from zili.errors import LayoutError
from zili.models.decoder import Decoder
from zili.parallel.layout import Layout, stages_of
from zili.parallel.world import World

_SCHEDULES: dict[Schedule, Callable[..., Any]] = {
    "1f1b": lambda stages, *rest, **more: Schedule1F1B(stages[0], *rest, **more),
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
_FORWARD = ("F", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
"""Of what a schedule does, the work of a forward pass."""


class Pipeline:
    """The stages of this process and the order of their work."""

    def __init__(self, parts: list[Decoder], config: RunConfig, world: World) -> None:
        """`parts` are this process's stages, in the order of `stages_of`.

        Raises:
            LayoutError: the schedule refuses the number of micro-batches.
        """
        numbers = stages_of(config.parallel, world.pipeline_rank)
        micro = config.training.micro_batch
        assert isinstance(micro, int), "the configuration is resolved"
        self.micro_batches = config.training.global_batch // world.layout.data // micro
        device, group = world.device.torch, world.mesh("pipeline").get_group()
        stages = [
            PipelineStage(
                part,
                number,
                config.parallel.stages,
                device,
                # Given, not asked for: torch would find the shapes by running each stage once more.
                input_args=_example(config, world.layout, micro, ids=number == 0),
                output_args=_output(config, world.layout, micro, last=number == config.parallel.stages - 1),
                group=group,
            )
            for number, part in zip(numbers, parts, strict=True)
        ]
        self.has_first = numbers[0] == 0
        self.has_last = config.parallel.stages - 1 in numbers
        # Every process meets the same refusal: agreed upon, it is said once.
        self._schedule = world.agree(lambda: _schedule(config.parallel.schedule, stages, self.micro_batches))

    def loss_sum(self, batch: Batch, *, backward: bool) -> Tensor:
        """Sum of the losses of this process's rows, where the last stage is, else 0; a 0-d tensor.

        With `backward` the gradients of all micro-batches are computed, and reduced once.
        """
        run = self._schedule.step if backward else self._schedule.eval
        first = (batch.input_ids,) if self.has_first else ()
        losses: list[Tensor] | None = [] if self.has_last else None
        target = batch.labels if self.has_last else None
        with nullcontext() if backward else _forward_alone(self._schedule):
            run(*first, target=target, losses=losses, return_outputs=False, **batch.beside())
        if not losses:
            return torch.zeros((), device=batch.input_ids.device)
        return torch.stack([loss.detach() for loss in losses]).sum()


@contextmanager
def _forward_alone(schedule: Any) -> Iterator[None]:
    """Without the work of backward passes, which `eval` does not do but goes through: where two stages follow each
    other on one process (zbv) it fails at the gradients that they do not pass on (torch 2.13)."""
    orders = getattr(schedule, "pipeline_order_with_comms", None)  # schedules of one stage a process have none
    if orders is None:
        yield
        return
    schedule.pipeline_order_with_comms = {
        rank: [action for action in order if action.computation_type in _FORWARD] for rank, order in orders.items()
    }
    try:
        yield
    finally:
        schedule.pipeline_order_with_comms = orders


def _schedule(name: Schedule, stages: list[PipelineStage], micro_batches: int) -> Any:
    try:
        return _SCHEDULES[name](stages, micro_batches, loss_fn=lambda loss, labels: loss, scale_grads=False)
    except ValueError as error:
        raise LayoutError(f"parallel.schedule {name}: {error}") from error


def _example(config: RunConfig, layout: Layout, micro: int, *, ids: bool) -> Tensor:
    """What a stage takes: ids `[B, S / c]`, or hidden states `[B, S / (c t), D]`."""
    tokens = config.training.sequence_length // layout.context
    if ids:
        return torch.empty(micro, tokens, dtype=torch.long, device="meta")
    shape = (micro, tokens // layout.tensor, config.model.hidden_size)
    return torch.empty(shape, dtype=torch.float32, device="meta", requires_grad=True)


def _output(config: RunConfig, layout: Layout, micro: int, *, last: bool) -> Tensor:
    if last:
        return torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
    return _example(config, layout, micro, ids=False)
