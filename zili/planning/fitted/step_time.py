"""Seconds of a training step, from what it computes, moves and waits for (docs/planning.md has the formulas)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import NamedTuple

from zili.models.arithmetic import kinds_of_layers
from zili.planning.exact import work
from zili.planning.exact.weights import held
from zili.planning.fitted.machine import Machine, share_sent
from zili.planning.fitted.rates import Rates
from zili.planning.run import Run

_BF16, _FP32 = 2, 4
_STATE_BYTES = 30
"""Read and written for a parameter by AdamW: weight, gradient, both moments, and the weight in bf16."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, on the process with most to do. What travels counts as far as arithmetic does not hide it."""

    products: float
    attention: float
    passes: float
    """Norms, activations, rotary positions, residual sums, logits: bound by memory."""
    tensor: float
    context: float
    expert: float
    pipeline: float
    """Hidden states on their way between stages."""
    bubble: float
    data: float
    """Weights and gradients, between shards and replicas."""
    optimizer: float
    waiting: float
    """For the slowest of many."""
    teacher: float = 0.0
    """A second model's answers."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(vars(self).values())


class Phase(NamedTuple):
    """Seconds of a micro-batch in some layers."""

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    def plus(self, other: Phase, times: float = 1.0) -> Phase:
        """Both, the other so many times."""
        return Phase(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))

    def by(self, factor: float) -> Phase:
        """So many times as much."""
        return Phase(*(factor * mine for mine in self))


def collective(size: float, count: int, apart: int, machine: Machine, rates: Rates, messages: float = 0.0) -> float:
    """Seconds of gathering `size` bytes, or scattering their sum, among `count` processes that are `apart` chips apart.

    A ring inside a domain, then one between domains for each chip of one, which has its own way out; `messages` rings
    wait for each of their hops.
    """
    if count <= 1:
        return 0.0
    inner = max(1, min(count, machine.domain // apart))
    outer = count / inner
    inside = size * share_sent("all_gather", inner) / (machine.link * rates.link)
    outside = size / inner * share_sent("all_gather", outer) / (machine.network * rates.network)
    return inside + outside + messages * rates.hop * (outer - 1)


def all_to_all(size: float, count: int, machine: Machine, rates: Rates) -> float:
    """Seconds of exchanging `size` bytes of each of `count` neighbours, evenly."""
    inner = min(count, machine.domain)
    inside = size * (inner - 1) / count / (machine.link * rates.link)
    return inside + size * (count - inner) / count / (machine.network * rates.network)


class MicroBatchTime(NamedTuple):
    """Forward and backward of a micro-batch in all layers, and at the head, whichever process does them.

    It depends on the model, micro-batch, tensor, context, expert, recompute, precision and software alone.
    """

    layers: Phase
    head: Phase
    forward: float
    """Seconds of the forward pass, of those of the layers."""
    weights: float
    """Of products that give gradients of weights: as long as a forward pass's, but beside adapters."""


def micro_batch_time(run: Run, machine: Machine, rates: Rates) -> MicroBatchTime:
    """What one micro-batch of `run` takes."""
    layers, ahead, learning = Phase(), Phase(), 0.0
    for layer, times in kinds_of_layers(run.model):
        forward, backward = layer_phases(run, layer, machine, rates)
        layers, ahead = layers.plus(forward.plus(backward), times), ahead.plus(forward, times)
        learning += times * _slow(run, rates) * _products(run, layer, machine, rates).learned
    head = head_phase(run, machine, rates)
    if run.model.mtp_layers:
        # One more block and its own logits, behind the last layer.
        forward, backward = layer_phases(run, run.model.layers, machine, rates)
        head = head.by(2).plus(forward).plus(backward)
    return MicroBatchTime(layers, head, sum(ahead), learning)


class _Share(NamedTuple):
    """What the busiest process of a pipeline does in a step."""

    parts: Phase
    """Seconds of all its micro-batches."""
    seconds: float
    """The same in all."""
    longest: float
    """Time of one micro-batch on the process that has most to do."""
    others: float
    """Time of a micro-batch on all other processes together."""


