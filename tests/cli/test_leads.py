"""Where the command line is used as another's: the answer leads on."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from zili.cli.options import count_of
from zili.config import load_recipe
from zili.errors import ConfigError
from zili.runs.recipes import read_recipe


def said(outcome) -> str:
    """Standard error without the box that it stands in."""
    return " ".join(outcome.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1T", 1e12),
        ("1t", 1e12),
        ("300B", 3e11),
        ("1.5e12", 1.5e12),
        ("20 M", 2e7),
        ("10_000_000", 1e7),
        ("10,000", 1e4),
        ("8k", 8e3),
        ("2G", 2e9),
        ("1e3", 1e3),
    ],
)
def test_a_count_of_tokens_as_people_write_it(text: str, count: float) -> None:
    assert count_of(text) == count


@pytest.mark.parametrize("text", ["", "many", "1x", "nan", "inf", "-3", "0", "1e19", "2000000T", "1e999", "1TT", "٣"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        count_of(text)


@pytest.mark.parametrize(
    ("option", "key"), [("--steps", "training.steps"), ("--lr", "optimizer.learning_rate"), ("--seed", "seed")]
)
def test_an_option_that_is_a_key_is_answered_with_how_it_is_set(zili, recipe_file: Path, option: str, key: str) -> None:
    outcome = zili("train", recipe_file, option, "5")
    assert outcome.code == 2 and f"--set KEY=VALUE; did you mean {key}?" in said(outcome)


def test_elsewhere_an_unknown_option_is_just_that(zili) -> None:
    assert "--set" not in said(zili("sample", "runs/x", "--steps", "5"))


def test_a_run_folder_is_a_recipe(zili, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    (run / "recipe.toml").write_text(recipe_file.read_text())
    assert read_recipe(run) == load_recipe(recipe_file)
    assert read_recipe(run, ["training.steps=3"]).training.steps == 3
    outcome = zili("config", "show", run, "--chips", "1")
    assert outcome.code == 0 and outcome.out.startswith("# run: ")


def test_a_folder_that_is_no_run_and_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"is a folder, and no run: it holds no recipe\.toml"):
        read_recipe(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.toml").touch()
    with pytest.raises(ConfigError, match=r"there are recipes/mine\.toml; `zili quickstart` makes one"):
        read_recipe(Path("nothere.toml"))


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["telechat2-115b", "--chips", "8"], ["--chip:"]),
        (["telechat2-115b", "--chip", "h100"], ["--chips:"]),
        (["--chip", "h100"], ["a model:", "--chips:"]),
    ],
)
def test_plan_says_which_of_its_needs_is_missing(zili, arguments: list[str], missing: list[str]) -> None:
    outcome = zili("plan", *arguments)
    assert outcome.code == 2
    found = [part for part in ("a model:", "--chip:", "--chips:") if part in said(outcome)]
    assert found == missing
