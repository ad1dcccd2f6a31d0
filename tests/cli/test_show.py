"""`zili config show` anywhere, and what a recipe amounts to."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from zili.cli.amounts import amounts
from zili.config import build_config, load_recipe
from zili.data import TokenStore
from zili.errors import ChipError, ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"


def comments(shown: str) -> list[str]:
    return [line.removeprefix("# ") for line in shown.splitlines() if line.startswith("# ")]


@pytest.mark.parametrize("name", ["debug-4d", "telechat2-115b-512", "zili-1t-10240"])
def test_a_recipe_for_many_is_shown_without_opening_a_device(zili, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zili.training.setup.set_up", lambda config: pytest.fail("no device is wanted"))
    monkeypatch.chdir(RECIPES.parent)
    outcome = zili("config", "show", RECIPES / f"{name}.toml")
    assert outcome.code == 0, outcome
    assert build_config(tomllib.loads(outcome.out), origin="shown") == load_recipe(RECIPES / f"{name}.toml")
    assert any("does not run here as it is" in line and "torchrun" in line for line in comments(outcome.out))


def test_so_many_chips_fill_the_layout_in(zili) -> None:
    outcome = zili("config", "show", RECIPES / "debug-4d.toml", "--chips", "8")
    assert outcome.code == 0 and tomllib.loads(outcome.out)["parallel"]["shards"] == 2
    assert any(line.startswith("8 chips: pipeline 2 x shards 2 x tensor 2") for line in comments(outcome.out))
    refused = zili("config", "show", RECIPES / "debug-4d.toml", "--chips", "6")
    assert refused.code == 7 and "6 processes cannot be divided" in refused.err and refused.out == ""


def test_a_chip_that_nobody_knows_is_said_on_many_too(zili) -> None:
    names = ("--set", "chip.name=gpu", "--set", "chip.model=h100x")
    outcome = zili("config", "show", RECIPES / "debug-4d.toml", "--chips", "8", *names)
    said = "\n".join(comments(outcome.out))
    assert outcome.code == 0 and "gpu" in said and "'h100x'" in said and tomllib.loads(outcome.out)["name"], outcome


@pytest.mark.parametrize("error", [ConfigError("this run needs about 86.1 GiB"), ChipError("no such chip is here")])
def test_a_recipe_that_this_machine_cannot_run_is_shown_with_the_reason(
    zili, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(config: object) -> None:
        raise error

    monkeypatch.setattr("zili.training.setup.set_up", refuse)
    outcome = zili("config", "show", recipe_file)
    assert outcome.code == 0 and str(error) in comments(outcome.out)[-1]
    assert build_config(tomllib.loads(outcome.out), origin="shown") == load_recipe(recipe_file)


def test_what_a_recipe_amounts_to_is_counted_from_its_stores(recipe, tiny_data: Path) -> None:
    there = {name: TokenStore.open(tiny_data / name).manifest.tokens for name in ("train", "other")}
    sources = f'data.sources=[{{store="{tiny_data}/train", weight=3}}, {{store="{tiny_data}/other", weight=1}}]'
    config = recipe(sources, "training.steps=40")
    size, *rest = amounts(config)
    assert "40 steps of 128 tokens, 5,120 tokens in all" in size.text and not size.warns
    for (name, share), line in zip({"train": 0.75, "other": 0.25}.items(), rest, strict=True):
        assert f"{name}: {there[name]:,} tokens, {share:.0%}" in line.text
        assert f"{share * 5120 / there[name]:.3g} epochs" in line.text


def test_more_than_four_epochs_are_a_warning(recipe, tiny_data: Path) -> None:
    tokens = TokenStore.open(tiny_data / "train").manifest.tokens
    four = 4 * tokens // 128
    assert [line.warns for line in amounts(recipe(f"training.steps={four}"))] == [False, False]
    _, warned = amounts(recipe(f"training.steps={four + 2}"))
    assert warned.warns and "Above 4 epochs" in warned.text


def test_a_store_that_is_elsewhere_is_said_and_shown_all_the_same(recipe, tmp_path: Path) -> None:
    _, line = amounts(recipe(f'data.sources=[{{store="{tmp_path}/corpus"}}]'))
    assert "not here" in line.text and not line.warns


def test_train_says_what_it_reads_before_anything_is_opened(
    zili, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(config: object) -> None:
        raise ConfigError("far enough")

    monkeypatch.setattr("zili.api.open_run", stop)
    outcome = zili("train", recipe_file, "--set", "training.steps=4000")
    assert outcome.code == 3 and "512,000 tokens in all" in outcome.out and "Above 4 epochs" in outcome.out
