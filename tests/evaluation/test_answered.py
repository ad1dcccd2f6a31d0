"""What is asked of a model before its answers are compared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from zili.data.dialect import Dialect
from zili.data.dialogues import Dialogue
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError
from zili.evaluation import answers

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}


def score(monkeypatch: pytest.MonkeyPatch, dialogue: Dialogue) -> list[list[int]]:
    """The prompts of a model that says nothing."""
    asked: list[list[int]] = []
    model = SimpleNamespace(config=SimpleNamespace(max_length=4096))
    monkeypatch.setattr(answers, "generate", lambda _, prompt, **__: asked.append(prompt) or [])
    monkeypatch.setattr(answers, "_loss_after", lambda *_: 1.0)
    tokenizer = Tokenizer.train(["2+2? 4"] * 9, 300)
    answers.score_answers(cast(Any, model), Dialect.named("telechat3-coder", tokenizer), [dialogue], "talk")
    return asked


def test_a_last_answer_that_calls_a_tool_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="line 3: its last answer calls a tool"):
        score(monkeypatch, Dialogue([USER, CALL], None, "line 3"))


def test_the_template_s_options_are_those_of_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    thinking = score(monkeypatch, Dialogue([USER, ANSWER], None, "line 1"))
    without = score(monkeypatch, Dialogue([USER, ANSWER], None, "line 1", options={"enable_thinking": False}))
    assert thinking != without
