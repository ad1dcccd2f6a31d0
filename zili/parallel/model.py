"""A model over all processes, as the trainer sees it: batches in, losses and gradients out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zili.config import RunConfig
from zili.data.loader import Batch
from zili.models.decoder import Decoder
from zili.ops import IGNORE_INDEX
from zili.parallel.apply import Materialize, build_parts, with_first_weights
from zili.parallel.context import ContextPart
from zili.parallel.data import reduce_gradients, sum_gradients
from zili.parallel.pipeline import Pipeline
from zili.parallel.world import World


class ParallelModel:
    """This process's part of the model, and how its work joins that of the others.

    Losses and gradients are sums over tokens; who divides by their number is the trainer, once, at the end.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        dtype: torch.dtype,
        materialize: Materialize = with_first_weights,
    ) -> None:
        micro = config.training.micro_batch
        assert isinstance(micro, int), "the configuration is resolved"
        self.world = world
        self.micro_batch = micro
        self._dtype = dtype
        self.parts: list[Decoder] = build_parts(config, world, dtype, materialize)
        self._context = ContextPart(world) if world.layout.context > 1 else None
        self._pipeline = Pipeline(self.parts, config, world) if world.layout.pipeline > 1 else None

    @property
    def training(self) -> bool:
        return self.parts[0].training

    def train(self, mode: bool = True) -> None:
        for part in self.parts:
            part.train(mode)

    def eval(self) -> None:
        self.train(False)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a checkpoint must hold of the stages here."""
        for part in self.parts:
            yield from part.named_tensors()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of all stages here, under their names in the whole model."""
        for part in self.parts:
            yield from part.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def autocast(self) -> Any:
        """Context in which matrix products run in the precision of the run."""
        kind = self.world.device.type
        return nullcontext() if self._dtype == torch.float32 else torch.autocast(kind, dtype=self._dtype)

    def accumulate(self, batch: Batch) -> Tensor:
        """Backward over this process's rows in micro-batches; gradients are sums over the whole world's tokens.

        Returns this process's term of the sum of losses, 0-d fp32.
        """
        inputs, labels, documents = self._own(batch)
        if self._pipeline is not None:
            with self.autocast():
                loss = self._pipeline.loss_sum(inputs, labels, documents, backward=True)
            self._sum_gradients()
            self._join_embeddings()
            return self._once(loss)
        total = torch.zeros((), device=inputs.device)
        cuts = list(zip(*(rows.split(self.micro_batch) for rows in (inputs, labels, documents)), strict=True))
        for number, (ids, targets, ids_of_documents) in enumerate(cuts, 1):
            # Gradients cross processes once a step, not once a micro-batch.
            reduce_gradients(self.parts[0], number == len(cuts))
            with self.autocast():
                loss = self.parts[0].loss_sum(ids, targets, document_ids=ids_of_documents)
            loss.backward()
            total += loss.detach()
        self._sum_gradients()
        return self._once(total)

    def _sum_gradients(self) -> None:
        if self.world.size > 1 and not self.world.sharded:
            for part in self.parts:
                sum_gradients(part, self.world)

    def loss_sum(self, input_ids: Tensor, labels: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """Sum of the losses of whole rows `[B, S]`, which every process gives alike: each computes its share.

        B is a multiple of `rows_together`. Without gradients.
        """
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        whole = (input_ids, labels, document_ids)
        # A pipeline's messages have one size, that of a step.
        at_once = self.rows_together if self._pipeline is not None else len(input_ids)
        total = torch.zeros((), device=self.world.device.type)
        for some in zip(*(rows.split(at_once) for rows in whole), strict=True):
            total += self._evaluated(*self._own(Batch(*(rows[self.world.rows(len(rows))] for rows in some))))
        return self.world.sum(self._once(total))

    @torch.no_grad()
    def _evaluated(self, inputs: Tensor, labels: Tensor, documents: Tensor) -> Tensor:
        with self.autocast():
            if self._pipeline is not None:
                return self._pipeline.loss_sum(inputs, labels, documents, backward=False)
            return self.parts[0].loss_sum(inputs, labels, document_ids=documents)

    @property
    def rows_together(self) -> int:
        """`loss_sum` takes a multiple of so many rows."""
        own = self.micro_batch * self._pipeline.micro_batches if self._pipeline is not None else 1
        return own * self.world.layout.data

    def _own(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and labels of the positions this process has, documents of whole rows."""
        inputs, labels, documents = batch
        if self.parts[0].config.mtp_layers and self.training:
            labels = _with_next(labels, documents)
        if self._context is not None:
            inputs, labels = self._context.take(inputs), self._context.take(labels)
        place = self.world.device.type
        return tuple(rows.to(place, non_blocking=True) for rows in (inputs, labels, documents))  # type: ignore[return-value]

    def _once(self, loss: Tensor) -> Tensor:
        """Tensor-parallel processes compute the same losses: they count once, in a sum over the world."""
        return loss / self.world.layout.tensor

    def take_next_loss(self) -> Tensor:
        """This process's term of the summed losses of multi-token prediction since the last call, 0-d."""
        total = torch.zeros((), device=self.world.device.type)
        for part in self.parts:
            if part.next_loss is not None:
                total += part.next_loss
                part.next_loss = None
        return self._once(total)

    @torch.no_grad()
    def squared_gradient(self) -> Tensor:
        """This process's term of the squared norm of the whole gradient, 0-d fp32.

        A part that several processes hold counts in each by its share, so that one sum over the world serves every
        layout: norms of DTensors on meshes of their own could not be joined.
        """
        total = torch.zeros((), device=self.world.device.type)
        for name, parameter in self.named_parameters():
            if parameter.grad is not None and not self._is_second(name):
                total += plain(parameter.grad).square().sum() / self.copies(parameter)
        return total

    def _is_second(self, name: str) -> bool:
        """Whether a parameter is the last stage's copy of one that the first stage has."""
        return name.startswith("embedding.") and not self.parts[0].first

    @torch.no_grad()
    def _join_embeddings(self) -> None:
        """Add up the gradients of an embedding that the first and the last stage both have: it stays one tensor."""
        config = self.parts[0].config
        if self._pipeline is None or not (config.tied_embeddings or config.mtp_layers):
            return
        part = next((part for part in self.parts if part.embedding is not None), None)
        gradient = None if part is None or part.embedding is None else part.embedding.weight.grad
        if part is None or gradient is None:
            return
        own = plain(gradient)
        other = torch.empty_like(own)
        group = self.world.mesh("pipeline").get_group()
        peer = dist.get_global_rank(group, dist.get_world_size(group) - 1 if part.first else 0)
        messages = [dist.P2POp(dist.isend, own, peer, group), dist.P2POp(dist.irecv, other, peer, group)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        own += other

    def copies(self, parameter: Tensor) -> float:
        """How many processes hold each element of `parameter`."""
        pieces = 1
        if isinstance(parameter, DTensor):
            for dimension, placement in enumerate(parameter.placements):
                # Asked this way round: what torch makes of two cuts of one dimension is no Shard to `is_shard`.
                pieces *= 1 if placement.is_replicate() else parameter.device_mesh.size(dimension)
        return self.world.size / self.world.layout.pipeline / pieces

    @torch.no_grad()
    def balance(self) -> Tensor | None:
        """Move the routers' biases by the load of the step, and begin to count anew.

        Returns tokens an expert `[L, E]` over all processes, or None for a model without experts.
        """
        config = self.parts[0].config
        if config.mixture is None:
            return None
        routers = [pair for part in self.parts for pair in part.routers()]
        loads = torch.zeros(config.layers + config.mtp_layers, config.mixture.experts, device=self.world.device.type)
        for number, router in routers:
            loads[number] = router.load
            router.load.zero_()
        self.world.sum(loads)
        for number, router in routers if config.lora is None else ():  # else they stay as they are
            router.balance(loads[number])
        numbers = range(config.layers + config.mtp_layers)
        return torch.stack([loads[number] for number in numbers if config.has_experts(number)])

    @torch.no_grad()
    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply every gradient by `factor`, 0-d."""
        gradients = [plain(parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)


def _with_next(labels: Tensor, document_ids: Tensor) -> Tensor:
    """`labels [B, S]` with the token after each beside it, `[B, S, 2]`.

    None where that is another document's, nor after a token that is not learned: it is predicted from the label before
    it, and there is none.
    """
    following = labels.roll(-1, 1)
    following[:, -1] = IGNORE_INDEX
    counted = (document_ids == document_ids.roll(-1, 1)) & (labels != IGNORE_INDEX)
    return torch.stack((labels, following.where(counted, IGNORE_INDEX)), -1)


def plain(x: Tensor) -> Tensor:
    """This process's part of a DTensor, or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x
