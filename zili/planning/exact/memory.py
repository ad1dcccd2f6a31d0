"""Bytes that one process takes in a step, in closed form: the moments at which most is there.

A step is a sequence of forward and backward passes over this process's stages. Between two of them lie weights, what
the optimizer keeps, gradients so far, and what micro-batches in flight have left for their backward passes. Inside one
lies what it makes and gives back. So the step is walked through pass by pass, and a backward pass layer by layer. A
rehearsal runs the real thing; tests/planning/test_memory.py compares the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import cached_property
from math import inf

from zili.planning.exact.job import Job
from zili.planning.exact.layer_memory import FP32, Gathered, Held, Kinds, LayerMemory
from zili.planning.exact.messages import rows_at_once
from zili.planning.exact.schedule import Action, PipelinePlan, actions, asked_for

_INT32, _INT64 = 4, 8
Bytes = dict[str, float]

WEIGHTS, GATHERED, GRADIENTS, OPTIMIZER = "weights", "gathered weights", "gradients", "optimizer"
ACTIVATIONS, BACKWARD, LOGITS, MESSAGES, BATCH = "activations", "backward", "logits", "messages", "batch"
CHECKPOINT = "checkpoint"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, GATHERED, ACTIVATIONS, LOGITS, BACKWARD, MESSAGES, BATCH, CHECKPOINT)
"""What memory is for; a rehearsal has the same names."""


RESERVED = 0.06
"""Share of a chip's memory that its runtime, its collectives' buffers and gaps between blocks take."""


def usable(capacity: float) -> float:
    """Bytes of a chip's memory that a run can have: by this `zili train`, `plan` and `rehearse` say what fits."""
    return (1 - RESERVED) * capacity


