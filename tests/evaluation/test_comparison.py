"""Several runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_run import make_run
from test_report import Page
from typer.testing import CliRunner

from zili.cli.app import app
from zili.evaluation.comparison import cells, compare, differences, figures, page


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs that differ in seed and steps, and one without a step."""
    first, second, third = (tmp_path / name for name in ("one", "<b>two", "three"))
    make_run(first)
    make_run(second)
    recipe = (second / "recipe.toml").read_text().replace("seed = 0", "seed = 7").replace("steps = 400", "steps = 800")
    (second / "recipe.toml").write_text(recipe)
    third.mkdir()
    (third / "recipe.toml").write_text((first / "recipe.toml").read_text())
    return [first, second, third]


def test_figures_are_the_records_own(runs: list[Path]) -> None:
    first, _, empty = compare(runs)
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert figures(first)["step"] == lines[-1]["step"] and figures(first)["tokens"] == lines[-1]["tokens"]
    assert figures(first)["loss"] == pytest.approx(sum(line["loss"] for line in lines[-10:]) / 10)
    assert set(figures(empty).values()) == {None, 0.0} and cells(empty).count("–") == len(cells(empty)) - 1


def test_only_what_differs_between_recipes_is_told(runs: list[Path]) -> None:
    assert differences(compare(runs)) == {"seed": ["0", "7", "0"], "training.steps": ["400", "800", "400"]}
    assert differences(compare(runs[:1])) == {}


def test_the_page_holds_every_run_and_runs_nothing_of_theirs(runs: list[Path]) -> None:
    names = [run.name for run in runs]
    made = Page(page(compare(runs), names))
    assert all(name in made.text for name in names)
    assert "b" not in made.tags and made.tags.count("svg") >= 4
    assert "training.steps" in made.text


def test_report_of_several_runs_prints_a_table_whole(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "compared.html"
    words = ["report", *map(str, runs), "--page", str(out)]
    outcome = CliRunner().invoke(app, words, env={"COLUMNS": "40"}, catch_exceptions=False)
    assert outcome.exit_code == 0 and out.is_file()
    head, *rows = outcome.output.splitlines()
    assert head.split()[:3] == ["run", "parameters", "step"] and rows[0].startswith("one ") and "800" in outcome.output
    assert not (runs[0] / "report.html").exists()


def test_report_of_several_runs_as_json(runs: list[Path]) -> None:
    outcome = CliRunner().invoke(app, ["report", *map(str, runs), "--json"], catch_exceptions=False)
    told = json.loads(outcome.stdout)
    assert list(told["runs"]) == ["one", "<b>two", "three"] and told["differences"]["seed"]["<b>two"] == "7"
