"""Which process has what: arithmetic on the configuration, the same on every process, before anything is built.

Imports no torch. Processes are numbered with `tensor` innermost, then context, shards, replicas, and `pipeline`
outermost: the dimension that sends most talks to its nearest neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import gcd, prod
from typing import TYPE_CHECKING

from zili.errors import LayoutError
from zili.plurals import counted

if TYPE_CHECKING:
    from zili.config import RunConfig
    from zili.config.model import ModelConfig
    from zili.config.parallel import ParallelConfig, Schedule

DIMENSIONS = ("pipeline", "replicas", "shards", "context", "tensor")
"""From the outermost to the innermost."""


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def processes() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as torchrun told us; one process where it did not."""
    try:
        rank, size, here = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    except ValueError as error:
        raise LayoutError(f"RANK, WORLD_SIZE or LOCAL_RANK is not a number: {error}; start with torchrun") from error
    return rank, size, here


def torchrun(world: int) -> str:
    """The words that start `world` processes, before the command, on machines like those of this run, else with eight
    on each. HOST is the first of several machines, and each of them is given the line."""
    _, size, _ = processes()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    each = here if size > here or size == world else max(here, min(world, 8))
    each = gcd(world, each)
    machines = f"--nnodes {world // each} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if world > each else ""
    return f"torchrun {machines}--nproc-per-node {each} -m zili"


