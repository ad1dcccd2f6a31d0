"""What only Python says of a run, its objective and its kind of model, is remembered by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import zili
from zili.errors import CheckpointError
from zili.evaluation.run_record import read_run
from zili.objectives.next_token import NextToken
from zili.training.checkpoints import newest_state
from zili.training.restoring import load_model


class Mine(NextToken):
    """An objective of one's own."""


class OwnDecoder(zili.Decoder):
    """A kind of model whose weights have the names of Zili's."""


GIVEN: dict[str, Any] = {"objective": Mine(), "model": OwnDecoder}


@pytest.fixture
def run(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one step, by both."""
    monkeypatch.setattr("zili.training.trainer.matmul_peak", lambda *_: 1e11)
    return zili.train(recipe("training.steps=1"), progress=False, **GIVEN).config.folder


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "was trained with objective=test_given:Mine, and this run has zili:NextToken; give the same"),
        ({"objective": Mine()}, r"model=test_given:OwnDecoder, and this run has zili:Decoder; .*zili.train\(model="),
        ({"objective": NextToken(), "model": OwnDecoder}, "objective=test_given:Mine"),
    ],
)
def test_going_on_without_it_or_with_another_is_refused(given: Any, said: str, run: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        zili.train(run, overrides={"training.steps": 2}, progress=False, **given)
    assert zili.train(run, overrides={"training.steps": 2}, progress=False, **GIVEN).step == 2


def test_commands_say_what_they_lack(run: Path, recipe: Any, tmp_path: Path) -> None:
    state = newest_state(run / "checkpoints")
    assert state is not None and state.classes == {"objective": "test_given:Mine", "model": "test_given:OwnDecoder"}
    said = r"model=test_given:OwnDecoder, which was given to zili.train, and .*load_model\(run, OwnDecoder\)"
    for opens in (
        lambda: zili.generate(run, "it", chip="cpu"),
        lambda: zili.evaluate(run, [Path(__file__)], chip="cpu"),
        lambda: zili.export(run, tmp_path / "release"),
        lambda: load_model(run),
    ):
        with pytest.raises(CheckpointError, match=said):
            opens()
    assert type(load_model(run, OwnDecoder)) is OwnDecoder
    (told,) = [note for note in read_run(run).notes if note.startswith("given in Python")]
    assert told.endswith("objective=test_given:Mine, model=test_given:OwnDecoder")
    after = ("training.steps=1", f"training.start_from={run}", f"folder={tmp_path / 'after'}")
    assert zili.train(recipe(*after), progress=False, model=OwnDecoder).step == 1
