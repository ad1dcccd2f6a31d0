"""What a plan fills in, beside what was published; and the simpler of two layouts that nobody can tell apart."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import pytest

from zili.chips.catalog import find_chip
from zili.config import ModelConfig, RunConfig, build_config, load_preset
from zili.planning.search.goodput import Failures
from zili.planning.search.hyperparameters import batch_tokens, filled, flops, learning_rate, left_open, warm_up
from zili.planning.search.layouts import TIE, complexity, seconds_text
from zili.planning.search.plan import Setting, make_plan, setting_config, usual_batch


def shape(layers: int, hidden: int, kv_heads: int, ffn: int) -> ModelConfig:
    sizes = {"layers": layers, "hidden_size": hidden, "heads": hidden // 128, "kv_heads": kv_heads, "head_dim": 128}
    return ModelConfig.model_validate({**sizes, "ffn_hidden_size": ffn, "vocab_size": 102_400})


# DeepSeek LLM (2401.02954), table 2: trained on 2 T tokens of 4,096; peak rate, sequences a step.
PUBLISHED = {
    "7B": (shape(30, 4096, 32, 11_008), 4.2e-4, 2304),
    "67B": (shape(95, 8192, 8, 22_016), 3.2e-4, 4608),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rule_gives_what_its_authors_trained_with(name: str) -> None:
    model, rate, batch = PUBLISHED[name]
    compute = flops(model, 4096, 2e12)
    assert learning_rate(compute) == pytest.approx(rate, rel=0.05)
    assert batch_tokens(compute) / 4096 == pytest.approx(batch, rel=0.15)


def test_small_runs_get_no_rate_out_of_all_proportion() -> None:
    assert learning_rate(1e12) == 3e-3
    assert learning_rate(1e25) < learning_rate(1e22) < learning_rate(1e19) < 3e-3


@pytest.mark.parametrize(("steps", "rising"), [(1, 0), (49, 0), (100, 2), (10_000, 200), (1_000_000, 2000)])
def test_a_rate_rises_over_a_fiftieth_of_a_short_run(steps: int, rising: int) -> None:
    assert warm_up(steps) == rising < steps


@pytest.mark.parametrize(
    ("chips", "compute", "tokens"),
    [(8, 1.7e22, 5.5e6), (8, 1e18, 2.2e5), (10_240, 7e24, 1.68e7), (10_240, 1e18, 5.2e6), (96, 1e21, 2.2e6)],
)
def test_a_batch_by_size_that_the_chips_can_share(chips: int, compute: float, tokens: float) -> None:
    """Within the factor of two that powers of two leave; every odd factor of the chips is in it."""
    found = usual_batch(chips, 4096, compute)
    assert found * 4096 == pytest.approx(tokens, rel=0.5) and 8 * found >= chips
    odd = chips // math.gcd(chips, 2**20)
    assert found % odd == 0


def recipe(**tables: dict) -> RunConfig:
    table = setting_config(load_preset("telechat2-3b"), 4096, 256, 1e11, "x").model_dump(
        mode="json", exclude_unset=True
    )
    return build_config({**table, **tables}, origin="a test")


def test_only_what_is_left_open_is_filled() -> None:
    own = recipe(optimizer={"learning_rate": 1e-4}, checkpoint={"every": 7}, schedule={"warmup_steps": 5})
    assert list(left_open(own, 1e11, 2.0, 600.0)) == []
    found = list(left_open(recipe(), 1e11, 2.0, 600.0))
    config = filled(recipe(), found)
    assert [f"{one.table}.{one.key}" for one in found] == [
        "optimizer.learning_rate",
        "schedule.warmup_steps",
        "checkpoint.every",
    ]
    assert config.optimizer.learning_rate == learning_rate(flops(config.model, 4096, 1e11))
    assert config.schedule.warmup_steps == warm_up(config.training.steps) and config.checkpoint.every == 300


def test_a_model_that_goes_on_gets_no_rate_of_one_from_nothing() -> None:
    on = recipe(training={"steps": 100, "start_from": "models/mine", "sequence_length": 4096})
    assert [one.key for one in left_open(on, 1e9, 2.0, math.inf)] == ["every"]


def planned(chips: int, chip: str, *, tokens: float = 1e11, batch: int = 256):
    config = setting_config(load_preset("telechat2-3b"), 4096, batch, tokens, "x")
    return make_plan(Setting(config, tokens, Failures()), find_chip(chip), chips)


def test_what_is_written_is_the_simplest_that_nobody_can_tell_from_the_fastest() -> None:
    made = planned(8, "h100")
    assert made.chosen.time.total <= (1 + TIE) * made.best.time.total
    assert complexity(made.chosen.run) <= min(complexity(one.run) for one in made.found.best)
    assert made.chosen.fits
    # On this one the fastest sums gradients after each micro-batch, for 1.6 %.
    assert made.best.run.software.sums_each and not made.chosen.run.software.sums_each


def test_the_recipe_saves_as_often_as_its_failures_ask_for() -> None:
    made = planned(1024, "ascend-910b2", batch=1024)
    every = made.recipe.checkpoint.every * made.chosen.time.total
    assert every == pytest.approx(made.goodput.interval, rel=0.05)
    assert made.recipe.optimizer.learning_rate != RunConfig.model_fields["optimizer"].default.learning_rate


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.345, "12.35 s"), (1.0, "1.00 s"), (0.0456, "45.6 ms"), (7.8e-5, "78 µs")]
)
def test_small_times_keep_their_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_a_small_model_s_plan_has_figures_throughout(tmp_path: Path) -> None:
    """No `0.00 s`, no `0.0 days`: what it was for own-text.toml on one chip."""
    from typer.testing import CliRunner

    from zili.cli.app import app

    recipes, out = Path(__file__).parents[2] / "recipes", tmp_path / "p.toml"
    words = ["plan", str(recipes / "own-text.toml"), "--chip", "h100", "--chips", "1", "--write", str(out)]
    said = CliRunner().invoke(app, words, catch_exceptions=False).output
    for ugly in (" 0.00 ", " 0.0 ", "(0.00", "+0.00", "1 spares", "time: \n", "0 chip-hours", "0 T"):
        assert ugly not in said, said
    written = out.read_text()
    assert written.startswith("# 1 h100-sxm, by `zili plan`: one process") and tomllib.loads(written)
    assert tomllib.loads(written)["optimizer"]["learning_rate"] == 2e-3, "its own"
