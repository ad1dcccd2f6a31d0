"""The recipes that the project ships can be run as they stand, on the number of chips they name."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from many import on_processes

from zili.chips import find_backend
from zili.chips.catalog import find_chip
from zili.config import RunConfig, load_recipe
from zili.parallel.layout import DIMENSIONS, lay_out
from zili.planning.exact.job import Job
from zili.planning.exact.memory import Peaks, fullest, usable, with_reduce

RECIPES = Path(__file__).parents[2] / "recipes"
WORLDS = {"debug-4d": 4, "own-text": 1, "telechat2-3b": 1, "sft-demo": 1, "dpo-demo": 1}
"""Processes of the recipes whose name does not end with them."""
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64}
SMOLLM2 |= {"ffn_hidden_size": 1536, "max_length": 8192, "tied_embeddings": True, "rotary": {"base": 100_000.0}}


@pytest.fixture(autouse=True)
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `zili import` leaves of SmolLM2-135M, which recipes/sft-demo.toml begins with; here without its weights."""
    (tmp_path / "runs" / "smollm2").mkdir(parents=True)
    (tmp_path / "runs" / "smollm2" / "model.json").write_text(json.dumps({"model": SMOLLM2}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def world_of(name: str) -> int:
    found = re.search(r"-(\d+)$", name)
    return WORLDS[name] if name in WORLDS else int(found[1]) if found else 0


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_fits_its_world(path: Path) -> None:
    config = load_recipe(path)
    layout = lay_out(config, world_of(path.stem))
    assert layout.world == world_of(path.stem)
    comment = path.read_text(encoding="utf-8").split("name =")[0]
    for dimension in DIMENSIONS:
        size = getattr(layout, dimension)
        if size > 1 and dimension != "replicas":
            assert dimension in comment, f"the comment does not say why {dimension} is {size}"


def of_a_chip() -> list[Path]:
    """Recipes that name the chip they are laid out for; the others run on a laptop."""
    return [path for path in sorted(RECIPES.glob("*.toml")) if load_chip(path)]


def load_chip(path: Path) -> str | None:
    return tomllib.loads(path.read_text(encoding="utf-8")).get("chip", {}).get("model")


def planned(path: Path) -> Job:
    """As `zili plan --layout recipe` has it."""
    config = load_recipe(path, ["chip.precision=bf16"])
    micro = 1 if config.training.micro_batch == "auto" else config.training.micro_batch
    training = config.training.model_copy(update={"micro_batch": micro})
    return Job(config.model_copy(update={"training": training}), lay_out(config, world_of(path.stem)))


def room_of(path: Path) -> float:
    """Nine tenths of what a run can have of the recipe's chip."""
    return 0.9 * usable(1e9 * find_chip(load_chip(path) or "").require("memory_gb"))


def test_large_recipes_name_their_chip() -> None:
    large = {path.stem for path in RECIPES.glob("*.toml") if world_of(path.stem) > 4}
    assert large <= {path.stem for path in of_a_chip()} and len(large) == 6


@pytest.mark.parametrize("path", of_a_chip(), ids=lambda path: path.stem)
def test_a_recipe_fits_the_chip_it_names(path: Path) -> None:
    job, room = planned(path), room_of(path)
    parts = fullest(with_reduce(job, room))
    assert sum(parts.values()) <= room, parts


@pytest.mark.parametrize("path", sorted({*RECIPES.glob("*.toml")} - {*of_a_chip()}), ids=lambda path: path.stem)
def test_the_others_fit_a_laptop(path: Path) -> None:
    job = planned(path)
    here = replace(job, on_host=True)
    assert sum(fullest(here).values()) * job.layout.world < 8e9


@pytest.mark.slow
@pytest.mark.parametrize("path", of_a_chip(), ids=lambda path: path.stem)
def test_a_recipe_rehearsed_fits_the_chip_it_names(path: Path) -> None:
    """The place that the planner says has most, and the first and the last of the pipeline."""
    job, room = planned(path), room_of(path)
    settled = with_reduce(job, room)
    world, pipeline = job.layout.world, job.layout.pipeline
    by_place = [sum(Peaks(settled).at(place).values()) for place in range(pipeline)]
    for place in {0, by_place.index(max(by_place)), pipeline - 1}:
        (peak,) = on_processes(1, rehearsed, settled.config, world, place * (world // pipeline), load_chip(path))
        assert peak <= room, f"process {place} of the pipeline takes {peak / 2**30:.1f} GiB"
        assert peak == pytest.approx(by_place[place], rel=0.05)


def rehearsed(config: RunConfig, world: int, rank: int, name: str) -> int:
    from zili.rehearsal import rehearse

    chip = find_chip(name)
    return rehearse(config, world, rank, backend=find_backend(chip.backend or ""), chip=chip).peak.bytes


@pytest.mark.parametrize("preset", ["tele-flm-1t", "zili-1t-a32b"])
def test_a_recipes_small_twin_fits_the_layouts_it_is_tried_in(preset: str) -> None:
    recipe = next(path for path in RECIPES.glob("*-10240.toml") if f'"{preset}"' in path.read_text(encoding="utf-8"))
    small = ["model.scaled_to=64", "training.sequence_length=64", "training.global_batch=32", "training.micro_batch=1"]
    for parallel in ({"tensor": 2, "pipeline": 2, "shards": 2}, {"shards": 2, "context": 2, "tensor": 2}):
        sizes = {**dict.fromkeys((*DIMENSIONS, "expert"), 1), **parallel}
        changes = [f"parallel.{name}={size}" for name, size in sizes.items()]
        assert lay_out(load_recipe(recipe, [*small, *changes]), 8).world == 8