class StepTimes:
    """Seconds of steps of one model and batch in one software, whatever their layouts: what several layouts share is
    computed once."""

    def __init__(self, machine: Machine, rates: Rates) -> None:
        self._machine, self._rates = machine, rates
        self._micro_batches: dict[tuple[object, ...], MicroBatchTime] = {}
        self._shares: dict[tuple[object, ...], _Share] = {}
        self._traffic: dict[tuple[object, ...], tuple[float, float]] = {}

    def of(self, run: Run) -> StepTime:
        """Seconds of one step, by what takes them."""
        share = self._share(run)
        between = between_stages(run, self._machine, self._rates)
        idle = share.others + (run.pipeline - 1) * between
        sent, optimizer = self._sent(run)
        data = _not_hidden(run, self._rates, sent, share.longest, share.seconds)
        rest = (run.micro_batches * between, idle * bubble_share(run), data, optimizer)
        waiting = self._rates.waiting * log2(max(run.chips, 8) / 8) * (share.seconds + sum(rest))
        return StepTime(*share.parts, *rest, waiting)

    def _share(self, run: Run) -> _Share:
        kind = (run.micro_batch, run.tensor, run.context, run.expert, run.recompute)
        key = (*kind, run.pipeline, run.data)
        if key not in self._shares:
            if kind not in self._micro_batches:
                self._micro_batches[kind] = micro_batch_time(run, self._machine, self._rates)
            layers, head, *_ = self._micro_batches[kind]
            busiest = _busiest(run, layers, head)
            parts, longest = busiest.by(run.micro_batches), sum(busiest)
            self._shares[key] = _Share(parts, sum(parts), longest, sum(layers) + sum(head) - longest)
        return self._shares[key]

    def _sent(self, run: Run) -> tuple[float, float]:
        """Seconds that weights and gradients travel, and of the optimizer."""
        cut = (run.tensor, run.context, run.pipeline, run.expert, run.data, run.micro_batch)
        key = (*cut, run.weight_shards, run.state_shards, run.kept_gathered, run.software.sums_each)
        if key not in self._traffic:
            moved = _STATE_BYTES * stored(run, run.state_shards)
            optimizer = moved / (self._machine.memory * self._rates.memory)
            self._traffic[key] = _data(run, self._machine, self._rates), optimizer
        return self._traffic[key]


def step_time(run: Run, machine: Machine, rates: Rates) -> StepTime:
    """Seconds of one step of `run`, by what takes them."""
    return StepTimes(machine, rates).of(run)


def bubble_share(run: Run) -> float:
    """Of the others' forward and backward passes, what a process of a pipeline waits for at a step's ends.

    1F1B and interleaved: Narayanan et al. 2021, section 2.2. The zero-bubble ones fill what is not a first forward pass
    with gradients of weights (Qi et al. 2023, table 1). tests/planning/test_schedule.py has them simulated.
    """
    if run.pipeline == 1:
        return 0.0
    return (1 / 3 if run.schedule in ("zero_bubble", "zbv") else 1.0) / run.virtual


def layer_phases(run: Run, layer: int, machine: Machine, rates: Rates) -> tuple[Phase, Phase]:
    """Forward and backward of a micro-batch in one layer."""
    products, slow = _products(run, layer, machine, rates), _slow(run, rates)
    attention, attention_back = _attention(run, machine, rates)
    passes = slow * (_passes(run, layer, machine, rates) + rates.launch)
    tensor = 4 * collective(_BF16 * run.rows * run.model.hidden_size, run.tensor, 1, machine, rates)
    tensor *= _shown(run, rates)
    context, expert = _keys(run, attention, machine, rates), _rows_to_experts(run, layer, machine, rates)
    forward = Phase(slow * products.forward, slow * attention, passes, tensor, context, expert)
    learning = slow * (products.forward + products.learned)
    backward = Phase(learning, slow * attention_back, 2 * passes, tensor, context, expert)
    if run.recompute == "full":
        backward = backward.plus(forward._replace(products=slow * products.repeated))
    elif run.recompute != "none":
        half = slow * products.forward / 2 if run.recompute == "half" else 0.0
        backward = backward.plus(Phase(products=half, passes=passes))
    return forward, backward


def _slow(run: Run, rates: Rates) -> float:
    """How many times as long everything takes in software that the chip's vendor has not tuned."""
    return 1.0 if run.software.tuned else 1 / rates.untuned


