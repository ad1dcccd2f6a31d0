"""Every layout trains as one process does: the same losses and gradient norms but for rounding."""

from __future__ import annotations

import pytest
import torch
from many import Curve, on_processes, open_trainer
from tiny_models import BOUND, STEPS, Kind, Layout, Row, Runs, slow

from zili.config import RunConfig

SINGLE = (
    "replicas=2",
    "shards=2",
    "shards=4",
    "tensor=2",
    "tensor=4",
    "context=2",
    "context=4",
    "pipeline=2",
    "pipeline=4",
    "pipeline=2 schedule=interleaved",
    "pipeline=2 schedule=zero_bubble",
    "pipeline=2 stage_layers=[1,3]",
    "replicas=2 shards=2",
    "replicas=2 shards=4",
)
DENSE = (
    "pipeline=2 schedule=zbv",
    "pipeline=2 schedule=interleaved stage_layers=[1,1,1,1]",
    "shards=2 tensor=2",
    "shards=2 context=2",
    "shards=2 pipeline=2",
    "replicas=2 tensor=2",
    "replicas=2 pipeline=2",
    "replicas=2 shards=2 tensor=2",
    "shards=2 tensor=2 pipeline=2",
    "shards=2 context=2 tensor=2",
    "context=2 tensor=2 pipeline=2",
    "shards=2 pipeline=2 schedule=zero_bubble",
    "tensor=2 pipeline=2 schedule=interleaved",
    "shards=2 context=2 pipeline=2 schedule=zbv",
)
MIXTURE = (
    "shards=2 expert=2",
    "shards=4 expert=2",
    "shards=4 expert=4",
    "replicas=2 shards=2 expert=2",
    "shards=2 tensor=2",
    "tensor=2 expert=2",
    "tensor=4 expert=4",
    "context=2 expert=2",
    "context=2 tensor=2 expert=2",
    "context=2 tensor=2 expert=4",
    "shards=2 tensor=2 expert=4",
    "shards=2 pipeline=2 expert=2",
    "shards=2 pipeline=2 expert=2 schedule=interleaved",
    "shards=2 pipeline=2 expert=2 schedule=zero_bubble",
    "replicas=2 shards=2 tensor=2 expert=2",
    "shards=2 tensor=2 pipeline=2 expert=2",
    "shards=2 context=2 tensor=2 expert=8",
)
CASES = [
    *(slow(Layout(text), "dense") for text in (*SINGLE, *DENSE)),
    *(slow(Layout(text), "mixture") for text in (*SINGLE, *MIXTURE)),
]
PREFIXES: tuple[tuple[str, Kind], ...] = (
    ("shards=2", "dense"),
    ("tensor=2", "dense"),
    ("context=2", "dense"),
    ("pipeline=2 schedule=interleaved", "dense"),
    ("shards=2 expert=2", "mixture"),
)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_a_layout_trains_as_one_process(layout: Layout, kind: Kind, runs: Runs, request: pytest.FixtureRequest) -> None:
    one, many = runs.alone(kind), runs.on(layout, kind)
    assert len(many.losses) == STEPS and one.losses[-1] < 0.8 * one.losses[0], "something was learnt"
    Row.of(layout, layout.world, kind, one, many, BOUND).check(request)


SMALL_BATCH = ("training.global_batch=8",)


@pytest.mark.parametrize(("text", "kind"), PREFIXES)
def test_a_layout_begins_as_one_process(text: str, kind: Kind, runs: Runs, request: pytest.FixtureRequest) -> None:
    layout = Layout(text)
    one, many = runs.alone(kind, *SMALL_BATCH, steps=3), runs.on(layout, kind, *SMALL_BATCH, steps=3)
    assert len(many.losses) == 3
    Row.of(f"{layout}, 3 steps", layout.world, kind, one, many, BOUND).check(request)


def moved_weights(configs: list[RunConfig]) -> list[Curve]:
    """The curve of each of `configs`; of the first as it is, of the others with every weight half a rounding aside."""
    curves = []
    for seed, config in enumerate(configs):
        curve = Curve()
        trainer = open_trainer(config, [curve])
        numbers = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trainer.parallel.parameters():
                noise = torch.randn(parameter.shape, generator=numbers)
                parameter.mul_(1 + 2**-24 * noise * (seed > 0))
        trainer.fit()
        curves.append(curve)
    return curves


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_rounding_of_the_first_weights_alone_stays_within_the_bounds(
    kind: Kind, runs: Runs, request: pytest.FixtureRequest
) -> None:
    # What a layout may do, one process does to itself: a token between two experts goes to the other one.
    ((one, *others),) = on_processes(1, moved_weights, [runs.recipe(kind) for _ in range(4)])
    for number, other in enumerate(others, 1):
        assert other.losses != one.losses
        Row.of(f"one process, other rounding {number}", 1, kind, one, other, BOUND).check(request)
