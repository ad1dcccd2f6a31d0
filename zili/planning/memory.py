"""Bytes that one process takes in a step, in closed form: the moments at which most is there.

A step is a sequence of forward and backward passes over this process's stages. Between two of them lie weights, what
the optimizer keeps, gradients so far, and what micro-batches in flight have left for their backward passes; inside one,
what it makes and gives back. So the step is walked through pass by pass, and a backward pass layer by layer.
A rehearsal runs the real thing; tests/planning/test_memory.py compares the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

from zili.models.arithmetic import is_hidden_matrix
from zili.planning.job import Job
from zili.planning.messages import rows_at_once
from zili.planning.schedule import Action, Plan, asked_for
from zili.planning.weights import Group, end_groups, layer_groups, weight_groups

_FP32, _INT32, _INT64 = 4, 4, 8
Bytes = dict[str, float]

WEIGHTS, GATHERED, GRADIENTS, OPTIMIZER = "weights", "gathered weights", "gradients", "optimizer"
ACTIVATIONS, BACKWARD, LOGITS, MESSAGES, BATCH = "activations", "backward", "logits", "messages", "batch"
CHECKPOINT = "checkpoint"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, GATHERED, ACTIVATIONS, LOGITS, BACKWARD, MESSAGES, BATCH, CHECKPOINT)
"""What memory is for; a rehearsal has the same names."""


RESERVED = 0.06
"""Share of a chip's memory that its runtime, its collectives' buffers and gaps between blocks take."""


def usable(capacity: float) -> float:
    """Of a chip's memory, bytes, what a run can have: by this `zili train`, `plan` and `rehearse` say what fits."""
    return (1 - RESERVED) * capacity


def peak_bytes(job: Job) -> Bytes:
    """Bytes by part, at the moment at which the process at the job's place has most."""
    step = _Step(job)
    step.walk()
    return step.most