def _shown(run: Run, rates: Rates) -> float:
    """Share of what tensor-parallel processes send that is not hidden."""
    return 1 - rates.hide_tensor if run.software.hides_tensor else 1.0


class _ProductTime(NamedTuple):
    """Seconds of a layer's products for a micro-batch."""

    forward: float
    learned: float
    """The same counts of those whose matrices learn: gradients of these take as long."""
    repeated: float
    """Of those that are computed again where all of the layer is."""


def _products(run: Run, layer: int, machine: Machine, rates: Rates) -> _ProductTime:
    times = [(product, _product(product, run, machine, rates)) for product in work.products(run, layer)]
    forward = sum(seconds for _, seconds in times)
    learned = sum(seconds for product, seconds in times if product.learned)
    left_out = [] if run.recompute != "full" or run.software.repeats_whole else work.not_repeated(run, layer)
    return _ProductTime(forward, learned, forward - sum(_product(one, run, machine, rates) for one in left_out))


def _product(product: work.Product, run: Run, machine: Machine, rates: Rates) -> float:
    """Time of one: arithmetic at the chip's rate, and operands through its memory."""
    rows, outputs, inputs = product.rows, product.outputs, product.inputs
    rate = rates.product_rate(machine, run.precision)
    if product.experts:
        narrow = min(outputs, inputs)
        rate *= rates.experts * narrow / (narrow + rates.expert_width)
    moved = rows * (outputs + inputs) + max(1, product.experts) * outputs * inputs
    return product.flops / rate + _BF16 * rates.operands * moved / (machine.memory * rates.memory)


def _attention(run: Run, machine: Machine, rates: Rates) -> tuple[float, float]:
    """Forward and backward of one layer's: fused, where scores are made twice, or through memory."""
    rate = rates.product_rate(machine, "bf16")
    if run.software.fused_attention:
        forward, backward = work.attention(run, seen=True)
        return forward / (rate * rates.attention), backward / (rate * rates.attention)
    passes = rates.score_passes * _BF16 * work.scores(run) / (machine.memory * rates.memory)
    seconds = work.attention(run)[0] / rate + passes
    return seconds, 2 * seconds


def _passes(run: Run, layer: int, machine: Machine, rates: Rates) -> float:
    """Of what lies between the products of a layer: two norms and residual sums, heads turned, an activation."""
    model, rows, own = run.model, run.rows, run.rows / run.tensor
    between = own if run.software.sequence_parallel else rows
    elements = 12 * between * model.hidden_size
    elements += 4 * rows * (model.heads + 2 * model.kv_heads) * model.head_dim / run.tensor
    if model.has_experts(layer):
        mixture = model.mixture
        assert mixture is not None
        # Rows are copied into the order of their experts and back.
        elements += 6 * own * mixture.top_k * model.hidden_size
        elements += 3 * own * mixture.ffn_hidden_size * (mixture.top_k + mixture.shared_experts)
    else:
        elements += 3 * rows * model.ffn_hidden_size / run.tensor
    return _BF16 * elements * rates.passes / (machine.memory * rates.memory)


def _keys(run: Run, attention: float, machine: Machine, rates: Rates) -> float:
    """Keys and values to all processes of a context, as far as attention does not hide it."""
    model = run.model
    size = _BF16 * run.micro_batch * run.sequence * model.kv_heads / run.tensor
    seconds = collective(size * (model.head_dim + model.value_head_dim), run.context, run.tensor, machine, rates)
    return seconds - rates.hide_data * min(seconds, attention)


def _rows_to_experts(run: Run, layer: int, machine: Machine, rates: Rates) -> float:
    """There and back."""
    if not run.model.has_experts(layer) or run.expert == 1:
        return 0.0
    assert run.model.mixture is not None
    size = _BF16 * run.rows / run.tensor * run.model.mixture.top_k * run.model.hidden_size
    return 2 * all_to_all(size, run.expert, machine, rates) * (1 - rates.hide_expert)


