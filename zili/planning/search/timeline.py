"""A pipeline's step played through: what each process does when, with its own layers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from zili.parallel.layout import stage_ranges
from zili.planning.exact.job import Job
from zili.planning.exact.schedule import Kind, PipelinePlan, Span, makespan, simulate
from zili.planning.fitted.machine import Machine
from zili.planning.fitted.rates import Rates
from zili.planning.fitted.step_time import StepTime, between_stages, micro_batch_time


def timeline(job: Job, machine: Machine, rates: Rates, micro_batches: int) -> list[list[Span]]:
    """What each process of a pipeline does when, in seconds, with so many micro-batches."""
    run, parallel = job.run, job.config.parallel
    known = micro_batch_time(run, machine, rates)
    layers = [len(stage) for stage in stage_ranges(parallel, job.model.layers)]
    head, whole = sum(known.head), sum(known.layers)
    each: dict[Kind, float] = {"forward": known.forward, "backward": whole - known.forward, "weights": known.weights}
    each["inputs"] = each["backward"] - known.weights
    ends: dict[Kind, float] = {"forward": 1 / 3, "backward": 2 / 3, "inputs": 1 / 3, "weights": 1 / 3}
    plan = PipelinePlan(parallel.schedule, run.pipeline, run.virtual, micro_batches)

    @cache
    def seconds(kind: Kind, stage: int) -> float:
        own = layers[stage] / job.model.layers * each[kind]
        return own + (head * ends[kind] if stage == plan.stages - 1 else 0.0)

    between = between_stages(run, machine, rates) / 2 / run.virtual
    return simulate(plan, lambda action: seconds(action.kind, action.stage), between)


def played_through(job: Job, time: StepTime, machine: Machine, rates: Rates) -> StepTime:
    """`time`, with what its processes wait for one another as their schedule has it, and what a teacher takes.

    Long steps are played with few micro-batches and with more, and what each more takes is gone on with.
    """
    if job.teacher is not None:
        time = replace(time, teacher=_answers(job.teacher, machine, rates))
    count, pipeline = int(job.run.micro_batches), job.run.pipeline
    if pipeline == 1 or count < pipeline:
        return time
    busy = time.products + time.attention + time.passes + time.tensor + time.context + time.expert + time.pipeline

    def seconds(micro_batches: int) -> float:
        return makespan(timeline(job, machine, rates, micro_batches))

    few, more = 3 * pipeline, 4 * pipeline
    if count <= more or (job.run.schedule != "1f1b" and count % pipeline):
        whole = seconds(min(count, 64 * pipeline)) * max(1.0, count / (64 * pipeline))
    else:
        short, long = seconds(few), seconds(more)
        whole = long + (count - more) * (long - short) / (more - few)
    return replace(time, bubble=max(0.0, whole - busy))


def _answers(teacher: Job, machine: Machine, rates: Rates) -> float:
    """Seconds of a step's forward passes of a teacher, one micro-batch after another through its pipeline."""
    known, run = micro_batch_time(teacher.run, machine, rates), teacher.run
    passes = run.micro_batches + run.pipeline - 1
    return known.forward * passes / run.pipeline + run.micro_batches * sum(known.head) / 3
