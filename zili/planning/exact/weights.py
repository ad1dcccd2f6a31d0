"""Which weights one process has, how they are cut, and which are gathered together: `zili.parallel` as arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from zili.models.arithmetic import Shape, is_learned, parameter_shapes
from zili.parallel.cuts import cut_of, stays_fp32
from zili.planning.exact.job import Job


class Parameter(NamedTuple):
    """A weight."""

    name: str
    shape: Shape
    """The shape that this process would hold if weights were not sharded."""
    cut: int | None
    """In which dimension tensor- or expert-parallel processes cut it; None: it is whole."""
    learned: bool
    """Whether it has a gradient. Beside adapters nothing else has one, and multi-token prediction only where it is
    learned."""


@dataclass(frozen=True)
class Group:
    """Weights that are gathered together, or that every process holds whole."""

    parameters: tuple[Parameter, ...]
    of_experts: bool = False
    stays: bool = False
    """Whether the gathered weight is kept from the forward to the backward pass, even where blocks are not."""
    in_fp32: bool = False
    """Whether it is gathered in fp32 also where products are not."""
    whole: bool = False
    """Whether it is not cut, and so not gathered."""
    used: bool = True
    """Whether a step goes through it: not through multi-token prediction where that is not learned."""

    def pieces(self, shards: int, learned: bool = False) -> int:
        """Elements of one of `shards`: each weight is cut along its first dimension, the last pieces filled up; stacks
        of too few experts inside each matrix. With `learned` of those that have gradients."""
        shards = 1 if self.whole else shards
        return sum(_piece(parameter.shape, shards) for parameter in self.parameters if parameter.learned or not learned)


def _piece(shape: Shape, shards: int) -> int:
    first, *rest = shape
    if len(shape) == 3 and first % shards and min(rest) % shards == 0:
        return first * rest[0] // shards * rest[1]
    return -(-first // shards) * prod(rest)


def weight_groups(job: Job) -> Iterator[Group]:
    """Every group of this process, as `zili.parallel.data.apply_sharding` makes them."""
    for stage in job.stages:
        yield from stage_groups(job, stage)


def stage_groups(job: Job, stage: range) -> Iterator[Group]:
    """Those of a stage: of its layers, of what lies around them, and of multi-token prediction."""
    for layer in stage:
        yield from layer_groups(job, layer)
    yield from end_groups(job, stage)
    if stage.stop == job.model.layers and job.model.mtp_layers:
        yield from layer_groups(job, job.model.layers)


def layer_groups(job: Job, number: int) -> Iterator[Group]:
    """Those of a layer; of multi-token prediction's, which counts as one more, everything that is its own."""
    if number < job.model.layers:
        shapes = {f"layers.{number}.{name}": shape for name, shape in job.shapes(number).items()}
    else:
        every = parameter_shapes(job.model)
        shapes = {name: shape for name, shape in every.items() if name.startswith("next_tokens.")}
    yield from _split(job, shapes)


def end_groups(job: Job, stage: range) -> Iterator[Group]:
    """What lies around the blocks of a stage: one group or none; in a lowered run the embedding's is another."""
    model = job.model
    rows = {"embedding.weight": (model.vocab_size, model.hidden_size), "norm.weight": (model.hidden_size,)}
    rows["head.weight"] = rows["embedding.weight"]
    parameters = [_parameter(job, name, rows[name]) for name in (*_first(job, stage), *_last(job, stage))]
    embedding = [parameter for parameter in parameters if parameter.name == "embedding.weight" and _mixed(job)]
    rest = [parameter for parameter in parameters if parameter not in embedding]
    if embedding:
        yield Group(tuple(embedding), stays=True, in_fp32=True)
    yield from _around_whole(job, rest, stays=True)


def _first(job: Job, stage: range) -> list[str]:
    at_the_end = stage.stop == job.model.layers and bool(job.model.tied_embeddings or job.model.mtp_layers)
    return ["embedding.weight"] if stage.start == 0 or at_the_end else []


def _last(job: Job, stage: range) -> list[str]:
    if stage.stop != job.model.layers:
        return []
    return ["norm.weight"] if job.model.tied_embeddings else ["norm.weight", "head.weight"]


def _split(job: Job, shapes: dict[str, Shape]) -> Iterator[Group]:
    """A block's weights, and those of its experts, who are shared by other processes."""
    parameters = [_parameter(job, name, shape) for name, shape in shapes.items() if not name.endswith("expert_bias")]
    used = job.learns_further or not any(name.startswith("next_tokens.") for name in shapes)
    experts = tuple(parameter for parameter in parameters if ".experts." in parameter.name)
    if experts:
        yield Group(experts, of_experts=True, used=used)
    yield from _around_whole(
        job, [parameter for parameter in parameters if ".experts." not in parameter.name], used=used
    )


def _mixed(job: Job) -> bool:
    """Whether weights that stay in fp32 are held otherwise than those of products."""
    return job.lowered and not job.whole


def _around_whole(job: Job, parameters: list[Parameter], stays: bool = False, used: bool = True) -> Iterator[Group]:
    """What is gathered of `parameters`, and what every process has whole."""
    whole = [parameter for parameter in parameters if _mixed(job) and stays_fp32(parameter.name)]
    if gathered := tuple(parameter for parameter in parameters if parameter not in whole):
        yield Group(gathered, stays=stays, used=used)
    if whole:
        yield Group(tuple(whole), stays=stays, in_fp32=True, whole=True, used=used)


def _parameter(job: Job, name: str, shape: Shape) -> Parameter:
    learned = job.learns and is_learned(job.model, name)
    if name.startswith("next_tokens.") and not job.learns_further:
        learned = False
    if ".experts." in name:
        return Parameter(name, (shape[0] // job.layout.expert, *shape[1:]), 0, learned)
    module, _, key = name.rpartition(".")
    cut = cut_of(module, key)
    if cut is None:
        return Parameter(name, shape, None, learned)
    return Parameter(name, tuple(n // job.layout.tensor if i == cut else n for i, n in enumerate(shape)), cut, learned)
