"""The examples run, with runs made small."""

from __future__ import annotations

import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest

import zili
from zili.config import dump_recipe
from zili.training.checkpoints import newest_state

ROOT = Path(__file__).parents[2]
TINY = {
    "training.steps": 3,
    "training.sequence_length": 32,
    "training.global_batch": 4,
    "model.layers": 1,
    "chip.name": "cpu",
    "chip.compile": False,
    "chip.operations": {"linear": "reference", "attention": "reference"},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`run("pretrain", words...)` runs an example in an empty folder; gives what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zili.training.trainer.matmul_peak", lambda *_: 1e11)
    monkeypatch.setattr(zili, "prepare", partial(zili.prepare, vocab_size=300))

    def begin(name: str, *words: object) -> str:
        # The others' models are there already.
        overrides = {key: value for key, value in TINY.items() if name == "pretrain" or key != "model.layers"}
        with monkeypatch.context() as small:
            small.setattr(zili, "train", partial(zili.train, overrides=overrides))
            small.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return begin


def test_pretrain_and_finetune(run, tmp_path: Path) -> None:
    lines = (ROOT / "examples" / "pretrain.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 15
    for folder, word in (("first", "self reliance"), ("second", "kemandirian")):
        (tmp_path / folder).mkdir()
        for number in range(30):
            (tmp_path / folder / f"{number}.txt").write_text(
                f"{number} {word} 自立 {number * 7}\n" * 20, encoding="utf-8"
            )
    assert "step 3/3" in run("pretrain", "first")
    said = run("finetune", "runs/pretrained", "second")
    assert re.search(r"has read: \d+\.\d{3} before, \d+\.\d{3} after", said)


@pytest.mark.parametrize("name", ["own_callback", "own_objective", "own_model"])
def test_of_your_own(name: str, run, recipe, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(dump_recipe(recipe()), encoding="utf-8")
    assert "step 3/3" in run(name, file)
    record = (recipe().folder / "metrics.jsonl").read_text(encoding="utf-8")
    last = [line for line in map(json.loads, record.splitlines()) if line["kind"] == "train"][-1]
    assert ("z_loss" in last) == (name == "own_objective")
    state = newest_state(recipe().folder / "checkpoints")
    own = {
        "own_objective": ("own_objective:ZLoss", "zili:Decoder"),
        "own_model": ("zili:NextToken", "own_model:OwnDecoder"),
    }
    assert state is not None and tuple(state.classes.values()) == own.get(name, ("zili:NextToken", "zili:Decoder"))
