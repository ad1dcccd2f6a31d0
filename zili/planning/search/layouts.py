"""Layouts of a model on so many chips: the legal ones, of sizes that runs have used, the fastest that fit first."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import isqrt
from operator import attrgetter
from typing import Literal

from zili.config import RunConfig
from zili.config.parallel import ParallelConfig, Schedule
from zili.errors import LayoutError
from zili.models.arithmetic import training_state_bytes
from zili.parallel.layout import DIMENSIONS, Layout, lay_out, uneven_rounds
from zili.planning.exact.job import Job
from zili.planning.exact.layer_memory import kept_bytes
from zili.planning.exact.memory import Bytes, Peaks, with_reduce
from zili.planning.exact.weights import held
from zili.planning.fitted.machine import Machine
from zili.planning.fitted.rates import Rates
from zili.planning.fitted.step_time import StepTime, StepTimes, step_time, stored
from zili.planning.run import Recompute, Run, Software
from zili.planning.search.timeline import played_through
from zili.plurals import counted

_MOST_CONTEXT, _MOST_MICRO, _MOST_VIRTUAL, _MOST_TENSOR = 8, 4, 6, 16
_EXPERT = (1, 8, 32, 64, 128)
"""Larger ones are not looked at, nor sizes between these: no measured run has them, and they are many."""
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_CHOICES = ("tensor", "context", "pipeline", "expert", "schedule", "recompute")
_choices_of = attrgetter(*_CHOICES)
_ONCE, _EACH = Software(), Software(sums_each=True)
"""Gradients are summed once a step, or after each micro-batch."""
_TRIED, _TRIED_OF_A_CHOICE, _TRIED_FOR_SIMPLICITY = 300, 6, 12
"""Layouts whose memory is computed, the fastest first, before the search looks for others."""
_SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zero_bubble", "zbv")
"""The plainest first."""
TIE = 0.07
"""Share of a step's time by which two layouts must differ to be told apart: near the median error of predicting runs
that nobody had fitted (docs/planning.md)."""


@dataclass(frozen=True)
class Candidate:
    """A layout, with what it takes."""

    job: Job
    time: StepTime
    machine: Machine
    """What it runs on."""

    @property
    def config(self) -> RunConfig:
        """The recipe with it."""
        return self.job.config

    @property
    def layout(self) -> Layout:
        return self.job.layout

    @property
    def run(self) -> Run:
        return self.job.run

    @property
    def text(self) -> str:
        """In a line."""
        run, stages = self.run, self.run.virtual
        schedule = f", {run.schedule}" + (f" of {stages} stages" if stages > 1 else "") if run.pipeline > 1 else ""
        again = f", recompute {run.recompute}" if run.recompute != "none" else ""
        summed = ", gradients summed after each" if run.software.sums_each else ""
        return f"{self.layout}{schedule}, {run.micro_batches:.0f} micro-batches of {run.micro_batch}{summed}{again}"

    @cached_property
    def _peaks(self) -> Peaks:
        return Peaks(self.job)

    @property
    def memory(self) -> Bytes:
        """Bytes by part, of the process with most."""
        return self._peaks.fullest

    @cached_property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether it fits, beside what the chip's runtime takes."""
        return self._peaks.within(self.machine.room)


def job_on(config: RunConfig, layout: Layout, machine: Machine) -> Job:
    """What such a chip's process does; of what the chip can a recipe has the last word."""
    grouped = config.chip.capabilities.get("grouped_heads_attention", machine.grouped_heads)
    return Job(config, layout, grouped_heads=grouped)


def predicted(config: RunConfig, world: int, machine: Machine, rates: Rates) -> Candidate:
    """What a recipe's own layout takes.

    Raises:
        LayoutError: it cannot be run on so many.
    """
    layout = lay_out(config, world)
    job = with_reduce(job_on(config, layout, machine), machine.room)
    time = step_time(job.run, machine, rates)
    return Candidate(job, played_through(job, time, machine, rates), machine)


