"""What layers hold: their weights, gathered and cut, and what a micro-batch leaves in them, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

from zili.models.arithmetic import is_hidden_matrix
from zili.planning.exact.job import Job
from zili.planning.exact.weights import Group, end_groups, layer_groups

FP32 = 4
_INT64 = 8


class Gathered(NamedTuple):
    """Weights that are gathered together, or that every process holds whole."""

    elements: int
    """As products take them."""
    stored: int
    """This process's share of those."""
    gathered: int
    """Bytes, once they are."""
    learned: int
    """Elements that have gradients."""
    learned_here: int
    """This process's elements that have gradients."""
    ahead: int
    """Of `gathered`, what the backward pass asks for while the layer after it is at work: not experts, which are when
    their own layer is; and what one process has is copied when it is used."""
    moments: int
    """Elements that the optimizer keeps: two for each weight that it moves; Muon one for matrices inside blocks."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of a layer's share of a micro-batch, and elements of its weights."""

    kept: float
    """Left by the forward pass for the backward pass."""
    whole: float
    """The same without recomputation: what the backward pass begins with."""
    worst: float
    """More than `whole`, at the worst moment of the backward pass; gradients of weights left out."""
    put_off: float
    """What waits for gradients of weights, where they come later than those of activations."""
    groups: tuple[Gathered, ...]
    """Its weights, in the order in which their gradients are complete."""
    largest: int
    """Elements of the weight whose gradient is made at the worst moment."""

    @cached_property
    def elements(self) -> int:
        return sum(group.elements for group in self.groups)

    @cached_property
    def gathered(self) -> int:
        return sum(group.gathered for group in self.groups)

    @cached_property
    def ahead(self) -> int:
        return sum(group.ahead for group in self.groups)

    @cached_property
    def learned(self) -> int:
        return sum(group.learned for group in self.groups)


Kinds = dict[bool, LayerMemory]
"""One layer of each kind: of those with experts, and of those without."""


class Held:
    """The layers of each stage that a process has, and what lies around them."""

    def __init__(self, job: Job, kinds: Kinds) -> None:
        """`kinds`: those of another place of the pipeline, whose layers are the same; those that lack are added."""
        self.stages = [_stage_layers(job, stage, kinds) for stage in job.stages]
        self.ends = [_ends(job, stage) for stage in job.stages]
        idle = layer_groups(job, job.model.layers) if job.has_last and job.model.mtp_layers else ()
        self.idle = () if job.predicts_further else _gathered(job, tuple(idle))
        """Weights that take no part: of multi-token prediction where it is not learned."""

    @cached_property
    def groups(self) -> list[Gathered]:
        layers = [*(layer for stage in self.stages for layer in stage), *self.ends]
        return [*(group for layer in layers for group in layer.groups), *self.idle]

    @property
    def weights(self) -> float:
        """Bytes of this process's share."""
        return FP32 * sum(group.stored for group in self.groups)

    @property
    def moments(self) -> float:
        """Bytes that the optimizer keeps."""
        return FP32 * sum(group.moments for group in self.groups)

    @property
    def gathered(self) -> float:
        """Bytes of all weights at once, as products take them."""
        return sum(group.gathered for group in self.groups)


def kept_bytes(job: Job) -> float:
    """What a layer keeps of a micro-batch from its forward to its backward pass; of the kind that keeps least."""
    return min(_kept(job, number)[0] for number in {0, job.model.layers - 1})


def _gathered(job: Job, groups: Sequence[Group]) -> tuple[Gathered, ...]:
    found = []
    for group in groups:
        shards = 1 if job.whole else job.layout.expert_shards if group.of_experts else job.layout.weight_shards
        taken = 0 if group.whole else FP32 if group.in_fp32 else job.product_bytes
        elements, learned = group.pieces(1), group.pieces(1, learned=True)
        here, moved = group.pieces(shards), group.pieces(shards, learned=True)
        one_less = _of_muon(group).pieces(shards, learned=True) if job.config.optimizer.name == "muon" else 0
        ahead = 0 if group.of_experts or shards == 1 else elements * taken
        found.append(Gathered(elements, here, elements * taken, learned, moved, ahead, 2 * moved - one_less))
    return tuple(found)


