"""Pipeline parallelism: a run of layers on each process, and torch's schedules to keep them busy.

torch 2.13 keeps some things to the end of a step; here they are given back as soon as they were used. They are buffers
of all messages that arrive, tensors that were sent, and gradients of whole weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import (
    SEND_B,
    SEND_F,
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
from zili.parallel.data import reduce_gradients
from zili.parallel.layout import Layout, stages_of
from zili.parallel.world import World
from zili.torch_private import stage_backward

_SCHEDULES: dict[Schedule, Callable[..., Any]] = {
    "1f1b": lambda stages, *rest, **more: Schedule1F1B(stages[0], *rest, **more),
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
Forward = Callable[[Decoder, Tensor, Batch], Tensor]
"""A part's forward pass: on its inputs, ids or hidden states, of some rows of a batch."""
_FORWARD = ("F", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
"""The actions of a schedule that belong to a forward pass."""


class Stage(PipelineStage):
    """A stage whose messages have memory from when they are asked for to when they are used, not for a whole run."""

    forward: Forward
    """Its forward pass, set by each step."""

    def __init__(self, *arguments: Any, sums_each: bool, **named: Any) -> None:
        """`sums_each`: gradients are summed over processes after each micro-batch, not once a step."""
        super().__init__(*arguments, **named)
        self._sums_each = sums_each

    def _setup_forward_recv_info(self, *arguments: Any) -> None:
        with self._without_memory():
            super()._setup_forward_recv_info(*arguments)

    def _setup_backward_recv_info(self, *arguments: Any) -> None:
        with self._without_memory():
            super()._setup_backward_recv_info(*arguments)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """Buffers made inside have a shape only."""
        place, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = place

    def _get_recv_ops(self, recv_infos: Any) -> list[Any]:
        for info in recv_infos:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device=self.device)
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        return self._taken(super()._retrieve_recv_activations(fwd_chunk_id), self.args_recv_info[fwd_chunk_id])

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        return self._taken(super()._retrieve_recv_grads(bwd_chunk_id), self.grad_recv_info[bwd_chunk_id])

    @staticmethod
    def _taken(received: Any, infos: Any) -> Any:
        """`received`, whose memory is now its user's alone."""
        for info in infos:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device="meta", requires_grad=False)
        return received

    def forward_maybe_with_nosync(self, inputs: Tensor, **batch: Tensor) -> Tensor:
        """Instead of a plain call of the module."""
        assert isinstance(self.submod, Decoder)
        return self.forward(self.submod, inputs, Batch(**batch))

    def forward_one_chunk(self, *arguments: Any, **named: Any) -> Any:
        """Does what torch does, but keeps nothing where no backward pass follows: what is to be sent is on its way."""
        if not self.has_backward:
            self.fwd_cache.clear()
        return super().forward_one_chunk(*arguments, **named)

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """Does what torch's does. torch never sums gradients here; it sums all of them after the last backward pass."""
        if not self._sums_each:
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        assert backward_type == "full", "lay_out refuses schedules that put gradients of weights off"
        self.submod.set_is_last_backward(False)  # type: ignore[operator]
        self.submod.set_reshard_after_backward(False)  # type: ignore[operator]
        reduce_gradients(self.submod, now=True, replicas=last_backward)
        return stage_backward(**bwd_kwargs), None


class _Sends:
    """What this process's stages send, one message of each and each way at a time.

    torch's schedules with several stages wait for what they sent, and so keep it, at the end of a step. Waiting here
    for the message before cannot lock: each is asked for, in the order that torch made, right where it is sent.
    """

    def __init__(self, stages: list[Stage]) -> None:
        self._stages = {stage.stage_index: stage for stage in stages}
        self._under_way: dict[tuple[int, bool], list[Any]] = {}

    def send(self, action: Any, _: Any) -> None:
        """Do an action of a schedule."""
        stage, forward = self._stages[action.stage_index], action.computation_type is SEND_F
        ask = stage.get_fwd_send_ops if forward else stage.get_bwd_send_ops
        way = (action.stage_index, forward)
        self._wait(way)
        self._under_way[way] = schedules._batch_p2p(ask(action.microbatch_index))

    def wait(self) -> None:
        """Until all has arrived."""
        for way in list(self._under_way):
            self._wait(way)

    def _wait(self, way: tuple[int, bool]) -> None:
        schedules._wait_batch_p2p(self._under_way.pop(way, []))


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
            Stage(
                part,
                number,
                config.parallel.stages,
                device,
                # Given, not asked for: torch would find the shapes by running each stage once more.
                input_args=_example(config, world.layout, micro, ids=number == 0),
                output_args=_output(config, world.layout, micro, last=number == config.parallel.stages - 1),
                group=group,
                sums_each=config.parallel.reduce == "micro_batch" and world.sharded,
            )
            for number, part in zip(numbers, parts, strict=True)
        ]
        self.has_first = numbers[0] == 0
        self.has_last = config.parallel.stages - 1 in numbers
        # Every process meets the same refusal: agreed upon, it is said once.
        self._schedule = world.agree(lambda: _schedule(config.parallel.schedule, stages, self.micro_batches))
        self._stages, self._sends = stages, _Sends(stages)
        if len(stages) > 1:
            self._schedule._comp_type_to_function_map.update({SEND_F: self._sends.send, SEND_B: self._sends.send})

    def step(self, batch: Batch, forward: Forward, *, backward: bool) -> None:
        """Run every micro-batch of this process's rows through the stages here, each by `forward`.

        With `backward` the gradients of all of them are computed and reduced.
        """
        for stage in self._stages:
            stage.forward = forward
        step = self._schedule.step if backward else self._schedule.eval
        first = (batch.input_ids,) if self.has_first else ()
        # torch wants something to compare the last stage's outputs with: they are losses already.
        target = batch.labels if self.has_last else None
        losses: list[Tensor] | None = [] if self.has_last else None
        with nullcontext() if backward else _forward_alone(self._schedule):
            step(*first, target=target, losses=losses, return_outputs=False, **batch.given())
        self._sends.wait()


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


def _schedule(name: Schedule, stages: list[Stage], micro_batches: int) -> Any:
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