@dataclass(frozen=True)
class Drawback:
    """Why the best layout with one choice is slower than the best of all, or does not fit."""

    choice: str
    why: str


@dataclass(frozen=True)
class Found:
    """What a search found."""

    best: tuple[Candidate, ...]
    """The fastest that fit; none: nothing does."""
    drawbacks: tuple[Drawback, ...]
    searched: int
    smallest: Candidate
    """What seems to take least, where nothing fits."""
    simplest: Candidate | None = None
    """The one with the fewest kinds of parallelism among those that are as fast as the first, within `TIE`."""


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python looks for circles among objects again and again as they become more. A search makes hundreds of thousands
    of small ones in which there are none, and looking through them took a tenth of its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@_without_collector()
def search(config: RunConfig, world: int, machine: Machine, rates: Rates, *, count: int = 5) -> Found:
    """The fastest layouts of `config`'s model and batch on `world` chips that fit them, no two alike but for shards.

    Raises:
        LayoutError: no layout divides `world`; the message has the nearest number that one does.
    """
    options = sorted(_options(config, world, machine, rates), key=_Option.order)
    if not options:
        raise LayoutError(_nearest(config, world, machine))
    room = _Room(config, machine, rates)
    best: dict[tuple[object, ...], Candidate] = {}
    tried = 0
    for option in options:
        if len(best) == count or tried == _TRIED:
            break
        if option.alike in best or not room.may_have(option):
            continue
        tried += 1
        candidate = option.candidate(config, machine)
        if room.has(option, candidate):
            best[option.alike] = candidate
    # Stages that are uneven wait for one another in ways no formula has: played through.
    ranked = tuple(sorted(map(room.played, best.values()), key=lambda one: one.time.total))
    drawbacks = tuple(_drawbacks(ranked[0], options, room)) if ranked else ()
    smallest = ranked[0] if ranked else min(options, key=room.least).candidate(config, machine)
    return Found(ranked, drawbacks, len(options), smallest, _simplest(ranked, options, room))


class _Room:
    """How much memory an option takes at least: what would not fit is left out before it is walked through."""

    def __init__(self, config: RunConfig, machine: Machine, rates: Rates) -> None:
        self.config, self.machine, self.rates = config, machine, rates
        self._failed: dict[tuple[object, ...], int] = {}
        state = training_state_bytes(config.model)
        # Beside adapters nothing has a gradient. Muon keeps one moment, AdamW two.
        self._learned = state.gradients / state.weights
        self._moments = 1 if config.optimizer.name == "muon" else 2
        self._leasts: dict[_Option, float] = {}
        self._kept: dict[tuple[object, ...], float] = {}

    def played(self, candidate: Candidate) -> Candidate:
        """With the time of its pipeline played through."""
        return replace(candidate, time=played_through(candidate.job, candidate.time, self.machine, self.rates))

    def may_have(self, option: _Option) -> bool:
        """Whether it may fit: one that shares weights more widely, and is else the same, did not fail to."""
        if option.layout.shards <= self._failed.get((*option.alike, option.sums_each), 0):
            return False
        return self.least(option) <= self.machine.room

    def has(self, option: _Option, candidate: Candidate) -> bool:
        """Whether it fits."""
        fits = candidate.fits
        if not fits:
            failed = (*option.alike, option.sums_each)
            self._failed[failed] = max(option.layout.shards, self._failed.get(failed, 0))
        return fits

    def least(self, option: _Option) -> float:
        """Bytes of weights, gradients, moments, and what micro-batches in flight keep."""
        if option not in self._leasts:
            self._leasts[option] = self._least(option)
        return self._leasts[option]

    def _least(self, option: _Option) -> float:
        run, count = option.run, option.run.micro_batches
        plain, experts = held(run.model, run.tensor, run.pipeline, run.expert)
        states = 4 * stored(run, run.weight_shards) * (1 + self._moments * self._learned)
        # The first process may have a layer less in each stage than the mean.
        layers = run.model.layers // (run.pipeline * run.virtual)
        fewer = layers * run.pipeline * run.virtual / run.model.layers
        gathered = 2 * (plain + experts) if run.kept_gathered else 0.0
        # In fp32; a stage's may be gone before the next one's come.
        whole = (run.kept_gathered or count > 1) and not option.sums_each
        gradients = fewer * 4 * self._learned * ((plain + experts) / run.virtual if whole else 0.0)
        stages = _in_flight(run, count)
        kept = stages * layers * self._keeps(option)
        # Where all micro-batches have gone forward first, less and less is kept as gradients come.
        both = max(gradients, kept) if stages == count * run.virtual else gradients + kept
        return fewer * (states + gathered) + both

    def _keeps(self, option: _Option) -> float:
        run = option.run
        key = (run.tensor, run.context, run.expert, run.micro_batch, run.recompute)
        if key not in self._kept:
            self._kept[key] = kept_bytes(option.candidate(self.config, self.machine).job)
        return self._kept[key]