def places_in_order(pipeline: int) -> list[int]:
    """Of a pipeline's processes; first those that mostly have most."""
    last = pipeline - 1
    return list(dict.fromkeys((0, min(1, last), last // 2, (4 * last) // 5, last, *range(last + 1))))


def fullest(job: Job) -> Bytes:
    """`peak_bytes` of the place that has most of all in the job's pipeline."""
    places = places_in_order(job.layout.pipeline)
    return max((peak_bytes(replace(job, place=place)) for place in places), key=lambda parts: sum(parts.values()))


def saved_bytes(job: Job) -> float:
    """Of the host's memory, what a save in the background copies: weights and what the optimizer keeps."""
    return _FP32 * (sum(gathered.stored for gathered in _gathered(job, list(weight_groups(job)))) + _moments(job))


def may_sum_each(job: Job) -> bool:
    """Whether summing gradients after each micro-batch is possible, and takes less memory than once a step."""
    late = job.layout.pipeline > 1 and job.config.parallel.schedule in ("zero_bubble", "zbv")
    shards = job.layout.weight_shards if job.model.mixture is None else job.layout.expert_shards
    return not (job.whole or late) and max(shards, job.layout.weight_shards) > 1 and job.micro_batches > 1


def with_reduce(job: Job, room: float) -> Job:
    """`job` with `parallel.reduce` decided, where it is left to us: once a step if that fits into `room` bytes, or
    nothing else is possible."""
    if job.config.parallel.reduce != "auto":
        return job
    once, each = (reducing(job, when) for when in ("step", "micro_batch"))
    return each if may_sum_each(job) and sum(fullest(once).values()) > room else once


def reducing(job: Job, when: str) -> Job:
    """`job` with that `parallel.reduce`."""
    parallel = job.config.parallel.model_copy(update={"reduce": when})
    return replace(job, config=job.config.model_copy(update={"parallel": parallel}))


class _Gathered(NamedTuple):
    """Weights that are gathered together, or that every process holds whole."""

    elements: int
    """As products take them."""
    stored: int
    """Of those, this process's."""
    gathered: int
    """Bytes, once they are."""
    learned: int
    """Of `elements`, those that have gradients."""
    learned_here: int
    """Of `stored`."""
    ahead: int
    """Of `gathered`, what the backward pass asks for while the layer after it is at work: not experts, which are when
    their own layer is; and what one process has is copied when it is used."""


@dataclass(frozen=True)
class _Layer:
    """Bytes of a layer's share of a micro-batch, and elements of its weights."""

    kept: float
    """Left by the forward pass for the backward pass."""
    whole: float
    """The same without recomputation: what the backward pass begins with."""
    worst: float
    """More than `whole`, at the worst moment of the backward pass; gradients of weights left out."""
    put_off: float
    """What waits for gradients of weights, where they come later than those of activations."""
    groups: tuple[_Gathered, ...]
    """Its weights, in the order in which their gradients are complete."""
    largest: int
    """Elements of the weight whose gradient is made at the worst moment."""

    @cached_property
    def elements(self) -> int:
        return sum(group.elements for group in self.groups)

    @cached_property
    def stored(self) -> int:
        return sum(group.stored for group in self.groups)

    @cached_property
    def gathered(self) -> int:
        return sum(group.gathered for group in self.groups)

    @cached_property
    def learned(self) -> int:
        return sum(group.learned for group in self.groups)

    @cached_property
    def ahead(self) -> int:
        return sum(group.ahead for group in self.groups)


class _Step:
    """What is there as a step goes on, and the moment with most."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.live: Bytes = defaultdict(float)
        self.most: Bytes = {}
        self._top = -1.0
        self.alone = job.whole
        """A process that has its weights whole gathers none, and lowered ones are kept for the backward pass."""
        self._shards = 1 if self.alone else job.layout.weight_shards
        self.pipelined = job.layout.pipeline > 1
        known: dict[bool, _Layer] = {}
        self.stages = [_stage_layers(job, stage, known) for stage in job.stages]
        self.ends = [_ends(job, stage) for stage in job.stages]
        idle = layer_groups(job, job.model.layers) if job.has_last and job.model.mtp_layers else ()
        self.idle = () if job.predicts_further else _gathered(job, tuple(idle))
        """Weights that take no part: of multi-token prediction beside preferences."""
        self._flying = dict.fromkeys(range(len(job.stages)), 0.0)
        """Of each stage the message of its last sum, which FSDP2 keeps until the next one inside a pipeline."""
        self._summed = dict.fromkeys(range(len(job.stages)), False)
        self._late = 0.0
        self._kept = [self._kept_of(place) for place in range(len(job.stages))]

    def at(self, *more: tuple[str, float]) -> None:
        """A moment, with `more` than what stays."""
        total = sum(self.live.values()) + sum(size for _, size in more)
        if total <= self._top:
            return
        self._top = total
        self.most = dict(self.live)
        for part, size in more:
            self.most[part] = self.most.get(part, 0.0) + size

    # ---- sizes

    @property
    def weight_bytes(self) -> int:
        """Of an element of a weight as the loss has it: a gathered head is lowered, that of a lone process or one that
        is the embedding is not."""
        return _FP32 if self.alone or self.job.model.tied_embeddings else self.job.product_bytes

    @cached_property
    def stream(self) -> float:
        """Hidden states of this process's tokens in a micro-batch."""
        return _FP32 * self.job.own_tokens * self.job.model.hidden_size

    def walk(self) -> None:
        """The step."""
        job = self.job
        stored = sum(layer.stored for stage in self.stages for layer in stage) + sum(end.stored for end in self.ends)
        stored += sum(group.stored for group in self.idle)
        self.live[WEIGHTS] = _FP32 * stored
        self.live[OPTIMIZER] = _FP32 * _moments(job)
        rows = job.micro_batches * job.micro_batch * job.sequence / job.layout.context
        self.live[BATCH] = rows * 2 * _INT64 + job.micro_batches * job.micro_batch * job.sequence * _INT32
        if job.on_host and job.config.checkpoint.asynchronous:
            # The save before may still be written while the step goes on.
            self.live[CHECKPOINT] = saved_bytes(job)
        if self.pipelined:
            self._pipeline()
        else:
            self._one_after_another()
        self.at()

    # ---- without a pipeline

    def _one_after_another(self) -> None:
        """Micro-batches one after another; weights are gathered as they are used, gradients summed in the last or
        in each."""
        (layers,), (end,), job = self.stages, self.ends, self.job
        # All between the first and the last are alike.
        for number in sorted({0, min(1, job.micro_batches - 1), job.micro_batches - 1}):
            summed = not self.alone and (job.sums_each or number == job.micro_batches - 1)
            if not self.alone:
                self.live[GATHERED] = end.gathered
            self._forward(0)
            self._loss(layers[-1] if layers else None)
            self._backward(0, summed=summed)

    # ---- with one

    def _pipeline(self) -> None:
        """Weights are gathered once, gradients summed at the end or after each micro-batch."""
        job = self.job
        count = enough(job)
        plan = Plan(job.config.parallel.schedule, job.layout.pipeline, len(job.stages), count)
        home = {number: place for place, number in enumerate(job.stage_numbers)}
        if job.lowered or not job.whole:
            self.live[GATHERED] = sum(layer.gathered for stage in self.stages for layer in stage)
            self.live[GATHERED] += sum(end.gathered for end in self.ends) + sum(group.gathered for group in self.idle)
        # Of every stage the gradient that it sent last is still there.
        sent = sum(number > 0 and number - 1 not in home for number in home)
        for action, unused in zip(plan.actions(job.place), asked_for(plan)[job.place], strict=True):
            self.live[MESSAGES] = (sent + unused) * self.stream + sum(self._flying.values())
            self._act(action, home, plan)
            if action.kind in ("backward", "weights") and action.micro_batch == count - 1 and not job.whole:
                self._sum_stage(home[action.stage])

    def _act(self, action: Action, home: dict[int, int], plan: Plan) -> None:
        """One action of the stage that is this process's `home[stage]`-th."""
        place, last = home[action.stage], plan.stages - 1
        if action.kind == "forward":
            self._forward(place)
            if action.stage == last:
                self._loss(None)
        elif action.kind == "weights":
            self._weights(place)
        else:
            self._backward(place, summed=self.job.sums_each, put_off=action.kind == "inputs")

    def _weights(self, place: int) -> None:
        """Gradients of a stage's weights, that were put off; only now activations are given back."""
        layers, end = self.stages[place], self.ends[place]
        elements = sum(layer.elements for layer in layers) + end.elements
        # Lowered ones are raised when all are there; others are added to where they stay.
        made = sum(layer.elements for layer in layers) if self.job.lowered else 0
        self.at((BACKWARD, self.job.product_bytes * made))
        self.live[BACKWARD] -= sum(layer.put_off for layer in layers)
        if self.job.stages[place].stop == self.job.model.layers:
            tokens = self.job.tokens * self.job.model.hidden_size * self.job.product_bytes
            self.live[BACKWARD] -= self._head_gradient
            self.live[LOGITS] -= tokens + self._head_gradient + self._first_loss
        kept = self._kept[place]
        # Where a V turns, both its stages are one process's, and torch lets go of a micro-batch one later.
        turns = self.job.config.parallel.schedule == "zbv" and self.job.place == self.job.layout.pipeline - 1
        self.live[ACTIVATIONS] -= self._late if turns else kept
        self._late = kept
        if not self._summed[place]:
            self._summed[place] = True
            self.live[GRADIENTS] += _FP32 * elements

    def _sum_stage(self, place: int) -> None:
        """Gradients of a stage, a group at a time, that were added up; by then its weights are given back."""
        for layer in (self.ends[place], *self.stages[place]):
            for group in layer.groups:
                self.live[GATHERED] -= group.gathered
                if self.job.adds_up:
                    self._sum(group, new=False)

    def _sum(self, group: _Gathered, new: bool, *common: tuple[str, float]) -> float:
        """Gradients of a group joined, summed over processes and cut; bytes of the message that is still there after
        it. `new`: they are the first."""
        if not group.learned:
            return 0.0
        # Added up in fp32 over micro-batches, or as one has made them.
        made = 0 if self.job.adds_up else self.job.product_bytes * group.learned
        added = _FP32 * group.learned if self.job.adds_up else 0
        flying, arriving = _FP32 * group.learned, _FP32 * group.learned_here
        self.at((MESSAGES, flying), (GRADIENTS, made + arriving), *common)
        self.live[GRADIENTS] += (arriving if new or added else 0) - added
        # What every process holds whole is summed when all else is; by then no other message is there.
        return flying if group.gathered else 0.0

    # ---- passes

    def _forward(self, place: int) -> None:
        self.live[ACTIVATIONS] += self._kept[place]
        self.at()

    def _kept_of(self, place: int) -> float:
        """Of a micro-batch in a stage: its layers', angles of positions, and what came in where another stage on this
        process does not have it anyway."""
        job = self.job
        kept = sum(layer.kept for layer in self.stages[place])
        kept += 2 * _FP32 * job.sequence / job.layout.context * job.model.rotary_dim
        number = job.stage_numbers[place]
        if number == 0 or number - 1 not in job.stage_numbers:
            kept += self.stream
        return kept

    def _loss(self, before: _Layer | None) -> None:
        """Norm, logits, and both gradients of the loss, which are made with it."""
        job = self.job
        tokens = job.tokens * job.model.hidden_size * job.product_bytes
        matrix = job.model.vocab_size // job.layout.tensor * job.model.hidden_size
        rows = min(job.tokens, rows_at_once(job))
        logits = rows * job.model.vocab_size // job.layout.tensor
        lowered = job.product_bytes if job.lowered else 0
        self.live[ACTIVATIONS] += self.stream + tokens
        self.live[LOGITS] += tokens + self._first_loss
        raised = self.weight_bytes > job.product_bytes
        copy, in_fp32 = (job.product_bytes * matrix, _FP32 * matrix) if raised else (0, 0)
        gathered = 0 if before is None or self._shards == 1 else before.gathered
        here = ((ACTIVATIONS, self.stream), (GATHERED, gathered))
        so_far = self._head_gradient if rows < job.tokens else 0
        self.at((LOGITS, logits * (_FP32 + lowered) + copy + so_far), *here)
        scores = logits * job.product_bytes
        made = job.product_bytes * matrix + self._head_gradient + in_fp32 if self._head_gradient else 0.0
        if rows >= job.tokens and made and not raised:
            # The only chunk's is straightened when its scores are gone; others add up beside theirs.
            made -= min(scores, self._head_gradient)
        self.at((LOGITS, scores + copy + made), *here)
        self.live[LOGITS] += self._head_gradient

    def _after_loss(self, put_off: bool) -> None:
        """The loss's own backward pass: its gradients, made with it, times that of the loss."""
        tokens = self.job.tokens * self.job.model.hidden_size * self.job.product_bytes
        self.at((BACKWARD, self._head_gradient + tokens))
        self.live[BACKWARD] += self._head_gradient
        self.live[ACTIVATIONS] -= self.stream + tokens
        if not put_off:
            self.live[LOGITS] -= tokens + self._head_gradient

    @cached_property
    def _first_loss(self) -> float:
        """What the loss of the next token has made, until that of the token after it has gone backward."""
        tokens = self.job.tokens * self.job.model.hidden_size * self.job.product_bytes
        return tokens + self._head_gradient if self.job.predicts_further else 0.0

    @cached_property
    def _looked_up(self) -> float:
        """Of the embedding, as a micro-batch makes it: fp32 in every run; beside adapters it has none."""
        model = self.job.model
        rows = 0 if model.lora is not None else model.vocab_size // self.job.layout.tensor
        return _FP32 * rows * model.hidden_size

    @cached_property
    def _head_gradient(self) -> float:
        """Of the output matrix; beside adapters it has none."""
        model = self.job.model
        if model.lora is not None:
            return 0.0
        return self.weight_bytes * (model.vocab_size // self.job.layout.tensor) * model.hidden_size

    def _backward(self, place: int, summed: bool, put_off: bool = False) -> None:
        """Through a stage, its last layer first."""
        job = self.job
        ends_here = job.stages[place].stop == job.model.layers
        if ends_here:
            self._after_loss(put_off)
        layers = self.stages[place]
        new = not self._summed[place] and not put_off
        # Beside the gradient on its way there is the one that came from the next stage.
        gradient = self.stream if ends_here else 2 * self.stream
        flying = 0.0
        for number in reversed(range(len(layers))):
            layer = layers[number]
            # Gathered while this one is at work; alone with its weights, a process copies them without a buffer.
            ahead = layers[number - 1].ahead if number and self._shards > 1 else 0
            gathered = 0 if self.pipelined or self.alone else layer.gathered + ahead
            common = ((GATHERED, gathered), (MESSAGES, flying), (BACKWARD, gradient))
            if put_off:
                # A norm's backward pass has several terms at once.
                self.at((BACKWARD, layer.put_off + 5 * self.stream), *common)
                self.live[BACKWARD] += layer.put_off
                continue
            self.live[ACTIVATIONS] += layer.whole - layer.kept
            self.at((BACKWARD, layer.worst + job.product_bytes * layer.largest), *common)
            self.live[ACTIVATIONS] -= layer.whole
            left = layer.gathered
            for group in layer.groups:
                # Each is given back when its gradients are complete.
                own = 0 if self.pipelined or self.alone else left + ahead
                fresh = self._fresh(group, layer, new and not summed)
                self.at((GRADIENTS, fresh), (GATHERED, own), (MESSAGES, flying), (BACKWARD, gradient))
                left -= group.gathered
            if new and (self.alone or job.adds_up):
                self.live[GRADIENTS] += _FP32 * layer.learned
            gathered = 0 if self.pipelined else ahead
            if summed and self.pipelined:
                self.live[MESSAGES] -= self._flying[place]
                self._flying[place] = 0.0
            for group in layer.groups if summed else ():
                flying = self._sum(group, new, (GATHERED, gathered), (BACKWARD, gradient)) or flying
            if ends_here and number == len(layers) - 1:
                self.live[BACKWARD] += self._looked_up if self._first_loss else 0.0
                self.at((BACKWARD, self._first_loss))
                self.live[LOGITS] -= self._first_loss
        if not put_off:
            self.live[ACTIVATIONS] -= self._kept[place] - sum(layer.kept for layer in layers)
        if ends_here:
            # Looked up twice in one stage, the embedding has two gradients and their sum.
            twice = self._first_loss and job.stages[place].start == 0
            self.at((BACKWARD, 2 * self._looked_up if twice else 0.0))
            self.live[BACKWARD] -= 0 if put_off else self._head_gradient
            self.live[BACKWARD] -= self._looked_up if self._first_loss and not put_off else 0.0
        if not put_off:
            self._end_backward(place, new, summed, flying)

    def _end_backward(self, place: int, new: bool, summed: bool, flying: float) -> None:
        """Gradients of what lies around a stage's blocks, which come last; `flying`: of those before."""
        end, job = self.ends[place], self.job
        if job.stages[place].start == 0:
            raised = _FP32 * end.learned if new and job.adds_up and job.lowered else 0
            self.at((BACKWARD, self._looked_up), (GRADIENTS, raised))
        if new and (self.alone or job.adds_up):
            self.live[GRADIENTS] += _FP32 * end.learned
        if summed and not self.pipelined:
            self.live[GATHERED] = 0.0
        for group in end.groups if summed else ():
            flying = self._sum(group, new) or flying
        self._flying[place] = flying
        self._summed[place] = True

    def _fresh(self, group: _Gathered, layer: _Layer, first: bool) -> float:
        """Gradients of a micro-batch when those of a group are complete, beside those of earlier ones."""
        if self.alone or not self.job.lowered:
            # Each is added as it is made.
            return _FP32 * (group.learned if first else layer.largest)
        return group.learned * (self.job.product_bytes + (_FP32 if first else 0))


def enough(job: Job) -> int:
    """Micro-batches after which a step only repeats itself: three rounds of a pipeline, or first, next and last."""
    rounds = 3 * job.layout.pipeline
    even = job.config.parallel.schedule in ("1f1b", "zbv") or job.micro_batches % job.layout.pipeline == 0
    return rounds if even and job.micro_batches > rounds else job.micro_batches


def kept_bytes(job: Job) -> float:
    """What a layer keeps of a micro-batch from its forward to its backward pass; of the kind that keeps least."""
    return min(_layer(job, number).kept for number in {0, job.model.layers - 1})


def _moments(job: Job) -> float:
    """Elements that the optimizer keeps: two for each weight that it moves; Muon one for matrices inside blocks."""
    groups = list(weight_groups(job))
    kept = 2 * sum(gathered.learned_here for gathered in _gathered(job, groups))
    if job.config.optimizer.name != "muon":
        return kept
    of_muon = [
        replace(group, parameters=tuple(p for p in group.parameters if is_hidden_matrix(p.name, p.shape)))
        for group in groups
    ]
    return kept - sum(gathered.learned_here for gathered in _gathered(job, of_muon))


def _gathered(job: Job, groups: Sequence[Group]) -> tuple[_Gathered, ...]:
    found = []
    for group in groups:
        shards = 1 if job.whole else job.layout.expert_shards if group.of_experts else job.layout.weight_shards
        taken = 0 if group.whole else _FP32 if group.in_fp32 else job.product_bytes
        elements, learned = group.pieces(1), group.pieces(1, learned=True)
        here = group.pieces(shards), group.pieces(shards, learned=True)
        ahead = 0 if group.of_experts or shards == 1 else elements * taken
        found.append(_Gathered(elements, here[0], elements * taken, learned, here[1], ahead))
    return tuple(found)


def _stage_layers(job: Job, stage: range, known: dict[bool, _Layer]) -> list[_Layer]:
    """The layers of a stage; `known` has one of each kind, those with experts and those without."""
    for number in stage:
        kind = job.model.has_experts(number)
        if kind not in known:
            known[kind] = _layer(job, number)
    found = [known[job.model.has_experts(number)] for number in stage]
    if stage.stop == job.model.layers and job.predicts_further:
        found.append(_layer(job, job.model.layers))
    return found


def _ends(job: Job, stage: range) -> _Layer:
    return _Layer(0, 0, 0, 0, _gathered(job, tuple(end_groups(job, stage))), 0)


def _layer(job: Job, number: int) -> _Layer:
    groups = tuple(layer_groups(job, number))
    whole = sum(_kept_whole(job, number))
    kept = {"none": whole, "full": _FP32 * job.own_tokens * job.model.hidden_size}.get(job.config.training.recompute)
    if kept is None:
        kept = _kept_selective(job, number)
    if job.whole and job.layout.pipeline == 1 and job.lowered:
        # Autocast lowers weights that are whole, and keeps that for the backward pass.
        copies = job.product_bytes * sum(prod(parameter.shape) for group in groups for parameter in group.parameters)
        kept, whole = kept + copies, whole + copies
    largest = max((prod(p.shape) for group in groups for p in group.parameters if p.learned), default=0)
    worst = max(2 * job.product_bytes * _inner(job, number), _combined(job, number) - job.product_bytes * largest)
    model, tensor = job.model, job.layout.tensor
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim / tensor
    put_off = job.product_bytes * (2 * _inner(job, number) + job.tokens * (heads + 2 * model.hidden_size))
    put_off += 2 * _FP32 * job.own_tokens * model.hidden_size
    return _Layer(kept, whole, worst, put_off, _gathered(job, groups), largest)


def _inner(job: Job, number: int) -> float:
    """Elements between the two products of a feed-forward layer."""
    mixture = job.model.mixture
    if mixture is not None and job.model.has_experts(number):
        return job.own_tokens * (mixture.top_k + mixture.shared_experts) * mixture.ffn_hidden_size
    return job.tokens * job.model.ffn_hidden_size / job.layout.tensor


def _combined(job: Job, number: int) -> float:
    """What is there while experts' rows become tokens: rows as they were sent and came back, and both times weights."""
    mixture = job.model.mixture
    if mixture is None or not job.model.has_experts(number):
        return 0.0
    row = (2 if job.layout.expert > 1 else 1) * job.product_bytes + _FP32
    return row * job.own_tokens * mixture.top_k * job.model.hidden_size


def _kept_whole(job: Job, number: int) -> Iterator[float]:
    """What a layer's forward pass leaves, piece by piece."""
    model, own, tokens, size = job.model, job.own_tokens, job.tokens, job.product_bytes
    hidden = model.hidden_size
    # Both sums of the residual stream, and what both norms divided, which only their weights' gradients need.
    yield (4 if model.lora is None else 2) * _FP32 * own * hidden + 2 * _FP32 * own
    yield from _kept_adapters(job, number)
    yield from _kept_attention(job)
    mixture = model.mixture
    if mixture is None or not model.has_experts(number):
        yield size * tokens * hidden if _learns(job, "gate", "up") else 0
        yield (4 if _learns(job, "down") else 3) * size * _inner(job, number)
        return
    # The router's input in fp32, the same lowered for experts, and its scores.
    yield (_FP32 + 2 * (size if job.lowered else 0)) * own * hidden + 2 * _FP32 * own * mixture.experts
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
        yield size * keys * model.kv_heads / tensor * (head + model.value_head_dim)
    else:
        short = latent.query_rank + latent.key_value_rank
        yield size * own * model.hidden_size
        yield (_FP32 + size) * own * short + _FP32 * own * 2
        yield size * tokens * (short + latent.rope_head_dim)
        yield size * tokens * heads * head  # queries
        plain = head - latent.rope_head_dim
        yield size * keys * heads * (head + plain + model.value_head_dim)
    yield size * tokens * heads * model.value_head_dim + _FP32 * tokens * heads


def _kept_selective(job: Job, number: int) -> float:
    """Of a layer's forward pass the results of products and attention, and what came from other processes."""
    model, own, tokens, size = job.model, job.own_tokens, job.tokens, job.product_bytes
    tensor, context, latent, mixture = job.layout.tensor, job.layout.context, model.latent, model.mixture
    heads, hidden = model.heads / tensor, model.hidden_size
    kept = _FP32 * own * hidden + size * tokens * heads * model.value_head_dim + _FP32 * tokens * heads
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
    return kept + _FP32 * own * mixture.experts