def _of_muon(group: Group) -> Group:
    return replace(group, parameters=tuple(p for p in group.parameters if is_hidden_matrix(p.name, p.shape)))


def _stage_layers(job: Job, stage: range, kinds: Kinds) -> list[LayerMemory]:
    """The layers of a stage; of each kind only one is computed."""
    for number in stage:
        kind = job.model.has_experts(number)
        if kind not in kinds:
            kinds[kind] = _layer(job, number)
    found = [kinds[job.model.has_experts(number)] for number in stage]
    if stage.stop == job.model.layers and job.predicts_further:
        found.append(_layer(job, job.model.layers))
    return found


def _ends(job: Job, stage: range) -> LayerMemory:
    return LayerMemory(0, 0, 0, 0, _gathered(job, tuple(end_groups(job, stage))), 0)


def _layer(job: Job, number: int) -> LayerMemory:
    groups = tuple(layer_groups(job, number))
    kept, whole = _kept(job, number)
    largest = max((prod(p.shape) for group in groups for p in group.parameters if p.learned), default=0)
    worst = max(2 * job.product_bytes * _inner(job, number), _combined(job, number) - job.product_bytes * largest)
    model, tensor = job.model, job.layout.tensor
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim / tensor
    put_off = job.product_bytes * (2 * _inner(job, number) + job.tokens * (heads + 2 * model.hidden_size))
    put_off += 2 * FP32 * job.own_tokens * model.hidden_size
    return LayerMemory(kept, whole, worst, put_off, _gathered(job, groups), largest)


def _kept(job: Job, number: int) -> tuple[float, float]:
    """What a layer keeps of a micro-batch, and what it would without recomputation."""
    whole = sum(_kept_whole(job, number))
    kept = {"none": whole, "full": FP32 * job.own_tokens * job.model.hidden_size}.get(job.config.training.recompute)
    if kept is None:
        kept = _kept_selective(job, number)
    if not (job.whole and job.layout.pipeline == 1 and job.lowered):
        return kept, whole
    # Autocast lowers weights that are whole, and keeps that for the backward pass.
    shapes = [parameter.shape for group in layer_groups(job, number) for parameter in group.parameters]
    copies = job.product_bytes * sum(map(prod, shapes))
    return kept + copies, whole + copies


def _combined(job: Job, number: int) -> float:
    """What is there while experts' rows become tokens: rows as they were sent and came back, and both times weights."""
    mixture = job.model.mixture
    if mixture is None or not job.model.has_experts(number):
        return 0.0
    row = (2 if job.layout.expert > 1 else 1) * job.product_bytes + FP32
    return row * job.own_tokens * mixture.top_k * job.model.hidden_size


def _inner(job: Job, number: int) -> float:
    """Elements between the two products of a feed-forward layer."""
    mixture = job.model.mixture
    if mixture is not None and job.model.has_experts(number):
        return job.own_tokens * (mixture.top_k + mixture.shared_experts) * mixture.ffn_hidden_size
    return job.tokens * job.model.ffn_hidden_size / job.layout.tensor


def _kept_whole(job: Job, number: int) -> Iterator[float]:
    """What a layer's forward pass leaves, piece by piece."""
    model, own, tokens, size = job.model, job.own_tokens, job.tokens, job.product_bytes
    hidden = model.hidden_size
    # Both sums of the residual stream, and what both norms divided, which only their weights' gradients need.
    yield (4 if model.lora is None else 2) * FP32 * own * hidden + 2 * FP32 * own
    yield from _kept_adapters(job, number)
    yield from _kept_attention(job)
    mixture = model.mixture
    if mixture is None or not model.has_experts(number):
        yield size * tokens * hidden if _learns(job, "gate", "up") else 0
        yield (4 if _learns(job, "down") else 3) * size * _inner(job, number)
        return
    # The router's input in fp32, the same lowered for experts, and its scores.
    yield (FP32 + 2 * (size if job.lowered else 0)) * own * hidden + 2 * FP32 * own * mixture.experts
    rows = own * mixture.top_k
    # Rows in their experts' order, and what came back.
    yield 2 * size * rows * hidden + 2 * _INT64 * rows
    yield 4 * size * _inner(job, number)