def _in_flight(run: Run, micro_batches: float) -> float:
    """Stages' activations that a pipeline's process has at once, at least."""
    p, v = run.pipeline, run.virtual
    if p == 1:
        return 1
    # On the first process, which has most in flight.
    if run.schedule == "interleaved":
        warm = (v - 1) * p + 2 * (p - 1) + 1
    else:
        warm = 2 * p - 1 if run.schedule == "zbv" else v * p
    return min(micro_batches * v, warm)


@dataclass(frozen=True, eq=False)
class _Option:
    """A layout that is legal, and its seconds. Each is itself alone."""

    run: Run
    layout: Layout
    time: StepTime
    seconds: float

    def order(self) -> tuple[float, int]:
        """The fastest first; of those as fast to three digits, the one that shares weights most widely."""
        return float(f"{self.seconds:.3g}"), -self.layout.shards

    @cached_property
    def complexity(self) -> tuple[int, int, int]:
        return complexity(self.run)

    @property
    def sums_each(self) -> bool:
        """Whether gradients are summed after each micro-batch: slower, for where they do not fit whole."""
        return self.run.software.sums_each

    @cached_property
    def alike(self) -> tuple[object, ...]:
        """All but its shards, and when it sums gradients."""
        run = self.run
        cut = (run.tensor, run.context, run.pipeline, run.expert, run.schedule, run.virtual)
        return (*cut, run.micro_batch, run.recompute)

    def candidate(self, config: RunConfig, machine: Machine) -> Candidate:
        """With the recipe it makes."""
        run, layout = self.run, self.layout
        sizes = {name: getattr(layout, name) for name in (*DIMENSIONS, "expert")}
        stages: int | Literal["auto"] = run.virtual if run.virtual > 1 else "auto"
        reduce: Literal["step", "micro_batch"] = "micro_batch" if self.sums_each else "step"
        parallel = ParallelConfig(**sizes, schedule=run.schedule, stages_per_process=stages, reduce=reduce)
        chosen = {"micro_batch": run.micro_batch, "recompute": run.recompute}
        config = config.changed(parallel=parallel, training=chosen)
        return Candidate(job_on(config, layout, machine), self.time, machine)


