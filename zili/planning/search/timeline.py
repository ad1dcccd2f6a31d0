"""A pipeline's step played through: what each process does when, with its own layers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from zili.config import RunConfig
from zili.parallel.layout import Layout, stage_ranges
from zili.planning.exact.schedule import Kind, Plan, Span, makespan, simulate
from zili.planning.fitted.machine import Machine
from zili.planning.fitted.rates import Rates
from zili.planning.fitted.run import Run, Software
from zili.planning.fitted.step_time import StepTime, between_stages, work


def run_of(config: RunConfig, layout: Layout) -> Run:
    """A recipe on a layout as a run, in this house's software."""
    parallel, training = config.parallel, config.training
    micro = training.micro_batch
    return Run(
        model=config.model,
        sequence=training.sequence_length,
        global_batch=training.global_batch,
        micro_batch=1 if micro == "auto" else micro,
        data=layout.data,
        tensor=layout.tensor,
        context=layout.context,
        pipeline=layout.pipeline,
        virtual=parallel.stages_each,
        expert=layout.expert,
        weight_shards=layout.weight_shards,
        state_shards=layout.weight_shards,
        kept_gathered=layout.pipeline > 1,
        recompute=training.recompute,
        schedule=parallel.schedule,
        software=Software(sums_each=parallel.reduce == "micro_batch"),
    )


def timeline(config: RunConfig, layout: Layout, machine: Machine, rates: Rates, micro_batches: int) -> list[list[Span]]:
    """What each process of a pipeline does when, in seconds, with so many micro-batches."""
    run = run_of(config, layout)
    known = work(run, machine, rates)
    layers = [len(stage) for stage in stage_ranges(config.parallel, config.model.layers)]
    head, whole = sum(known.head), sum(known.layers)
    each: dict[Kind, float] = {"forward": known.forward, "backward": whole - known.forward, "weights": known.weights}
    each["inputs"] = each["backward"] - known.weights
    ends: dict[Kind, float] = {"forward": 1 / 3, "backward": 2 / 3, "inputs": 1 / 3, "weights": 1 / 3}
    plan = Plan(config.parallel.schedule, layout.pipeline, config.parallel.stages_each, micro_batches)

    @cache
    def seconds(kind: Kind, stage: int) -> float:
        own = layers[stage] / config.model.layers * each[kind]
        return own + (head * ends[kind] if stage == plan.stages - 1 else 0.0)

    between = between_stages(run, machine, rates) / 2 / run.virtual
    return simulate(plan, lambda action: seconds(action.kind, action.stage), between)


def played_through(config: RunConfig, layout: Layout, time: StepTime, machine: Machine, rates: Rates) -> StepTime:
    """`time`, with what its processes wait for one another as their schedule has it.

    Long steps are played with few micro-batches and with more, and what each more takes is gone on with.
    """
    count = int(run_of(config, layout).micro_batches)
    if layout.pipeline == 1 or count < layout.pipeline:
        return time
    busy = time.products + time.attention + time.passes + time.tensor + time.context + time.expert + time.pipeline

    def seconds(micro_batches: int) -> float:
        return makespan(timeline(config, layout, machine, rates, micro_batches))

    few, more = 3 * layout.pipeline, 4 * layout.pipeline
    if count <= more or (config.parallel.schedule != "1f1b" and count % layout.pipeline):
        whole = seconds(min(count, 64 * layout.pipeline)) * max(1.0, count / (64 * layout.pipeline))
    else:
        short, long = seconds(few), seconds(more)
        whole = long + (count - more) * (long - short) / (more - few)
    return replace(time, bubble=max(0.0, whole - busy))
