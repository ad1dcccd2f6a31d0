"""What a recipe names and packages bring: callbacks by entry point, and what is said where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import zili
from zili.errors import ConfigError
from zili.objectives import objective_of
from zili.plugins import CALLBACKS, find
from zili.runs.recipes import read_recipe
from zili.training.callbacks.named import OWN, check_callbacks, named_callbacks

EXAMPLES = Path(__file__).parents[2] / "examples"
ENTRY = "[zili.callbacks]\nslow_steps = own_callback:SlowSteps\n"


@pytest.fixture
def slow_steps(install: Any) -> None:
    """The example's callback, brought by an installed package."""
    install("own_callback", (EXAMPLES / "own_callback.py").read_text(encoding="utf-8"), entry_points=ENTRY)


@pytest.mark.usefixtures("slow_steps")
def test_a_recipe_names_a_callback_of_an_installed_package(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zili.training.trainer.matmul_peak", lambda *_: 1e11)
    config = recipe("callbacks.slow_steps.times=0.5", "training.steps=3")
    zili.train(config, progress=False)
    notes = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert any("is usual" in line.get("text", "") for line in notes if line["kind"] == "note")


REFUSED = {
    "callbacks.slow_stebs.times=1": "no callback 'slow_stebs'; did you mean slow_steps?",
    "callbacks.zzz.times=1": "there are prometheus, slow_steps, swanlab, tensorboard, wandb",
    "callbacks.slow_steps.tims=1": "callbacks.slow_steps: tims: Extra inputs are not permitted. Its settings: times",
    "callbacks.slow_steps.times=often": "callbacks.slow_steps: times: Input should be a valid number",
    "callbacks.wandb.projekt=x": "Its settings: project, entity, name, tags, mode",
    "callbacks.tensorboard.folder=x": "Its settings: none",
    "callbacks.wandb=true": "must be a table",
}


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("override", REFUSED)
def test_a_callback_or_a_setting_that_there_is_not_is_refused_with_those_there_are(recipe: Any, override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_callbacks(read_recipe(recipe(override)), imports=True)
    assert REFUSED[override] in str(refused.value)


def test_a_broken_package_is_named(install: Any, recipe: Any) -> None:
    install(
        "broken_callbacks", "import nowhere_to_be_found\n", entry_points="[zili.callbacks]\nb = broken_callbacks:B\n"
    )
    with pytest.raises(ConfigError, match=r"callback 'b' of package broken_callbacks cannot be loaded .* repair or"):
        named_callbacks(recipe("callbacks.b.x=1"))


def test_a_name_that_two_packages_bring_is_refused(install: Any) -> None:
    install("my_board", "X = 1\n", entry_points="[zili.callbacks]\ntensorboard = my_board:X\n")
    with pytest.raises(ConfigError, match=r"several packages bring a callback 'tensorboard': zili, my_board"):
        find(CALLBACKS, "tensorboard", OWN)


def test_what_is_no_callback_is_refused(install: Any, recipe: Any) -> None:
    install("no_callback", "def make(): return 3\n", entry_points="[zili.callbacks]\nthree = no_callback:make\n")
    with pytest.raises(ConfigError, match=r"callbacks.three: 3 is no zili.Callback"):
        named_callbacks(recipe("callbacks.three={}"))


def test_tensorboard_by_its_old_key_and_by_name_is_one_callback(recipe: Any) -> None:
    names = [
        type(one).__name__ for one in named_callbacks(recipe("logging.tensorboard=true", "callbacks.tensorboard={}"))
    ]
    assert names == ["TensorBoardLog"]


OBJECTIVE = "[zili.objectives]\nz_loss = own_objective:ZLoss\n"


def test_a_recipe_names_an_objective_of_an_installed_package(
    install: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("own_objective", (EXAMPLES / "own_objective.py").read_text(encoding="utf-8"), entry_points=OBJECTIVE)
    monkeypatch.setattr("zili.training.trainer.matmul_peak", lambda *_: 1e11)
    config = recipe("objective.z_loss.weight=0.01", "training.steps=2")
    zili.train(config, progress=False)
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["z_loss"] > 0 for line in lines if line["kind"] == "train")
    with pytest.raises(ConfigError, match=r"no objective 'z_los'; did you mean z_loss\?"):
        read_recipe(recipe("objective.z_los.weight=0.01"))
    with pytest.raises(ConfigError, match=r"objective.z_loss: wait: Extra inputs .* Its settings: weight"):
        objective_of(recipe("objective.z_loss.wait=1"))
    with pytest.raises(ConfigError, match="distill and z_loss are given; a run learns one of them"):
        recipe("objective.z_loss.weight=0.01", "objective.distill.teacher=x", "objective.distill.model=none")


def test_a_package_is_not_imported_before_the_environment_is_set(install: Any, recipe: Any) -> None:
    """It may import torch, whose plugins read the environment then."""
    install("too_early", "raise RuntimeError('imported')\n", entry_points="[zili.callbacks]\nearly = too_early:X\n")
    config = read_recipe(recipe("callbacks.early={}"))
    with pytest.raises(ConfigError, match="imported"):
        check_callbacks(config, imports=True)
