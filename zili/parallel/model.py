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
from zili.models.preference import PreferenceLoss, pairs_in
from zili.ops import IGNORE_INDEX
from zili.parallel.apply import Materialize, build_parts, with_first_weights
from zili.parallel.context import ContextPart
from zili.parallel.data import reduce_gradients, sum_gradients
from zili.parallel.pipeline import Pipeline
from zili.parallel.world import World
from zili.torch_private import foreach_multiply

REWARDS = ("reward_chosen", "reward_rejected", "reward_accuracy")
"""Names of the figures of `PreferenceLoss`."""


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
        self._sums_each = config.parallel.reduce == "micro_batch"
        self.parts: list[Decoder] = build_parts(config, world, dtype, materialize)
        self._context = ContextPart(world) if world.layout.context > 1 else None
        self._pipeline = Pipeline(self.parts, config, world) if world.layout.pipeline > 1 else None
        self._preference: PreferenceLoss | None = None
        if config.preference is not None:
            wanted = config.preference
            total, sharers = (self._context.total, self._context.size) if self._context is not None else (None, 1)
            self._preference = PreferenceLoss(wanted.beta, wanted.likelihood, total, sharers)
            for part in self.parts:
                part.preference = self._preference

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
        own = self._own(batch)
        if self._pipeline is not None:
            with self.autocast():
                loss = self._pipeline.loss_sum(own, backward=True)
            self._sum_gradients()
            self._join_embeddings()
            return self._once(loss)
        total = torch.zeros((), device=self.world.device.type)
        cuts = list(own.split(self.micro_batch))
        for number, micro_batch in enumerate(cuts, 1):
            last = number == len(cuts)
            reduce_gradients(self.parts[0], now=last or self._sums_each, replicas=last)
            with self.autocast():
                loss = self.parts[0](micro_batch.input_ids, **micro_batch.beside())
            loss.backward()
            total += loss.detach()
        self._sum_gradients()
        return self._once(total)

    def _sum_gradients(self) -> None:
        if self.world.size > 1:
            for part in self.parts:
                sum_gradients(part, self.world, self._dtype)

    def loss_sum(self, input_ids: Tensor, labels: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """Sum of the losses of whole rows `[B, S]`, which every process gives alike: each computes its share.

        B is a multiple of `rows_together`. Without gradients.
        """
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        return self.world.sum(self._once(self._evaluated(Batch(input_ids, labels, document_ids))))

    def preferences(self, batch: Batch) -> Tensor:
        """Sums over the pairs of whole rows, `[4]`: losses, and the figures of `PreferenceLoss`.

        Rows as for `loss_sum`; without gradients.
        """
        assert self._preference is not None
        loss = self._evaluated(batch)
        return self.world.sum(self._once(torch.stack((loss, *self.take_further().values()))))

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Of the labels of each document of whole rows, as `batch.reference` has them, `[B, N]`.

        Rows as for `loss_sum`; without gradients.
        """
        assert self._preference is not None and batch.reference is not None
        kept: list[Tensor] = []
        self._preference.kept = kept
        table = torch.zeros_like(batch.reference, device=self.world.device.type)
        self._evaluated(batch)
        self._preference.kept = self._preference.figures = None
        if kept:  # the last stage's
            own = torch.cat(kept)
            at_once = len(table) if self._pipeline is None else self.rows_together
            for start in range(0, len(table), at_once):
                mine = self.world.rows(min(at_once, len(table) - start))
                width = mine.stop - mine.start
                table[start + mine.start : start + mine.stop], own = own[:width], own[width:]
        return self.world.sum(self._once(table))

    @torch.no_grad()
    def _evaluated(self, whole: Batch) -> Tensor:
        """This process's term of the sum of losses of whole rows, those of the same rows counted in each."""
        # A pipeline's messages have one size, that of a step.
        at_once = self.rows_together if self._pipeline is not None else len(whole.input_ids)
        total = torch.zeros((), device=self.world.device.type)
        for some in whole.split(at_once):
            own = self._own(some.rows(self.world.rows(len(some.input_ids))))
            with self.autocast():
                if self._pipeline is not None:
                    total += self._pipeline.loss_sum(own, backward=False)
                else:
                    total += self.parts[0](own.input_ids, **own.beside())
        return total

    @property
    def rows_together(self) -> int:
        """`loss_sum` takes a multiple of so many rows."""
        own = self.micro_batch * self._pipeline.micro_batches if self._pipeline is not None else 1
        return own * self.world.layout.data

    def _own(self, batch: Batch) -> Batch:
        """Ids and labels of the positions this process has, documents and padding of whole rows."""
        inputs, labels, documents, reference, padding = batch
        if self.parts[0].config.mtp_layers and self.training and reference is None:
            labels = _with_next(labels, documents)
        if self._context is not None:
            inputs, labels = self._context.take(inputs), self._context.take(labels)
        place = self.world.device.type
        padding = padding if self.parts[0].config.mixture is not None else None  # for their routers alone
        own = Batch(inputs, labels, documents, reference, padding)
        return own.each(lambda rows: rows.to(place, non_blocking=True))

    def _once(self, loss: Tensor) -> Tensor:
        """Tensor-parallel processes compute the same losses: they count once, in a sum over the world."""
        return loss / self.world.layout.tensor

    def targets(self, batch: Batch) -> Tensor:
        """This process's term of the number of losses that a batch's sum is of: labels that count, or pairs; 0-d."""
        if batch.reference is None:
            count = (batch.labels != IGNORE_INDEX).sum()
        else:
            count = pairs_in(batch.document_ids, batch.reference.shape[1]).sum()
        layout = self.world.layout
        sharers = layout.context * layout.tensor * layout.pipeline
        return count.to(self.world.device.type, torch.float32) / sharers

    def take_further(self) -> dict[str, Tensor]:
        """This process's terms of other sums over targets since the last call, 0-d each: losses of multi-token
        prediction, or the figures of `PreferenceLoss`. The same names on every process."""
        zero = torch.zeros((), device=self.world.device.type)
        sums: dict[str, Tensor] = {}
        if self._preference is not None:
            figures, self._preference.figures = self._preference.figures, None
            sums = dict(zip(REWARDS, [zero] * len(REWARDS) if figures is None else figures, strict=True))
        elif self.parts[0].config.mtp_layers:
            sums = {"next_loss": zero}
            for part in self.parts:
                if part.next_loss is not None:
                    sums["next_loss"] = sums["next_loss"] + part.next_loss
                    part.next_loss = None
        return {name: self._once(value) for name, value in sums.items()}

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
        if part is None or part.embedding is None or not part.embedding.weight.requires_grad:
            return
        weight = part.embedding.weight
        if weight.grad is None:  # the last stage's where nothing predicts the token after the next
            weight.grad = torch.zeros_like(weight)
        own = plain(weight.grad)
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
        # Multi-token prediction has no part in preferences.
        numbers = range(config.layers + (0 if self._preference is not None else config.mtp_layers))
        return torch.stack([loads[number] for number in numbers if config.has_experts(number)])

    @torch.no_grad()
    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply every gradient by `factor`, 0-d."""
        gradients = [plain(parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
        foreach_multiply(gradients, factor)


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