def _learns(job: Job, *matrices: str) -> bool:
    """Whether the input of one of a layer's products is needed for a gradient: of the matrix, or of its adapter."""
    lora = job.model.lora
    return lora is None or any(name in lora.matrices for name in matrices)


def _kept_adapters(job: Job, number: int) -> Iterator[float]:
    """Between both factors of each adapter of a layer."""
    lora = job.model.lora
    for name, shape in job.shapes(number).items() if lora is not None else ():
        if name.endswith("lora_a"):
            yield job.product_bytes * job.tokens * shape[0]


def _kept_attention(job: Job) -> Iterator[float]:
    model, own, tokens, size, tensor = job.model, job.own_tokens, job.tokens, job.product_bytes, job.layout.tensor
    latent, heads, head = model.latent, job.model.heads / tensor, model.head_dim
    keys = tokens if job.layout.context == 1 else job.micro_batch * job.sequence
    if job.on_host and (job.lowered or job.config.chip.operations.get("attention") == "reference"):
        # torch's kernel on the host takes which key is seen as numbers; ours in blocks, of fp32 alone, does not.
        yield size * tokens * job.sequence
    if latent is None:
        yield size * tokens * model.hidden_size if _learns(job, "query", "key", "value") else 0
        yield size * tokens * heads * head  # queries
        yield size * keys * job.attended_heads / tensor * (head + model.value_head_dim)
    else:
        short = latent.query_rank + latent.key_value_rank
        yield size * own * model.hidden_size
        yield (FP32 + size) * own * short + FP32 * own * 2
        yield size * tokens * (short + latent.rope_head_dim)
        yield size * tokens * heads * head  # queries
        plain = head - latent.rope_head_dim
        yield size * keys * heads * (head + plain + model.value_head_dim)
    yield size * tokens * heads * model.value_head_dim + FP32 * tokens * heads


def _kept_selective(job: Job, number: int) -> float:
    """Results of products and attention in a layer's forward pass, and what came from other processes."""
    model, own, tokens, size = job.model, job.own_tokens, job.tokens, job.product_bytes
    tensor, context, latent, mixture = job.layout.tensor, job.layout.context, model.latent, model.mixture
    heads, hidden = model.heads / tensor, model.hidden_size
    kept = FP32 * own * hidden + size * tokens * heads * model.value_head_dim + FP32 * tokens * heads
    kept += size * tokens * hidden + (size * own * hidden if tensor > 1 else 0)  # the attention's output
    if latent is None:
        keys = model.kv_heads / tensor * (model.head_dim + model.value_head_dim)
        kept += size * tokens * (heads * model.head_dim + keys)
        kept += size * tokens * hidden if tensor > 1 else 0
    else:
        keys = heads * (model.head_dim + model.value_head_dim)
        short = latent.query_rank + latent.key_value_rank + latent.rope_head_dim
        kept += size * own * short + (size * tokens * short if tensor > 1 else 0)
        kept += size * tokens * heads * (2 * model.head_dim - latent.rope_head_dim + model.value_head_dim)
    kept += size * job.micro_batch * job.sequence * keys if context > 1 else 0
    if mixture is None or not model.has_experts(number):
        kept += 2 * size * _inner(job, number) + size * tokens * hidden
        return kept + (size * (tokens + own) * hidden if tensor > 1 else 0)
    rows = own * mixture.top_k
    kept += size * (2 * _inner(job, number) + (rows + (own if mixture.shared_experts else 0)) * hidden)
    kept += 2 * size * rows * hidden if job.layout.expert > 1 else 0
    return kept + FP32 * own * mixture.experts
