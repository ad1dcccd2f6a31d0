"""A model over all processes, as the trainer sees it: batches in, losses and gradients out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zili.config import RunConfig
from zili.data.loader import Batch
from zili.models.decoder import Decoder
from zili.models.outputs import Outputs, Routing
from zili.objectives import Alone, Objective, Peers, Terms, learner
from zili.objectives.next_token import NextToken
from zili.objectives.objective import Ask, checked_terms
from zili.parallel.apply import Materialize, build_parts, with_first_weights
from zili.parallel.context import ContextPart
from zili.parallel.control.crumbs import own_crumbs
from zili.parallel.data import reduce_gradients, sum_gradients
from zili.parallel.pipeline import Forward, Pipeline
from zili.parallel.teacher import Teacher
from zili.parallel.world import World
from zili.torch_private import foreach_multiply

_ROUNDING = 1e-5
"""Tensor-parallel processes mostly have the same bits; what is summed in no fixed order differs by some 1e-7."""


class ParallelModel:
    """This process's part of the model, and how its work joins that of the others.

    It cuts batches, runs the parts and adds up. Losses and gradients are sums over targets; who divides by their number
    is the trainer, once, at the end.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        dtype: torch.dtype,
        objective: Objective,
        materialize: Materialize = with_first_weights,
        *,
        targets_a_position: float = 1.0,
        decoder: type[Decoder] = Decoder,
    ) -> None:
        """`targets_a_position`: the mean of the data, which the routers' balance loss is weighed by. `decoder`: the
        kind of model."""
        micro = config.training.micro_batch
        assert isinstance(micro, int), "the configuration is resolved"
        self.world = world
        self.micro_batch = micro
        self.objective = objective
        self._dtype = dtype
        self._sums_each = config.parallel.reduce == "micro_batch"
        self._targets_a_position = targets_a_position
        self.parts = build_parts(
            config, world, dtype, lambda layers: learner(config.model, objective, layers, decoder), materialize
        )
        self._peers: Peers = ContextPart(world) if world.layout.context > 1 else Alone()
        self._pipeline = Pipeline(self.parts, config, world) if world.layout.pipeline > 1 else None
        asked = objective.teacher
        self.teacher = None if asked is None else Teacher(config, asked, world, dtype, materialize)
        self._loads: dict[int, Tensor] = {}
        """Tokens that went to each expert `[E]`, by layer: this process's since `balance`."""

    @property
    def training(self) -> bool:
        return self.parts[0].training

    def train(self, mode: bool = True) -> None:
        for part in self.parts:
            part.train(mode)

    def eval(self) -> None:
        self.train(False)

    @property
    def held(self) -> list[Decoder]:
        """Every part of a model that is here: the stages, and a teacher's."""
        return [*self.parts, *(self.teacher.parts if self.teacher is not None else ())]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a checkpoint must hold of the stages here."""
        for part in self.parts:
            yield from part.named_tensors()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of all stages here, under their names in the whole model."""
        for part in self.parts:
            yield from part.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def autocast(self) -> Any:
        """Context in which matrix products run in the precision of the run."""
        kind = self.world.device.type
        return nullcontext() if self._dtype == torch.float32 else torch.autocast(kind, dtype=self._dtype)

    def accumulate(self, batch: Batch) -> Terms:
        """Backward over this process's rows in micro-batches; gradients are sums over the whole world's targets.

        Returns this process's terms of the sums.
        """
        sums = _Sums(self.objective, self.world.device.type)
        forward, own = partial(self._forward, then=sums.add), self._own(self.objective.prepare(batch))
        if self._pipeline is not None:
            with self.autocast():
                self._pipeline.step(self._with_teacher(own), forward, backward=True)
        else:
            self._one_by_one(list(own.split(self.micro_batch)), forward)
        self._sum_gradients()
        self._join_embeddings()
        return sums.terms(self._once)

    def some_rows(self, batch: Batch) -> Batch:
        """As few of this process's rows of a step as `accumulate` takes: a micro-batch, on a pipeline all."""
        return batch if self._pipeline is not None else batch.rows(slice(0, self.micro_batch))

    def forget(self) -> None:
        """Drop gradients and what was counted, as if no pass had been made."""
        self._loads = {}
        for parameter in self.parameters():
            parameter.grad = None

    def _one_by_one(self, micro_batches: list[Batch], forward: Forward) -> None:
        for number, micro_batch in enumerate(micro_batches, 1):
            own_crumbs().at_micro_batch(number)
            last = number == len(micro_batches)
            reduce_gradients(self.parts[0], now=last or self._sums_each, replicas=last)
            with self.autocast():
                loss = forward(self.parts[0], micro_batch.input_ids, self._with_teacher(micro_batch))
            loss.backward()

    def _forward(self, part: Decoder, inputs: Tensor, batch: Batch, then: Ask) -> Tensor:
        """The pass through one part: its hidden states, or what `then` makes of the last part's outputs."""
        routing = Routing(batch.padding, self._targets_a_position)
        out: Tensor = part(
            inputs,
            document_ids=batch.document_ids,
            routing=routing,
            then=lambda outputs: then(self._beside_teacher(outputs, batch), batch, self._peers),
        )
        for layer, tokens, _ in routing.figures:
            self._loads[layer] = tokens + self._loads.get(layer, 0)
        return out

    def ask_teacher(self, batch: Batch) -> None:
        """A pass of the teacher on this process's rows, after which its weights are as every later step finds them."""
        with self.autocast():
            asked = self._with_teacher(self._own(batch))
        if self.teacher is not None and asked.teacher is not None:
            self.teacher.outputs(asked)

    def _with_teacher(self, batch: Batch) -> Batch:
        """`batch` with what the teacher, if there is one, makes of it: its head is asked later."""
        return batch if self.teacher is None else batch._replace(teacher=self.teacher.hidden_states(batch))

    def _beside_teacher(self, outputs: Outputs, batch: Batch) -> Outputs:
        if self.teacher is None or batch.teacher is None:
            return outputs
        return replace(outputs, teacher=self.teacher.outputs(batch))

    def _sum_gradients(self) -> None:
        if self.world.size > 1:
            for part in self.parts:
                sum_gradients(part, self.world, self._dtype)

    def loss_sum(self, input_ids: Tensor, labels: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """Sum of the cross entropies of whole rows `[B, S]`, as `evaluate` takes them."""
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        return self.evaluate(Batch(input_ids, labels, document_ids), NextToken()).loss

    def evaluate(self, batch: Batch, objective: Objective | None = None) -> Terms:
        """Sums over whole rows, which every process gives alike: each computes its share. Without gradients.

        There is a multiple of `rows_together` of them. `objective`: another one than is learned.
        """
        objective = objective or self.objective
        sums = _Sums(objective, self.world.device.type)
        self._evaluate(objective.prepare(batch), sums.add, teacher=objective.teacher is not None)
        return sums.terms(lambda term: self.world.sum(self._once(term)))

    def row_values(self, batch: Batch, ask: Ask, width: int) -> Tensor:
        """What `ask` says of each whole row, `[B, width]`, summed over the processes that share the row.

        Rows as for `evaluate`; without gradients.
        """
        kept: list[Tensor] = []

        def keep(outputs: Outputs, some: Batch, peers: Peers) -> Tensor:
            kept.append(ask(outputs, some, peers))
            return kept[-1].sum()

        table = torch.zeros(len(batch.input_ids), width, device=self.world.device.type)
        self._evaluate(batch, keep)
        if kept:  # the last stage's
            own = torch.cat(kept)
            at_once = len(table) if self._pipeline is None else self.rows_together
            for start in range(0, len(table), at_once):
                mine = self.world.rows(min(at_once, len(table) - start))
                count = mine.stop - mine.start
                table[start + mine.start : start + mine.stop], own = own[:count], own[count:]
        return self.world.sum(self._once(table))

    @torch.no_grad()
    def _evaluate(self, whole: Batch, then: Ask, *, teacher: bool = False) -> None:
        """This process's share of whole rows; whether the teacher is asked too."""
        forward = partial(self._forward, then=then)
        # A pipeline's messages have one size, that of a step.
        at_once = self.rows_together if self._pipeline is not None else len(whole.input_ids)
        for some in whole.split(at_once):
            own = self._own(some.rows(self.world.rows(len(some.input_ids))))
            with self.autocast():
                own = self._with_teacher(own) if teacher else own
                if self._pipeline is not None:
                    self._pipeline.step(own, forward, backward=False)
                else:
                    forward(self.parts[0], own.input_ids, own)

    @property
    def rows_together(self) -> int:
        """`evaluate` takes a multiple of so many rows."""
        own = self.micro_batch * self._pipeline.micro_batches if self._pipeline is not None else 1
        return own * self.world.layout.data

    def _own(self, batch: Batch) -> Batch:
        """Ids and labels of the positions this process has, documents and padding of whole rows."""
        inputs, labels = self._peers.take(batch.input_ids), self._peers.take(batch.labels)
        padding = batch.padding if self.parts[0].config.mixture is not None else None  # for their routers alone
        own = batch._replace(input_ids=inputs, labels=labels, padding=padding)
        return own.each(lambda rows: rows.to(self.world.device.type, non_blocking=True))

    def disagrees(self, own: Terms) -> bool:
        """Whether the tensor-parallel processes found other sums for the same rows, beyond rounding: an objective took
        the part of the vocabulary that is here for the whole. Each of the group asks."""
        sums = torch.stack([own.loss, *own.figures.values()]).float()
        ends = torch.stack((sums, -sums))
        dist.all_reduce(ends, dist.ReduceOp.MAX, self.world.mesh("tensor").get_group())
        scale = ends.abs().amax(0).clamp(min=float(own.count))  # a figure may be all but zero
        return bool((ends.sum(0) > _ROUNDING * scale).any())

    def _once(self, term: Tensor) -> Tensor:
        """Tensor-parallel processes compute the same terms: they count once, in a sum over the world."""
        return term / self.world.layout.tensor

    @torch.no_grad()
    def squared_gradient(self) -> Tensor:
        """This process's term of the squared norm of the whole gradient, 0-d fp32.

        A part that several processes hold counts in each by its share, so that one sum over the world serves every
        layout. Norms of DTensors on meshes of their own could not be joined.
        """
        total = torch.zeros((), device=self.world.device.type)
        for name, parameter in self.named_parameters():
            if parameter.grad is not None and not self.is_second(name):
                total += plain(parameter.grad).square().sum() / self.copies(parameter)
        return total

    def is_second(self, name: str) -> bool:
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
    def balance(self, left_out: Tensor | None = None) -> Tensor | None:
        """Move the routers' biases by the load of the step, and begin to count anew. They stay where `left_out` (0-d)
        is 1: the step's update is left out.

        Returns tokens an expert `[L, E]` over all processes, or None for a model without experts.
        """
        config = self.parts[0].config
        if config.mixture is None:
            return None
        loads = torch.zeros(config.layers + config.mtp_layers, config.mixture.experts, device=self.world.device.type)
        for layer, tokens in self._loads.items():
            loads[layer] = tokens
        self._loads = {}
        self.world.sum(loads)
        for router in (router for part in self.parts for router in part.routers() if config.lora is None):
            load = loads[router.layer]  # beside adapters they stay as they are
            router.balance(load if left_out is None else load * (1 - left_out))  # of no load none is above the mean
        return torch.stack([loads[layer] for layer in range(len(loads)) if config.has_experts(layer)])

    @torch.no_grad()
    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply every gradient by `factor`, 0-d."""
        gradients = [plain(parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
        foreach_multiply(gradients, factor)


class _Sums:
    """Terms of a pass, added up as they come."""

    def __init__(self, objective: Objective, device: str) -> None:
        zero = torch.zeros((), device=device)
        self._objective = objective
        self._sums = Terms(zero, dict.fromkeys(objective.figures, zero), zero)

    def add(self, outputs: Outputs, batch: Batch, peers: Peers) -> Tensor:
        """Ask the objective; returns what is to be differentiated."""
        new, old = checked_terms(self._objective, outputs, batch, peers), self._sums
        figures = {name: total + new.figures[name].detach() for name, total in old.figures.items()}
        self._sums = Terms(old.loss + new.loss.detach(), figures, old.count + new.count)
        return new.loss

    def terms(self, change: Callable[[Tensor], Tensor]) -> Terms:
        """`change` of every sum."""
        figures = {name: change(total) for name, total in self._sums.figures.items()}
        return Terms(change(self._sums.loss), figures, change(self._sums.count))


def plain(x: Tensor) -> Tensor:
    """This process's part of a DTensor, or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x
