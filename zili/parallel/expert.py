"""Expert parallelism: each process has some of the experts, and tokens travel to them.

The processes that share experts are neighbours among shards x context x tensor, so that the exchange stays within a
machine where it can. All of them bring tokens of their own: with sequence parallelism tensor-parallel processes have
different ones between matrices, which is where experts are. No row is dropped and none is padded: what each process
sends is counted first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from zili.models.decoder import Decoder
from zili.models.layers import Seam
from zili.models.mixture import Exchange, Experts, Router
from zili.parallel.collectives import exchange, exchanged
from zili.parallel.context import ContextPart
from zili.parallel.world import World


class Ticket(NamedTuple):
    """How rows came here, to send them back the same way."""

    sent: list[int]
    received: list[int]
    order: Tensor
    """Position in which each arrived row was put, sorted by expert."""


class ProcessExchange(Exchange):
    """Rows to the processes that have their experts, by an all-to-all each way."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.size = dist.get_world_size(group)
        self.sizes: Callable[[Tensor, Tensor, int], tuple[list[int], list[int]]] = rows_by_process

    def there(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Ticket]:
        by_process = counts.view(self.size, -1)
        even = [1] * self.size
        # [process that sends, expert here]
        arriving = exchanged(by_process, even, even, self.group)
        sent, received = self.sizes(by_process, arriving, len(rows))
        rows = exchange(rows, sent, received, self.group)
        # They come process by process; the products want them expert by expert.
        expert = torch.arange(arriving.shape[1], device=rows.device).repeat(self.size)
        order = expert.repeat_interleave(arriving.flatten(), output_size=sum(received)).argsort(stable=True)
        return rows[order], arriving.sum(0), Ticket(sent, received, order)

    def back(self, rows: Tensor, ticket: Ticket) -> Tensor:
        inverse = torch.empty_like(ticket.order)
        inverse[ticket.order] = torch.arange(len(inverse), device=rows.device)
        return exchange(rows[inverse], ticket.received, ticket.sent, self.group)


def rows_by_process(by_process: Tensor, arriving: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """How many of `rows` go to each process, and come from it: sums of `by_process, arriving [processes, experts]`."""
    # The host must know how much to send: the one wait of a layer, for both numbers at once.
    sent, received = torch.stack((by_process.sum(1), arriving.sum(1))).tolist()
    return sent, received


class SumOverSequence(Seam):
    """Counts of a sequence's tokens, added up over the processes that have some of them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total


class OwnPositions(Seam):
    """Takes the positions of whole rows whose tokens this process has between matrices."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._context = ContextPart(world) if world.layout.context > 1 else None
        self._rank, self._size = world.tensor_rank, world.layout.tensor

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S]` -> `[B, S / (c t)]`."""
        own = x if self._context is None else self._context.take(x)
        return own.chunk(self._size, 1)[self._rank]


def apply_expert_parallel(model: Decoder, world: World) -> None:
    """Share the experts of `model`, still on the meta device, and let routers count whole sequences."""
    layout = world.layout
    for module in model.modules():
        if isinstance(module, Experts) and layout.expert > 1:
            mesh = world.mesh("expert")
            for name, parameter in list(module.named_parameters()):
                cut = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
            module.exchange = ProcessExchange(mesh.get_group())
        if isinstance(module, Router) and layout.context * layout.tensor > 1:
            module.sequence = SumOverSequence(world.mesh("sequence").get_group())
            module.positions = OwnPositions(world)