def head_phase(run: Run, machine: Machine, rates: Rates) -> Phase:
    """Logits, loss and both gradients of a micro-batch; in bf16 whatever the blocks are in."""
    rows, vocabulary = run.rows, run.model.vocab_size / run.tensor
    tokens = _BF16 * rows * run.model.hidden_size
    slow, flops = _slow(run, rates), work.loss(run) + (work.logits(run) if run.logits_twice else 0.0)
    return Phase(
        products=slow * flops / rates.product_rate(machine, "bf16"),
        passes=slow * rates.logit_passes * _BF16 * rows * vocabulary / (machine.memory * rates.memory),
        tensor=2 * collective(tokens, run.tensor, 1, machine, rates) * _shown(run, rates),
    )


def _busiest(run: Run, layers: Phase, head: Phase) -> Phase:
    """The process of a pipeline with most to do: it has the head, or one layer more."""
    if run.pipeline == 1:
        return layers.plus(head)
    count = run.model.layers
    last = layers.by(count // run.pipeline / count).plus(head)
    other = layers.by(ceil(count / run.pipeline) / count)
    return last if sum(last) > sum(other) else other


def between_stages(run: Run, machine: Machine, rates: Rates) -> float:
    """Seconds of a micro-batch's hidden states and gradients, out of one process of a pipeline."""
    if run.pipeline == 1:
        return 0.0
    inside = run.tensor * run.context * run.data < machine.domain
    speed = machine.link * rates.link if inside else machine.network * rates.network
    size = _BF16 * run.rows / run.tensor * run.model.hidden_size * run.virtual
    return 2 * size / speed * (1 - rates.hide_pipeline)


def expert_shards(run: Run, processes: int) -> int:
    """Over how many an expert is cut where other weights are over `processes`: those it is shared by are others."""
    return max(1, processes * run.tensor // run.expert)


def stored(run: Run, shards: int) -> float:
    """Parameters that one process stores where `shards` cut them."""
    plain, experts = held(run.model, run.tensor, run.pipeline, run.expert)
    return plain / shards + experts / expert_shards(run, shards)


def _data(run: Run, machine: Machine, rates: Rates) -> float:
    """Seconds that weights are gathered and gradients reduced."""
    plain, experts = held(run.model, run.tensor, run.pipeline, run.expert)
    together = run.data * run.context
    seconds = _exchanged(run, plain, together, run.weight_shards, run.tensor, machine, rates)
    if experts:
        count, shards = expert_shards(run, together), expert_shards(run, run.weight_shards)
        seconds += _exchanged(run, experts, count, shards, run.expert, machine, rates)
    return seconds


def _not_hidden(run: Run, rates: Rates, seconds: float, longest: float, work: float) -> float:
    """The seconds of `_data` that arithmetic does not hide."""
    if not run.software.hides_gradients:
        return seconds
    # Once a step only the last backward pass is beside it; what is sent for each micro-batch has all of the work.
    each = run.weight_shards > 1 and (run.software.sums_each or not run.kept_gathered)
    return seconds - rates.hide_data * min(seconds, work if each else longest * 2 / 3)


def _exchanged(
    run: Run, parameters: float, count: int, shards: int, apart: int, machine: Machine, rates: Rates
) -> float:
    """Seconds that weights and gradients of so many parameters travel in a step, among `count` processes, of which
    `shards` cut them for storage."""
    rings = run.model.layers / run.pipeline
    weights, gradients = _BF16 * parameters, _FP32 * parameters
    if run.weight_shards == 1:
        if run.state_shards < count:
            # Scattered and gathered again, as one sum, in a tree that does not wait for every hop.
            summed = weights if run.software.sums_in_16_bits else gradients
            return 2 * collective(summed, count, apart, machine, rates)
        return sum(collective(size, count, apart, machine, rates, rings) for size in (weights, gradients))
    shards = min(count, shards)
    gather, scatter = (collective(size, shards, apart, machine, rates, rings) for size in (weights, gradients))
    # Gathered for each forward and each backward pass, or once; gradients are scattered once, or each time.
    gathers = gather if run.kept_gathered else run.micro_batches * 2 * gather
    scatter *= run.micro_batches if run.software.sums_each else 1.0
    # Replicas add what is left of the gradients: scattered and gathered again.
    return gathers + scatter + 2 * collective(gradients / shards, count // shards, apart * shards, machine, rates)