def places_in_order(pipeline: int) -> list[int]:
    """The processes of a pipeline; first those that mostly have most."""
    last = pipeline - 1
    return list(dict.fromkeys((0, min(1, last), last // 2, (4 * last) // 5, last, *range(last + 1))))


class Peaks:
    """Bytes by part of each place in a job's pipeline, at the moment at which it has most; computed as asked for."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._kinds: Kinds = {}
        self._found: dict[int, Bytes] = {}

    def at(self, place: int) -> Bytes:
        if place not in self._found:
            step = _Step(replace(self._job, place=place), self._kinds)
            step.walk()
            self._found[place] = step.most
        return self._found[place]

    def within(self, room: float) -> bool:
        """Whether every place has no more than `room` bytes."""
        return all(sum(self.at(place).values()) <= room for place in places_in_order(self._job.layout.pipeline))

    @cached_property
    def fullest(self) -> Bytes:
        """Memory of the place in the pipeline that has most."""
        places = places_in_order(self._job.layout.pipeline)
        return max(map(self.at, places), key=lambda parts: sum(parts.values()))


def fullest(job: Job) -> Bytes:
    """Bytes by part of the place that has most of all in the job's pipeline, at the moment at which it does."""
    return Peaks(job).fullest


def saved_bytes(job: Job) -> float:
    """Bytes of the host that a save in the background copies: weights and what the optimizer keeps."""
    held = Held(job, {})
    return held.weights + held.moments


STATES_IN_MEMORY = 5
"""Copies of a process's state that its machine's host has at most: three of its own, and two of another machine's."""


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
    return replace(job, config=job.config.changed(parallel={"reduce": when}))


class _Ledger:
    """What is there as passes go on, and the moment with most."""

    def __init__(self) -> None:
        self.live: Bytes = defaultdict(float)
        self.most: Bytes = {}
        self._top = -inf

    def at(self, *more: tuple[str, float]) -> None:
        """A moment, with `more` than what stays."""
        total = sum(self.live.values()) + sum(size for _, size in more)
        if total > self._top:
            self._top, self.most = total, _joined(self.live, more)

    def then(self, later: _Ledger) -> None:
        """What was written down of a pass by itself comes next."""
        total = sum(self.live.values()) + later._top
        if total > self._top:
            self._top, self.most = total, _joined(self.live, later.most.items())
        for part, size in later.live.items():
            self.live[part] += size


def _joined(some: Bytes, more: Iterable[tuple[str, float]]) -> Bytes:
    found = dict(some)
    for part, size in more:
        found[part] = found.get(part, 0.0) + size
    return found


class _Step:
    """The passes of a step, and the memory that each takes."""

    def __init__(self, job: Job, kinds: Kinds) -> None:
        self.job = job
        self._ledger = _Ledger()
        self._passes: dict[Hashable, _Ledger] = {}
        self.alone = job.whole
        """A process that has its weights whole gathers none, and lowered ones are kept for the backward pass."""
        self._shards = 1 if self.alone else job.layout.weight_shards
        self.pipelined = job.layout.pipeline > 1
        self.held = Held(job, kinds)
        self.stages, self.ends = self.held.stages, self.held.ends
        self._flying = dict.fromkeys(range(len(job.stages)), 0.0)
        """Of each stage the message of its last sum, which FSDP2 keeps until the next one inside a pipeline."""
        self._summed = dict.fromkeys(range(len(job.stages)), False)
        self._late = 0.0
        self._stays: float = 0
        """Bytes of a teacher's weights that stay gathered, since nothing gives them back."""
        self._kept = [self._kept_of(place) for place in range(len(job.stages))]

    @property
    def live(self) -> Bytes:
        """What is there now."""
        return self._ledger.live

    @property
    def most(self) -> Bytes:
        """What was there at the moment with most."""
        return self._ledger.most

    def at(self, *more: tuple[str, float]) -> None:
        """A moment, with `more` than what stays."""
        self._ledger.at(*more)

    def _again(self, kind: Hashable, walk: Callable[[], None]) -> None:
        """A pass, which is walked through once: all of its `kind` are alike."""
        if kind not in self._passes:
            before, self._ledger = self._ledger, _Ledger()
            walk()
            self._passes[kind], self._ledger = self._ledger, before
        self._ledger.then(self._passes[kind])

    # ---- sizes

    @property
    def weight_bytes(self) -> int:
        """Size of an element of a weight as the loss has it: a gathered head is lowered, that of a lone process or one
        that is the embedding is not."""
        return FP32 if self.alone or self.job.model.tied_embeddings else self.job.product_bytes

    @cached_property
    def stream(self) -> float:
        """Hidden states of this process's tokens in a micro-batch."""
        return FP32 * self.job.own_tokens * self.job.model.hidden_size

    def walk(self) -> None:
        """The step."""
        job = self.job
        self.live[WEIGHTS], self.live[OPTIMIZER] = self.held.weights, self.held.moments
        rows = job.micro_batches * job.micro_batch * job.sequence / job.layout.context
        self.live[BATCH] = rows * 2 * _INT64 + job.micro_batches * job.micro_batch * job.sequence * _INT32
        if job.teacher is not None:
            self._ask(job.teacher)
        if job.on_host and job.config.checkpoint.asynchronous:
            # The save before may still be written while the step goes on.
            self.live[CHECKPOINT] = self.held.weights + self.held.moments
        if self.pipelined:
            self._pipeline()
        else:
            self._one_after_another()
        self.at()

    def _ask(self, teacher: Job) -> None:
        """A teacher: its weights, those that stay gathered, and its hidden states until its head is asked."""
        held = Held(teacher, {})
        self.live[WEIGHTS] += held.weights
        if not self.alone:
            if self.pipelined:
                # FSDP2 keeps what arrived for the last two layers beside the weights that it was copied into.
                arrived = sorted(layer.gathered for stage in held.stages for layer in stage)[-2:]
                self.at((GATHERED, held.gathered + sum(arrived)))
            # A pipeline's pass gives all back, and the head is asked for once more.
            self._stays = sum(end.gathered for end in (held.ends[-1:] if self.pipelined else held.ends))
            self._stays *= teacher.has_last or not self.pipelined
        if teacher.has_last:
            kept = teacher.micro_batches if self.pipelined else 1
            self.live[BATCH] += kept * teacher.own_tokens * teacher.model.hidden_size * teacher.product_bytes

    # ---- without a pipeline

    def _one_after_another(self) -> None:
        """Micro-batches one after another; weights are gathered as they are used, gradients summed in the last or
        in each."""
        (end,), job = self.ends, self.job
        # All between the first and the last are alike.
        for number in sorted({0, min(1, job.micro_batches - 1), job.micro_batches - 1}):
            summed = not self.alone and (job.sums_each or number == job.micro_batches - 1)
            if not self.alone:
                self.live[GATHERED] = end.gathered + self._stays
            self._forward(0, ends_here=True)
            self._backward(0, summed=summed)
            self._summed[0] = True

    # ---- with one

    def _pipeline(self) -> None:
        """Weights are gathered once, gradients summed at the end or after each micro-batch."""
        job = self.job
        count = enough(job)
        plan = PipelinePlan(job.config.parallel.schedule, job.layout.pipeline, len(job.stages), count)
        home = {number: place for place, number in enumerate(job.stage_numbers)}
        if job.lowered or not job.whole:
            self.live[GATHERED] = self.held.gathered + self._stays
        # Of every stage the gradient that it sent last is still there.
        sent = sum(number > 0 and number - 1 not in home for number in home)
        for action, unused in zip(actions(plan)[job.place], asked_for(plan)[job.place], strict=True):
            self.live[MESSAGES] = (sent + unused) * self.stream + sum(self._flying.values())
            self._act(action, home, plan)
            if action.kind in ("backward", "weights") and action.micro_batch == count - 1 and not job.whole:
                self._sum_stage(home[action.stage])

    def _act(self, action: Action, home: dict[int, int], plan: PipelinePlan) -> None:
        """One action of the stage that is this process's `home[stage]`-th."""
        kind, place = action.kind, home[action.stage]
        first, flying = not self._summed[place], self._flying[place]
        if kind == "forward":
            ends_here = action.stage == plan.stages - 1
            self._again((kind, place), lambda: self._forward(place, ends_here))
        elif kind == "weights":
            self._again((kind, place, first), lambda: self._weights(place))
            self._let_go(place)
        else:
            summed, put_off = self.job.sums_each, kind == "inputs"
            self._again((kind, place, first, flying), lambda: self._backward(place, summed, put_off))
        if kind == "backward" and self.job.sums_each:
            self._flying[place] = FP32 * self._last_summed(place).learned
        self._summed[place] = self._summed[place] or kind in ("backward", "weights")

    def _last_summed(self, place: int) -> Gathered:
        """Those of a stage's weights whose gradients are summed last."""
        groups = self.ends[place].groups or self.stages[place][0].groups
        # What every process holds whole is summed when all else is, at the end of the step.
        return next((group for group in reversed(groups) if group.gathered), groups[-1])

    def _weights(self, place: int) -> None:
        """Gradients of a stage's weights, that were put off."""
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
        if not self._summed[place]:
            self.live[GRADIENTS] += FP32 * elements

    def _let_go(self, place: int) -> None:
        """Free a micro-batch's activations, which its gradients of weights were the last to need."""
        kept = self._kept[place]
        # Where a V turns, both its stages are one process's, and torch lets go of a micro-batch one later.
        turns = self.job.config.parallel.schedule == "zbv" and self.job.place == self.job.layout.pipeline - 1
        self.live[ACTIVATIONS] -= self._late if turns else kept
        self._late = kept

    def _sum_stage(self, place: int) -> None:
        """Gradients of a stage, a group at a time, that were added up; by then its weights are given back."""
        for layer in (self.ends[place], *self.stages[place]):
            for group in layer.groups:
                self.live[GATHERED] -= group.gathered
                if self.job.adds_up:
                    self._sum(group, new=False)

    def _sum(self, group: Gathered, new: bool, *common: tuple[str, float]) -> float:
        """Gradients of a group joined, summed over processes and cut; bytes of the message that is still there after
        it. `new`: they are the first."""
        if not group.learned:
            return 0.0
        # Added up in fp32 over micro-batches, or as one has made them.
        made = 0 if self.job.adds_up else self.job.product_bytes * group.learned
        added = FP32 * group.learned if self.job.adds_up else 0
        flying, arriving = FP32 * group.learned, FP32 * group.learned_here
        self.at((MESSAGES, flying), (GRADIENTS, made + arriving), *common)
        self.live[GRADIENTS] += (arriving if new or added else 0) - added
        # What every process holds whole is summed when all else is; by then no other message is there.
        return flying if group.gathered else 0.0

    # ---- passes

    def _forward(self, place: int, ends_here: bool) -> None:
        self.live[ACTIVATIONS] += self._kept[place]
        self.at()
        if ends_here:
            self._loss(None if self.pipelined else self.stages[place][-1])

    def _kept_of(self, place: int) -> float:
        """What is kept of a micro-batch in a stage: its layers', angles of positions, and what came in where another
        stage on this process does not have it anyway."""
        job = self.job
        kept = sum(layer.kept for layer in self.stages[place])
        kept += 2 * FP32 * job.sequence / job.layout.context * job.model.rotary_dim
        number = job.stage_numbers[place]
        if number == 0 or number - 1 not in job.stage_numbers:
            kept += self.stream
        return kept

    def _loss(self, before: LayerMemory | None) -> None:
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
        copy, in_fp32 = (job.product_bytes * matrix, FP32 * matrix) if raised else (0, 0)
        gathered = 0 if before is None or self._shards == 1 else before.gathered
        here = ((ACTIVATIONS, self.stream), (GATHERED, gathered))
        so_far = self._head_gradient if rows < job.tokens else 0
        self.at((LOGITS, logits * (FP32 + lowered) + copy + so_far), *here)
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
        return FP32 * rows * model.hidden_size

    @cached_property
    def _looked_up_again(self) -> float:
        """The same, of multi-token prediction's own look into it."""
        return self._looked_up if self.job.predicts_further else 0.0

    @cached_property
    def _head_gradient(self) -> float:
        """Of the output matrix; beside adapters it has none."""
        model = self.job.model
        if model.lora is not None:
            return 0.0
        return self.weight_bytes * (model.vocab_size // self.job.layout.tensor) * model.hidden_size

    def _backward(self, place: int, summed: bool, put_off: bool = False) -> None:
        """Through a stage, its last layer first."""
        layers = self.stages[place]
        ends_here = self.job.stages[place].stop == self.job.model.layers
        if ends_here:
            self._after_loss(put_off)
        # Beside the gradient on its way there is the one that came from the next stage.
        gradient = self.stream if ends_here else 2 * self.stream
        flying = 0.0
        for number in reversed(range(len(layers))):
            # Gathered while this one is at work; alone with its weights, a process copies them without a buffer.
            ahead = layers[number - 1].ahead if number and self._shards > 1 else 0
            if put_off:
                self._through_inputs(layers[number], ahead, gradient)
                continue
            flying = self._through_layer(place, number, ahead, gradient, flying, summed)
            if ends_here and number == len(layers) - 1:
                self.live[BACKWARD] += self._looked_up_again
                self.at((BACKWARD, self._first_loss))
                self.live[LOGITS] -= self._first_loss
        if not put_off:
            self.live[ACTIVATIONS] -= self._kept[place] - sum(layer.kept for layer in layers)
        if ends_here:
            self._after_layers(place, put_off)
        if not put_off:
            self._end_backward(place, summed)

    def _through_inputs(self, layer: LayerMemory, ahead: float, gradient: float) -> None:
        """Backward through a layer, gradients of its weights put off."""
        gathered = 0 if self.pipelined or self.alone else layer.gathered + ahead
        # A norm's backward pass has several terms at once.
        self.at((BACKWARD, layer.put_off + 5 * self.stream), (GATHERED, gathered), (BACKWARD, gradient))
        self.live[BACKWARD] += layer.put_off

    def _through_layer(
        self, place: int, number: int, ahead: float, gradient: float, flying: float, summed: bool
    ) -> float:
        """Backward through a stage's layer; `flying` bytes of a message from the layer behind it are still there, and
        so many after it are returned."""
        job, layer, new = self.job, self.stages[place][number], not self._summed[place]
        on_their_way = ((MESSAGES, flying), (BACKWARD, gradient))
        let_go = not (self.pipelined or self.alone)
        left = layer.gathered + ahead if let_go else 0
        self.live[ACTIVATIONS] += layer.whole - layer.kept
        self.at((BACKWARD, layer.worst + job.product_bytes * layer.largest), (GATHERED, left), *on_their_way)
        self.live[ACTIVATIONS] -= layer.whole
        for group in layer.groups:
            # Each is given back when its gradients are complete.
            self.at((GRADIENTS, self._fresh(group, layer, new and not summed)), (GATHERED, left), *on_their_way)
            left -= group.gathered if let_go else 0
        if new and (self.alone or job.adds_up):
            self.live[GRADIENTS] += FP32 * layer.learned
        if summed and self.pipelined and number == len(self.stages[place]) - 1:
            self.live[MESSAGES] -= self._flying[place]
        for group in layer.groups if summed else ():
            common = (GATHERED, 0 if self.pipelined else ahead), (BACKWARD, gradient)
            flying = self._sum(group, new, *common) or flying
        return flying

    def _after_layers(self, place: int, put_off: bool) -> None:
        """Gradients that the loss made of the embedding and the output matrix."""
        # Looked up twice in one stage, the embedding has two gradients and their sum.
        twice = self.job.stages[place].start == 0
        self.at((BACKWARD, 2 * self._looked_up_again if twice else 0.0))
        if not put_off:
            self.live[BACKWARD] -= self._head_gradient + self._looked_up_again

    def _end_backward(self, place: int, summed: bool) -> None:
        """Gradients of what lies around a stage's blocks, which come last."""
        end, job, new = self.ends[place], self.job, not self._summed[place]
        if job.stages[place].start == 0:
            raised = FP32 * end.learned if new and job.adds_up and job.lowered else 0
            self.at((BACKWARD, self._looked_up), (GRADIENTS, raised))
        if new and (self.alone or job.adds_up):
            self.live[GRADIENTS] += FP32 * end.learned
        if summed and not self.pipelined:
            self.live[GATHERED] = self._stays
        for group in end.groups if summed else ():
            self._sum(group, new)

    def _fresh(self, group: Gathered, layer: LayerMemory, first: bool) -> float:
        """Gradients of a micro-batch when those of a group are complete, beside those of earlier ones."""
        if self.alone or not self.job.lowered:
            # Each is added as it is made.
            return FP32 * (group.learned if first else layer.largest)
        return group.learned * (self.job.product_bytes + (FP32 if first else 0))


def enough(job: Job) -> int:
    """Micro-batches after which a step only repeats itself: three rounds of a pipeline, or first, next and last."""
    rounds = 3 * job.layout.pipeline
    even = job.config.parallel.schedule in ("1f1b", "zbv") or job.micro_batches % job.layout.pipeline == 0
    return rounds if even and job.micro_batches > rounds else job.micro_batches
