"""What has been said so far, as the ids that an answer follows."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from zili.data.dialect import Dialect
from zili.data.tokenizer import Tokenizer


class Conversation(Protocol):
    """What a terminal or a server asks of one. When the context is full the oldest turns are left out, whole."""

    greeting: str
    new: str
    """What is said when it begins anew."""
    goes_on: bool
    """Whether an answer continues the prompt's text, in place of a turn."""
    turns: list[Any]
    tokenizer: Tokenizer
    """The model's."""

    @property
    def stop_ids(self) -> Set[int]:
        """Tokens that end an answer."""

    @property
    def stop_texts(self) -> Sequence[str]:
        """Texts that do, of a template whose marks are no tokens."""
        return ()

    def ask(self, text: str) -> None:
        """Open a turn with what the user wrote."""

    def answered(self, ids: Sequence[int]) -> None:
        """Close the open turn with the model's tokens, complete or cut short."""

    def withdraw(self) -> None:
        """Forget the open turn, which could not be answered."""
        self.turns.pop()

    def reset(self) -> None:
        """Forget everything."""
        self.turns.clear()

    def prompt(self, room: int) -> tuple[list[int], int]:
        """The ids to continue, and how many old turns were left out to bring them to at most `room`.

        The newest turn always stays; alone it may still be longer than `room`.
        """


@dataclass
class LiveDialogue(Conversation):
    """Turns of a user and an assistant, in the words of a chat template."""

    dialect: Dialect
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    """The template's own, such as enable_thinking."""
    turns: list[list[dict[str, Any]]] = field(default_factory=list)
    """Question, and answer if there is one."""
    greeting: str = "Chat. /help lists the commands."
    new: str = "A new conversation."
    goes_on: bool = False
    _opening: str = ""
    """The beginning of an answer that the prompt holds already, such as `<think>`."""

    def __post_init__(self) -> None:
        self.tokenizer = self.dialect.tokenizer

    @property
    def stop_ids(self) -> Set[int]:
        return self.dialect.end_ids

    @property
    def stop_texts(self) -> Sequence[str]:
        return self.dialect.end_texts

    def ask(self, text: str) -> None:
        self.turns.append([{"role": "user", "content": text}])

    def answered(self, ids: Sequence[int]) -> None:
        said = self._opening + self.dialect.answer_text(ids)
        self.turns[-1].append({"role": "assistant", "content": said})

    def prompt(self, room: int) -> tuple[list[int], int]:
        dropped = 0
        while len(ids := self._rendered()) > room and len(self.turns) > 1:
            self.turns.pop(0)
            dropped += 1
        self._opening = self.dialect.opening(ids)
        return ids, dropped

    def _rendered(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *(message for turn in self.turns for message in turn)]
        return self.dialect.render(messages, add_generation_prompt=True, **self.options).ids


@dataclass
class RunningText(Conversation):
    """One text that a base model continues, at the start of a document."""

    tokenizer: Tokenizer
    turns: list[list[int]] = field(default_factory=list)
    greeting: str = (
        "This is a base model: it was trained to continue text and not to answer questions.\n"
        "Write the beginning of a text and it writes on; /reset starts a new text. /help lists the commands."
    )
    new: str = "A new text."
    goes_on: bool = True

    @property
    def stop_ids(self) -> Set[int]:
        return self.tokenizer.end_ids

    def ask(self, text: str) -> None:
        # A line typed after an answer starts a line of the running text too.
        self.turns.append(self.tokenizer.encode("\n" + text if self.turns else text).tolist())

    def answered(self, ids: Sequence[int]) -> None:
        self.turns[-1] += ids

    def prompt(self, room: int) -> tuple[list[int], int]:
        dropped = 0
        while len(self.turns) > 1 and 1 + sum(map(len, self.turns)) > room:
            self.turns.pop(0)
            dropped += 1
        return [self.tokenizer.start_id, *(number for turn in self.turns for number in turn)], dropped
