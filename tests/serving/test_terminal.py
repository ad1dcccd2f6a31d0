"""Chat line by line: commands, greetings, Ctrl-C, and a context that fills up."""

from __future__ import annotations

import pytest

from zili.data.dialect import Dialect
from zili.data.tokenizer import Tokenizer
from zili.models.decoder import Decoder
from zili.serving.generate import terminal
from zili.serving.generate.conversation import Conversation, LiveDialogue, RunningText
from zili.serving.generate.generation import Sampling
from zili.serving.generate.terminal import Chat, typed_text


class Recorded(Chat):
    """A chat that keeps what it would print."""

    def __init__(self, model: Decoder, conversation: Conversation, **how) -> None:
        self.written: list[str] = []
        self.noted: list[str] = []
        super().__init__(model, conversation, write=self.written.append, note=self.noted.append, **how)

    @property
    def text(self) -> str:
        return "".join(self.written)


@pytest.fixture
def chat(model: Decoder, tokenizer: Tokenizer) -> Recorded:
    return Recorded(model, RunningText(tokenizer), max_new_tokens=5, sampling=Sampling(0))


def test_a_base_model_says_so_and_continues(chat: Recorded) -> None:
    chat.run(iter(["hello\n", "\n", "/exit\n", "never read\n"]))
    assert "base model" in chat.noted[0]
    assert len(chat.conversation.turns) == 1
    assert chat.text.endswith("\n") and len(chat.text) > 1


def test_a_chat_model_is_greeted_as_one(model: Decoder, tokenizer: Tokenizer) -> None:
    chat = Recorded(model, LiveDialogue(Dialect.named("telechat2", tokenizer)), max_new_tokens=3)
    chat.run(iter(["hello"]))
    assert "base model" not in chat.noted[0]
    assert chat.conversation.turns[0][-1]["role"] == "assistant"


def test_commands(chat: Recorded) -> None:
    assert chat.handle("hello") and chat.handle("/reset")
    assert chat.conversation.turns == [] and chat.noted[-1] == "A new text."
    assert chat.handle("/help") and "/reset" in chat.noted[-1]
    assert chat.handle("/hepl") and "no command /hepl" in chat.noted[-1]
    assert chat.handle(" /exit") and len(chat.conversation.turns) == 1  # text, for its leading space
    assert chat.handle("/usr/bin") and len(chat.conversation.turns) == 2
    assert not chat.handle("/exit") and not chat.handle("/quit")


def test_the_same_lines_give_the_same_answers(model: Decoder, tokenizer: Tokenizer) -> None:
    def talk() -> str:
        chat = Recorded(model, RunningText(tokenizer), max_new_tokens=8, sampling=Sampling(1.0, seed=3))
        chat.run(iter(["hello", "hello"]))
        return chat.text

    assert talk() == talk()


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(chat: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args, **how):
        yield 70
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "generate", interrupted)
    assert chat.handle("hello")
    assert chat.noted[-1] == "Stopped." and chat.conversation.turns[-1][-1] == 70
    monkeypatch.undo()
    assert chat.handle("go on") and len(chat.conversation.turns) == 2


def test_a_full_context_forgets_the_oldest_turns(chat: Recorded) -> None:
    for _ in range(12):
        chat.handle("hello world, hello")
    assert any("oldest" in note and "64 tokens" in note for note in chat.noted)


def test_a_line_too_long_is_refused_and_forgotten(chat: Recorded) -> None:
    assert chat.handle("hello " * 100)
    assert "shorten the prompt" in chat.noted[-1] and chat.conversation.turns == []
    assert chat.handle("hello") and len(chat.conversation.turns) == 1


def test_a_cut_answer_says_why(chat: Recorded, model: Decoder, tokenizer: Tokenizer) -> None:
    chat.handle("hello")
    assert "Cut after 5 tokens" in chat.noted[-1]
    long = Recorded(model, RunningText(tokenizer), max_new_tokens=500, sampling=Sampling(0))
    long.handle("hello")
    assert "context of 64 tokens was full" in long.noted[-1]


def test_keyboard_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["a", KeyboardInterrupt(), "b", EOFError()])

    def fake_input(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", fake_input)
    noted: list[str] = []
    assert list(terminal.typed_lines("> ", noted.append)) == ["a", "b"]
    assert "/exit" in noted[0]


def test_broken_input_can_be_encoded(tokenizer: Tokenizer) -> None:
    for text in ("a\udc80b", "\ud800", "中"):
        tokenizer.encode(typed_text(text))
    assert typed_text("中文") == "中文"
