"""Whatever the planner may recommend can be rehearsed and run: layouts drawn from those that it looks at."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from many import curve_of, largest_difference, on_processes
from tiny_models import BOUND, Kind, Layout, Runs, slow, tiny_recipe

from zili import chips
from zili.config import RunConfig
from zili.planning.fitted.machine import Machine
from zili.planning.fitted.rates import rates_of
from zili.planning.search import layouts as search

MODELS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("dense", ()),
    ("dense", ("model.mtp_layers=1",)),
    ("dense", ("model.tied_embeddings=true",)),
    ("mixture", ()),
    ("mixture", ("model.mtp_layers=0", "training.micro_batch=1")),
    ("mixture", ("optimizer.name=muon",)),
    ("tele-flm-1t", ()),
    ("zili-1t-a32b", ()),
)
_OTHERS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("dense", ("model.lora={rank=4}",)),
    ("mixture", ("model.lora={rank=4, matrices=['query_up', 'output']}", "optimizer.name=muon")),
    ("dense", ("preference.beta=0.1", "training.start_from=model")),
    ("mixture", ("preference.beta=0.1", "training.start_from=model")),
)
"""Of which runs need more than the tiny text."""


_ANY = Machine("any", peak=1.0, lowered_peak=1.0, memory=1.0, link=1.0, domain=8, network=1.0)
"""Speeds do not matter: all layouts are looked at."""


def recommended(dice: random.Random, config: RunConfig, world: int) -> RunConfig:
    """One of all layouts of `config` on so many chips that a search chooses among."""
    options = list(search._options(config, world, _ANY, rates_of(None)))
    # Most of them are cuts of the plainest kind: the choice is among kinds first.
    kinds = sorted({(option.run.pipeline > 1, option.run.schedule, option.run.recompute) for option in options})
    kind = dice.choice(kinds)
    alike = [o for o in options if (o.run.pipeline > 1, o.run.schedule, o.run.recompute) == kind]
    return dice.choice(alike).candidate(config, _ANY).config


def rehearsed(config: RunConfig, world: int, rank: int) -> int:
    from zili.rehearsal import rehearse

    return rehearse(config, world, rank, backend=chips.find_backend("ascend")).peak.bytes


def rehearse_drawn(dice: random.Random, folder: Path) -> None:
    """A model and a layout drawn, and a process of each place of its pipeline."""
    kind, settings = dice.choice((*MODELS, *_OTHERS))
    precision = f"chip.precision={dice.choice(('bf16', 'fp32'))}"
    config = tiny_recipe(kind, folder, folder / "run", *settings, precision, "training.global_batch=32")
    world = dice.choice((2, 4, 8, 16, 32))
    chosen = recommended(dice, config, world)
    chosen = chosen.model_copy(update={"chip": chosen.chip.model_copy(update={"operations": {}})})
    places = chosen.parallel.pipeline
    for place in sorted({0, places - 1, dice.randrange(places)}):
        try:
            (size,) = on_processes(1, rehearsed, chosen, world, place * world // places)
        except AssertionError as error:
            pytest.fail(f"{kind} {settings} on {world}: {chosen.parallel} {chosen.training}\n{error}")
        assert size > 0


@pytest.mark.parametrize("seed", [*range(2), *(slow(seed) for seed in range(2, 60))])
def test_what_may_be_recommended_can_be_rehearsed(seed: int, tmp_path: Path) -> None:
    rehearse_drawn(random.Random(seed), tmp_path)


@pytest.mark.parametrize("layout", [Layout("shards=2"), slow(Layout("pipeline=2 shards=2"))])
def test_multi_token_prediction_takes_no_part_beside_preferences(layout: Layout, tmp_path: Path) -> None:
    """In bf16, with gradients of several micro-batches to add up: it has none, and its weights are never gathered."""
    settings = ("preference.beta=0.1", "training.start_from=model", "chip.precision=bf16")
    config = tiny_recipe("mixture", tmp_path, tmp_path / "run", *settings, *layout.overrides)
    last = layout.world - layout.world // config.parallel.pipeline
    assert on_processes(1, rehearsed, config, layout.world, last)[0] > 0


def run_and_compare(config: RunConfig, world: int, alone: list[float]) -> None:
    many = curve_of(config, world, 2)
    assert largest_difference(alone[:2], many.losses) <= BOUND


@pytest.mark.parametrize("layout", [Layout("pipeline=2"), slow(Layout("tensor=2 pipeline=2 expert=2"))])
def test_experts_of_multi_token_prediction_are_recomputed_on_a_pipeline(layout: Layout, runs: Runs) -> None:
    """What sharding does around them is done another number of times then."""
    config = runs.recipe("mixture", "training.recompute=selective", *layout.overrides)
    run_and_compare(config, layout.world, runs.alone("mixture", steps=2).losses)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_what_may_be_recommended_runs_as_one_process_does(seed: int, runs: Runs) -> None:
    dice = random.Random(seed)
    kind, settings = dice.choice(MODELS)
    world = dice.choice((2, 4))
    config = recommended(dice, runs.recipe(kind, *settings), world)
    run_and_compare(config, world, runs.alone(kind, *settings, steps=2).losses)