@dataclass(frozen=True)
class Layout:
    """A `[parallel]` table with nothing left open."""

    pipeline: int = 1
    replicas: int = 1
    shards: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Processes along each of `DIMENSIONS`."""
        return tuple(getattr(self, name) for name in DIMENSIONS)

    @property
    def world(self) -> int:
        """Processes in all."""
        return prod(self.sizes)

    @property
    def data(self) -> int:
        """Processes that read different samples."""
        return self.replicas * self.shards

    @property
    def weight_shards(self) -> int:
        """Processes over which a weight is cut for storage: those of `shards` and `context`."""
        return self.shards * self.context

    @property
    def expert_shards(self) -> int:
        """Processes over which one expert is cut for storage."""
        return self.shards * self.context * self.tensor // self.expert

    @property
    def world_name(self) -> str:
        """What all processes share: the dimension that all of them are in, where there is one."""
        sizes = {"pipeline": self.pipeline, "tensor": self.tensor, "context": self.context, "expert": self.expert}
        sizes |= {"replicas": self.replicas, "weight_shards": self.weight_shards, "expert_shards": self.expert_shards}
        return next((name for name, size in sizes.items() if size == self.world), "world")

    def __str__(self) -> str:
        named = {**{name: getattr(self, name) for name in DIMENSIONS}, "expert": self.expert}
        return " x ".join(f"{name} {size}" for name, size in named.items() if size > 1) or "one process"


def lay_out(config: RunConfig, world: int) -> Layout:
    """The layout of `config` over `world` processes.

    Raises:
        LayoutError: it does not divide the world, the model or the batch; the message has the numbers, and the
            nearest that do.
    """
    layout = _sized(config.parallel, world)
    problems = list(_problems(config, layout))
    if problems:
        raise LayoutError(f"this layout ({layout}) cannot be run:\n" + "\n".join(f"  {line}" for line in problems))
    return layout


def _sized(parallel: ParallelConfig, world: int) -> Layout:
    sizes = {name: getattr(parallel, name) for name in (*DIMENSIONS, "expert")}
    others = prod(size for name, size in sizes.items() if name not in ("shards", "expert"))
    if sizes["shards"] == "auto":
        if world % others:
            fitting = max(1, round(world / others)) * others
            raise LayoutError(
                f"{counted(world, 'process')} cannot be divided by parallel.replicas x context x tensor x pipeline = "
                f"{others}; start a multiple of {others}, for example {fitting}: {torchrun(fitting)} train RECIPE"
            )
        sizes["shards"] = world // others
    layout = Layout(**sizes)
    if layout.world != world:
        factors = " x ".join(f"{name} {sizes[name]}" for name in DIMENSIONS)
        fitting = f'; or set parallel.shards = {world // others} or "auto"' if world % others == 0 else ""
        raise LayoutError(
            f"[parallel] asks for {counted(layout.world, 'process')} ({factors}) and {world} "
            f"{'is' if world == 1 else 'are'} running; start {layout.world}: "
            f"{torchrun(layout.world)} train RECIPE{fitting}"
        )
    return layout


def _problems(config: RunConfig, layout: Layout) -> Iterator[str]:
    model, training = config.model, config.training
    shared = model.tied_embeddings or model.mtp_layers
    if layout.pipeline > 1 and shared and config.parallel.schedule == "zbv":
        yield (
            "parallel.schedule zbv puts the first and the last stage into one process, which cannot hold the embedding "
            "that both of them need (model.tied_embeddings, model.mtp_layers); take zero_bubble"
        )
    halves = config.parallel.schedule in ("zero_bubble", "zbv")
    if layout.pipeline > 1 and halves and training.recompute != "none":
        yield (
            f"parallel.schedule {config.parallel.schedule} cuts the backward pass of a block in two, and what "
            f'training.recompute "{training.recompute}" makes again for the first half stays until the second: more '
            'memory than "none" takes; take "none", or schedule interleaved'
        )
    if layout.pipeline > 1 and halves and config.parallel.reduce == "micro_batch":
        yield (
            f"parallel.schedule {config.parallel.schedule} has gradients of weights too late for parallel.reduce "
            '"micro_batch" to save memory; take "step", or schedule interleaved'
        )
    if layout.tensor > 1:
        for name in ("heads", "kv_heads", "ffn_hidden_size", "vocab_size"):
            yield from _undivided("parallel.tensor", layout.tensor, f"model.{name}", getattr(model, name))
    length = training.sequence_length
    if layout.context > 1:
        # Two pieces each: a late one, which sees much, with an early one, which sees little.
        yield from _undivided("twice parallel.context", 2 * layout.context, "training.sequence_length", length, 2)
    if layout.tensor > 1 and length % layout.context == 0:
        own = length // layout.context
        yield from _undivided("parallel.tensor", layout.tensor, "the tokens of a process in a sequence", own)
    yield from _batch_problems(config, layout)
    yield from _stage_problems(config.parallel, model)
    group = layout.shards * layout.context * layout.tensor
    if layout.expert > 1 and model.mixture is None:
        yield f"parallel.expert {layout.expert}, and the model has no experts; leave it at 1"
    elif layout.expert > 1 and model.mixture is not None:
        yield from _undivided("parallel.expert", layout.expert, "model.mixture.experts", model.mixture.experts)
        yield from _undivided("parallel.expert", layout.expert, "shards x context x tensor", group)


def _batch_problems(config: RunConfig, layout: Layout) -> Iterator[str]:
    batch, micro = config.training.global_batch, config.training.micro_batch
    yield from _undivided("replicas x shards", layout.data, "training.global_batch", batch)
    own = batch // layout.data
    if batch % layout.data or micro == "auto":
        return
    yield from _undivided("training.micro_batch", micro, "the samples of a process in a step", own)
    if own % micro == 0 and own // micro < layout.pipeline:
        yield (
            f"a pipeline of {layout.pipeline} processes needs as many micro-batches, a process has {own // micro} of "
            f"{micro} samples; raise training.global_batch to {layout.pipeline * micro * layout.data} or lower "
            "training.micro_batch"
        )
    count, schedule = own // micro, config.parallel.schedule
    if own % micro == 0 and count >= layout.pipeline > 1 and uneven_rounds(schedule, layout.pipeline, count):
        yield (
            f"parallel.schedule {schedule} goes through {count} micro-batches in {count // layout.pipeline} rounds, "
            f"which must be equal; make them a multiple of {layout.pipeline} with training.global_batch or "
            "training.micro_batch"
        )


def uneven_rounds(schedule: Schedule, pipeline: int, micro_batches: int) -> bool:
    """Whether torch refuses so many micro-batches: rounds of about as many as there are processes must be equal."""
    if schedule in ("1f1b", "zbv"):
        return False
    return micro_batches % max(1, micro_batches // pipeline) != 0


def _stage_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    if parallel.stages > model.layers:
        yield (
            f"{parallel.stages} stages (parallel.pipeline {parallel.pipeline} x {parallel.stages_each} each) for "
            f"{model.layers} layers; a stage has at least one"
        )
    elif parallel.stage_layers is not None and sum(parallel.stage_layers) != model.layers:
        yield (
            f"parallel.stage_layers {list(parallel.stage_layers)} adds up to {sum(parallel.stage_layers)}, "
            f"model.layers is {model.layers}"
        )


def _undivided(name: str, divisor: int, of: str, number: int, step: int = 1) -> Iterator[str]:
    if number % divisor == 0:
        return
    least, most = max(0, divisor - _REACH), min(number, divisor + _REACH)
    below = next((size for size in range(divisor - divisor % step, least, -step) if number % size == 0), None)
    above = next((size for size in range(divisor + step - divisor % step, most + 1, step) if number % size == 0), None)
    near = " and ".join(str(size) for size in (below, above) if size is not None)
    known = f"the nearest that do are {near}" if near else "none near it does"
    yield f"{name} {divisor} does not divide {of} {number}; {known}"


_REACH = 1_000_000
"""How far those that divide are looked for: a number of eighteen digits may have none near."""


def stage_ranges(parallel: ParallelConfig, layers: int) -> list[range]:
    """The layers of each stage. The first and last stages, which also have the embedding and the head, get fewer."""
    counts = list(parallel.stage_layers or _even(layers, parallel.stages))
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _even(layers: int, stages: int) -> list[int]:
    each, more = divmod(layers, stages)
    # The stages in the middle first.
    order = sorted(range(stages), key=lambda i: (i in (0, stages - 1), i))
    longer = set(order[:more])
    return [each + (i in longer) for i in range(stages)]


def stages_of(parallel: ParallelConfig, process: int) -> list[int]:
    """Which stages a process of the pipeline has: every so many, or for zbv one from each end of the V."""
    if parallel.schedule == "zbv":
        return [process, parallel.stages - 1 - process]
    return list(range(process, parallel.stages, parallel.pipeline))
