"""Which weights one process has, how they are cut, and which are gathered together: `zili.parallel` as arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import NamedTuple

from zili.config.model import ModelConfig
from zili.models.arithmetic import Shape, is_learned, kinds_of_layers, named_layer_shapes
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
    all_tokens: bool
    """Whether tensor-parallel processes take the same tokens through it, not each its own: it is cut, or the whole
    factor of an adapter beside a matrix that is cut."""

    @property
    def of_experts(self) -> bool:
        return ".experts." in self.name


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
    used = number < job.model.layers or job.learns_further
    parameters = layer_parameters(job.model, number, job.layout.tensor, job.layout.expert)
    if not (job.learns and used):
        parameters = _resting(parameters)
    if experts := tuple(parameter for parameter in parameters if parameter.of_experts):
        yield Group(experts, of_experts=True, used=used)
    yield from _around_whole(job, [parameter for parameter in parameters if not parameter.of_experts], used=used)


@lru_cache(maxsize=4096)
def layer_parameters(model: ModelConfig, number: int, tensor: int, expert: int) -> tuple[Parameter, ...]:
    """Weights of a layer as one of so many processes has them; of multi-token prediction's everything that is its
    own."""
    shapes = named_layer_shapes(model, number).items()
    # A router's bias is moved by the load, not by an optimizer.
    return tuple(
        _parameter(model, name, shape, tensor, expert) for name, shape in shapes if not name.endswith("expert_bias")
    )


def end_parameters(model: ModelConfig, stage: range, tensor: int) -> Iterator[Parameter]:
    """Weights that lie around the blocks of a stage. The last stage too has the embedding where it is the head, or
    where multi-token prediction looks tokens up in it."""
    rows, last = (model.vocab_size, model.hidden_size), stage.stop == model.layers
    if stage.start == 0 or (last and (model.tied_embeddings or model.mtp_layers)):
        yield _parameter(model, "embedding.weight", rows, tensor)
    if last:
        yield _parameter(model, "norm.weight", rows[1:], tensor)
    if last and not model.tied_embeddings:
        yield _parameter(model, "head.weight", rows, tensor)


@lru_cache(maxsize=4096)
def held(model: ModelConfig, tensor: int, pipeline: int, expert: int) -> tuple[float, float]:
    """Parameters of the first process of a pipeline with even stages, before they are cut for storage: of all but
    experts, and of experts."""
    plain = experts = 0.0
    layers = [(layer, times / pipeline) for layer, times in kinds_of_layers(model)]
    if pipeline == 1 and model.mtp_layers:
        layers.append((model.layers, 1.0))
    for layer, times in layers:
        for parameter in layer_parameters(model, layer, tensor, expert):
            if parameter.of_experts:
                experts += times * prod(parameter.shape)
            else:
                plain += times * prod(parameter.shape)
    around = end_parameters(model, range(model.layers // pipeline), tensor)
    return plain + sum(prod(parameter.shape) for parameter in around), experts


def end_groups(job: Job, stage: range) -> Iterator[Group]:
    """What lies around the blocks of a stage: one group or none; in a lowered run the embedding's is another."""
    parameters = tuple(end_parameters(job.model, stage, job.layout.tensor))
    if not job.learns:
        parameters = _resting(parameters)
    embedding = [parameter for parameter in parameters if parameter.name == "embedding.weight" and _mixed(job)]
    rest = [parameter for parameter in parameters if parameter not in embedding]
    if embedding:
        yield Group(tuple(embedding), stays=True, in_fp32=True)
    yield from _around_whole(job, rest, stays=True)


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


def _resting(parameters: Iterable[Parameter]) -> tuple[Parameter, ...]:
    return tuple(parameter._replace(learned=False) for parameter in parameters)


def _parameter(model: ModelConfig, name: str, shape: Shape, tensor: int, expert: int = 1) -> Parameter:
    learned = is_learned(model, name)
    if ".experts." in name:
        return Parameter(name, (ceil(shape[0] / expert), *shape[1:]), 0, learned, False)
    module, _, key = name.rpartition(".")
    cut, all_tokens = cut_of(module, key), cut_of(module, "weight") is not None
    here = tuple(ceil(size / tensor) if dimension == cut else size for dimension, size in enumerate(shape))
    return Parameter(name, here, cut, learned, all_tokens)
