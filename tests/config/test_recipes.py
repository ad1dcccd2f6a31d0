"""The recipes that the project ships can be run as they stand, on the number of chips they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from zili.config import load_recipe
from zili.models.arithmetic import count_parameters
from zili.parallel.layout import DIMENSIONS, lay_out

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


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*-[0-9]*[0-9].toml")), ids=lambda path: path.stem)
def test_the_state_of_a_large_recipe_leaves_room_on_64_gb(path: Path) -> None:
    config = load_recipe(path)
    layout = lay_out(config, world_of(path.stem))
    count = count_parameters(config.model)
    state = 16 * (count.total + count.next_tokens) / (layout.world / layout.replicas)
    assert state < 32e9


@pytest.mark.parametrize("preset", ["tele-flm-1t", "zili-1t-a32b"])
def test_a_recipes_small_twin_fits_the_layouts_it_is_tried_in(preset: str) -> None:
    recipe = next(path for path in RECIPES.glob("*-10240.toml") if f'"{preset}"' in path.read_text(encoding="utf-8"))
    small = ["model.scaled_to=64", "training.sequence_length=64", "training.global_batch=32", "training.micro_batch=1"]
    for parallel in ({"tensor": 2, "pipeline": 2, "shards": 2}, {"shards": 2, "context": 2, "tensor": 2}):
        sizes = {**dict.fromkeys((*DIMENSIONS, "expert"), 1), **parallel}
        changes = [f"parallel.{name}={size}" for name, size in sizes.items()]
        assert lay_out(load_recipe(recipe, [*small, *changes]), 8).world == 8