@lru_cache(maxsize=4096)
def _divisors(number: int, most: int | None = None) -> tuple[int, ...]:
    most = number if most is None else most
    small = [n for n in range(1, min(isqrt(number), most) + 1) if number % n == 0]
    both = sorted({*small, *(number // n for n in small)})
    return tuple(n for n in both if n <= most)


def _options(config: RunConfig, world: int, machine: Machine, rates: Rates) -> Iterator[_Option]:
    """Every layout, with its seconds."""
    times = StepTimes(machine, rates)
    for tensor, context, pipeline in _cuts(config, world, machine):
        data = world // (tensor * context * pipeline)
        for shards, expert, micro in _shares(config, data, tensor, context, machine):
            layout = Layout(pipeline, data // shards, shards, context, tensor, expert)
            laid = replace(Job(config, layout).run, micro_batch=micro)
            count = config.training.global_batch // data // micro
            for schedule, virtual, recompute in _orders(config, pipeline, count):
                each = count > 1 and shards * context > 1 and schedule in ("1f1b", "interleaved")
                for software in (_ONCE, _EACH) if each else (_ONCE,):
                    run = replace(laid, schedule=schedule, virtual=virtual, recompute=recompute, software=software)
                    time = times.of(run)
                    yield _Option(run, layout, time, time.total)


def _cuts(config: RunConfig, world: int, machine: Machine) -> Iterator[tuple[int, int, int]]:
    """Tensor, context and pipeline sizes that divide the model, the sequence and the chips."""
    for tensor, context in _cuts_of_a_stage(config, machine):
        if world % (tensor * context) == 0:
            for pipeline in _divisors(world // (tensor * context), config.model.layers):
                yield tensor, context, pipeline


def _cuts_of_a_stage(config: RunConfig, machine: Machine) -> Iterator[tuple[int, int]]:
    """Tensor and context sizes that divide the model and the sequence."""
    model, length = config.model, config.training.sequence_length
    sizes = (model.heads, model.kv_heads, model.ffn_hidden_size, model.vocab_size)
    for tensor in range(1, min(_MOST_TENSOR, max(8, machine.domain)) + 1):
        if any(size % tensor for size in sizes):
            continue
        for context in range(1, _MOST_CONTEXT + 1):
            if (context == 1 or length % (2 * context) == 0) and length // context % tensor == 0:
                yield tensor, context


def _shares(
    config: RunConfig, data: int, tensor: int, context: int, machine: Machine
) -> Iterator[tuple[int, int, int]]:
    """Shards of weights, of experts, and micro-batches. Of shards what stays in a domain, some more, and all."""
    batch, mixture = config.training.global_batch, config.model.mixture
    if batch % data:
        return
    inside = max(1, machine.domain // (tensor * context))
    # Experts take most of the memory, and are shared first: few copies of them are ever the best.
    times = (1, 2, 4, 8, 16) if mixture is None else (4, 16)
    wanted = {data, *(n * inside for n in times), *((1,) if mixture is None else ())}
    for shards in sorted({max(n for n in _divisors(data) if n <= want) for want in wanted}):
        group = shards * context * tensor
        experts = [1] if mixture is None else [n for n in _divisors(mixture.experts) if group % n == 0]
        for expert in sorted({max(n for n in experts if n <= most) for most in _EXPERT}):
            for micro in _divisors(batch // data, _MOST_MICRO):
                yield shards, expert, micro


def _orders(config: RunConfig, pipeline: int, count: int) -> Iterator[tuple[Schedule, int, Recompute]]:
    """Schedules of so many micro-batches, stages of a process, and what is computed again."""
    if count < pipeline:
        return
    model = config.model
    plain: list[tuple[Schedule, int]] = [("1f1b", 1)]
    if pipeline > 1 and not uneven_rounds("interleaved", pipeline, count):
        most = min(_MOST_VIRTUAL, model.layers // pipeline)
        plain += [("interleaved", virtual) for virtual in range(2, most + 1)]
    yield from ((schedule, virtual, recompute) for schedule, virtual in plain for recompute in _RECOMPUTE)
    # These take no recomputation, and run a mixture's own gradients twice.
    if pipeline == 1 or 2 * pipeline > model.layers or model.mixture is not None:
        return
    if not uneven_rounds("zero_bubble", pipeline, count):
        yield "zero_bubble", 2, "none"
    if not (model.tied_embeddings or model.mtp_layers):
        yield "zbv", 2, "none"


def _nearest(config: RunConfig, world: int, machine: Machine) -> str:
    """What to say where nothing divides: the nearest numbers of chips that something does."""
    batch, layers, most = config.training.global_batch, config.model.layers, 2 * world
    # They are products of sizes, and far fewer than the numbers that would have to be tried one after the other.
    possible = {
        stage * pipeline
        for data in _divisors(batch, most)
        for stage in {data * tensor * context for tensor, context in _cuts_of_a_stage(config, machine)}
        for pipeline in range(1, min(layers, batch // data, most // stage) + 1)
    }
    below = max((chips for chips in possible if chips < world), default=None)
    above = min((chips for chips in possible if chips > world), default=None)
    near = " or ".join(str(n) for n in (below, above) if n is not None)
    return (
        f"no layout divides {counted(world, 'chip')}, {counted(layers, 'layer')}, "
        f"{counted(config.model.heads, 'head')} and a global batch of {counted(batch, 'sequence')}; "
        f"the nearest that work are {near} chips"
    )


def _simplest(ranked: Sequence[Candidate], options: Sequence[_Option], room: _Room) -> Candidate | None:
    """The simplest layout that fits and is as fast as the first of `ranked`; of equally simple ones the fastest."""
    if not ranked:
        return None
    limit = (1 + TIE) * ranked[0].time.total
    within = sorted((option for option in options if option.seconds <= limit), key=lambda o: (o.complexity, o.order()))
    tried = 0
    for option in within:
        if tried == _TRIED_FOR_SIMPLICITY or option.complexity >= complexity(ranked[0].run):
            break
        if not room.may_have(option):
            continue
        tried += 1
        candidate = option.candidate(room.config, room.machine)
        if room.has(option, candidate):
            played = room.played(candidate)
            if played.time.total <= limit:
                return played
    return min(
        (one for one in ranked if one.time.total <= limit), key=lambda one: (complexity(one.run), one.time.total)
    )


def complexity(run: Run) -> tuple[int, int, int]:
    """How much of a layout whoever runs it must know. First count kinds of parallelism beside data's; then what its
    schedule, its recomputation and its sums of gradients add; then the processes that share a copy of the model."""
    kinds = sum(size > 1 for size in (run.tensor, run.context, run.pipeline, run.expert))
    more = _SCHEDULES.index(run.schedule) + (run.recompute != "none") + run.software.sums_each
    return kinds, more, run.tensor * run.context * run.pipeline


def _drawbacks(best: Candidate, options: Sequence[_Option], room: _Room) -> Iterator[Drawback]:
    """For each choice that the best layout did not make: the fastest with it, and why that is not the best."""
    made = _choices_of(best.run)
    choices: dict[tuple[str, object], list[_Option]] = {}
    for option in options:
        for name, taken, value in zip(_CHOICES, made, _choices_of(option.run), strict=True):
            if value != taken:
                choices.setdefault((name, value), []).append(option)
    for (name, value), those in choices.items():
        yield _drawback(f"{name} {value}", those, best, room)


def _drawback(choice: str, those: Sequence[_Option], best: Candidate, room: _Room) -> Drawback:
    """`those` have made it, the fastest first."""
    tried = 0
    for option in those:
        if tried == _TRIED_OF_A_CHOICE:
            break
        if room.may_have(option):
            tried += 1
            candidate = option.candidate(room.config, room.machine)
            if room.has(option, candidate):
                return Drawback(choice, _slower(room.played(candidate), best))
    ratio = those[0].seconds / best.time.total - 1
    speed = f"{ratio:.0%} slower" if ratio > 0 else f"{-ratio:.0%} faster"
    least = min(map(room.least, those)) / 2**30
    why = f"none of the {tried} fastest with it fits" if tried else f"does not fit, {least:.0f} GiB and more"
    return Drawback(choice, f"{why}; it would be {speed}")


def seconds_text(seconds: float) -> str:
    """With a unit that leaves something of it: `1.23 s`, `45.6 ms`, `78 µs`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}" if unit == "s" else f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _slower(candidate: Candidate, best: Candidate) -> str:
    more = {name: seconds - getattr(best.time, name) for name, seconds in vars(candidate.time).items()}
    part = max(more, key=lambda name: more[name])
    return f"{candidate.time.total / best.time.total - 1:.1%} slower: {part} +{seconds_text(more[part])}"
