"""`import zili`: what it costs, what it gives, and that its functions do what the commands do."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zili
from zili.config import RunConfig, dump_recipe
from zili.errors import ConfigError, LayoutError
from zili.objectives.next_token import NextToken
from zili.runs.recipes import read_recipe

FUNCTIONS = {"prepare", "setup", "train", "evaluate", "load", "generate", "serve", "plan", "rehearse", "export"}


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    tree = ast.parse(Path(zili.__file__).read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == zili._PLACE
    assert set(zili.__all__) == {*told, "__version__"} == set(dir(zili))
    assert set(zili.__all__) >= FUNCTIONS
    for name in zili.__all__:
        assert getattr(zili, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        zili.no_such  # noqa: B018


@pytest.mark.parametrize("name", sorted(FUNCTIONS - {"prepare", "load"}))
def test_each_function_says_what_it_takes_gives_and_refuses(name: str) -> None:
    function = getattr(zili, name)
    said = inspect.getdoc(function) or ""
    assert all(f"\n{part}:\n" in said for part in ("Args", "Returns", "Raises", "Example"))
    for argument in inspect.signature(function).parameters:
        assert f"    {argument}: " in said, argument


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_importing_it_and_asking_for_help_load_nothing_large(words: list[str]) -> None:
    """Each of these takes as long as all that is needed: a quarter of a second of CPU when this was written."""
    heavy = ("torch", "numpy", "pydantic", "zili.config")
    code = (
        f"import atexit, os, sys, zili; atexit.register(lambda: any(m in sys.modules for m in {heavy}) and os._exit(9))"
    )
    code += f"; sys.argv = ['zili', *{words}]; {words} and __import__('zili.__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and bool(words) == ("quickstart" in done.stdout), done


@pytest.fixture
def as_table(recipe: Any) -> dict[str, Any]:
    return recipe().model_dump(mode="json", exclude_unset=True)  # type: ignore[no-any-return]


def test_a_recipe_is_a_file_a_folder_a_table_or_a_configuration(
    recipe: Any, as_table: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(dump_recipe(recipe()), encoding="utf-8")
    read = [read_recipe(one, {"training.steps": 3}) for one in (file, str(file), tmp_path, as_table, recipe())]
    assert read == [recipe("training.steps=3")] * 5


def test_overrides_are_checked_and_none_unsets(recipe: Any) -> None:
    config: RunConfig = read_recipe(recipe("chip.model=h100"), {"chip.model": None, "training.micro_batch": "auto"})
    assert config.chip.model is None and config.training.micro_batch == "auto"
    with pytest.raises(ConfigError, match=r"did you mean training\.steps"):
        read_recipe(recipe(), {"training.stebs": 3})
    with pytest.raises(ConfigError, match="'steps' is a value, not a table"):
        read_recipe(recipe(), {"training.steps.x": 3})


class Heard(zili.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.errors: list[BaseException] = []
        self.evaluated: list[float] = []

    def on_step(self, trainer: zili.Trainer, record: zili.StepRecord) -> None:
        self.steps.append(record.step)

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        self.evaluated.append(values["bits_per_byte"])

    def on_error(self, trainer: zili.Trainer, error: BaseException) -> None:
        self.errors.append(error)


@pytest.fixture(autouse=True)
def peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zili.training.trainer.matmul_peak", lambda *_: 1e11)  # 0.3 s a run


def test_from_a_recipe_to_text(
    recipe: Any, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heard, text = Heard(), tmp_path / "text.txt"
    text.write_text("self reliance 自立 kemandirian\n" * 20, encoding="utf-8")
    run = zili.setup(recipe(), overrides={"data.held_out": str(tiny_data / "held_out")})
    assert {choice.name for choice in run.choices} > {"chip.name", "chip.precision"}
    trainer = zili.train(run, callbacks=[heard])
    assert heard.steps == [1, 2, 3, 4, 5, 6] and len(heard.evaluated) == 1 and trainer.step == 6
    assert "step 6/6" in capsys.readouterr().out
    again = zili.train(recipe().folder, progress=False, overrides={"training.steps": 7})
    assert again.step == 7 and capsys.readouterr().out == ""

    folder = recipe().folder
    score = zili.evaluate(folder, [text], compressors=True)
    assert 0 < score.bits_per_byte < 20 and [one.name for one in score.compressors] == ["xz -9e", "zstd -19"]
    assert json.dumps(score.as_json())
    whole = zili.generate(folder, "self", max_new_tokens=5, seed=3)
    assert whole == "".join(zili.generate(folder, "self", max_new_tokens=5, seed=3, stream=True)) != ""
    release = zili.export(folder, tmp_path / "out", layout="llama", dtype="float32")
    assert release.layout == "llama" and release.difference < 1e-3
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(zili.load(tmp_path / "out")(ids), zili.load(folder)(ids), atol=1e-5, rtol=0)


class Seen(zili.Decoder):
    """A kind of decoder that says how often it was asked."""

    asked = 0

    def forward(self, *arguments: Any, **named: Any) -> Any:
        type(self).asked += 1
        return super().forward(*arguments, **named)


class Half(NextToken):
    """Half of the loss."""

    def terms(self, *arguments: Any, **named: Any) -> zili.Terms:
        terms = super().terms(*arguments, **named)
        return zili.Terms(terms.loss / 2, terms.figures, terms.count)


def test_what_is_learned_and_the_kind_of_model_come_by_argument(recipe: Any) -> None:
    losses = []
    for objective in (None, Half()):
        heard = Losses()
        config = recipe("training.steps=1", f"folder={recipe().folder}-{objective is None}")
        zili.train(config, callbacks=[heard], objective=objective, model=Seen, progress=False)
        losses += heard.losses
    assert Seen.asked > 0 and losses[1] == pytest.approx(losses[0] / 2)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"callbacks": [zili.Callback]}, r"callbacks: <class '.*> is not an object of a zili.Callback class"),
        ({"callbacks": ["tensorboard"]}, "callbacks: 'tensorboard' is not an object"),
        ({"objective": Half}, "objective: <class '.*Half'> is not an object of a zili.Objective class"),
        ({"model": "Seen"}, "model: 'Seen' is not a class below zili.Decoder"),
    ],
)
def test_what_is_of_another_kind_is_refused(recipe: Any, argument: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        zili.train(recipe(), progress=False, **argument)
    assert not recipe().folder.exists()


class Losses(zili.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, trainer: zili.Trainer, record: zili.StepRecord) -> None:
        self.losses.append(record.loss)


class Breaks(zili.Callback):
    def after_step(self, trainer: zili.Trainer) -> None:
        raise RuntimeError("a defect of a callback")


def test_callbacks_hear_of_the_error_that_ends_a_run(recipe: Any) -> None:
    heard = Heard()
    with pytest.raises(RuntimeError, match="a defect"):
        zili.train(recipe(), callbacks=[heard, Breaks()], progress=False)
    (error,) = heard.errors
    assert str(error) == "a defect of a callback"


def test_plan_and_rehearse_without_a_chip(recipe: Any) -> None:
    plan = zili.plan("telechat2-3b", 64, "h100", tokens=1e10, overrides={"training.global_batch": 128})
    assert plan.chips == 64 and plan.days > 0 and plan.recipe.training.global_batch == 128
    assert zili.plan(plan.recipe, 64, "h100", layout="recipe", price=2.0).cost == pytest.approx(
        2.0 * zili.plan(plan.recipe, 64, "h100", layout="recipe").chip_hours
    )
    with pytest.raises(ConfigError, match=r"chip\.model"):
        zili.plan("telechat2-3b", 64)
    with pytest.raises(ConfigError, match="a plan is for 1 chip or more, not for 0"):
        zili.plan("telechat2-3b", 0, "h100")
    with pytest.raises(LayoutError, match="a rehearsal is of 1 process or more, not of 0"):
        zili.rehearse(recipe(), 0)
    (found,) = zili.rehearse(recipe("training.micro_batch=2"), 1)
    assert found.peak.bytes > 0 and found.world == 1


def test_an_application_for_a_server_of_ones_own(recipe: Any) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from starlette.testclient import TestClient

    zili.train(recipe("training.steps=1"), progress=False)
    app = zili.serve(recipe().folder, name="mine", slots=1, block=False)
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
        asked = {"model": "mine", "prompt": "self", "max_tokens": 2}
        assert client.post("/v1/completions", json=asked).status_code == 200
