"""A conversation as token ids: turns, the template's special ids, and the rule for a full context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from zili.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """Ids of `<_user>`, `<_bot>` and `<_end>`: `<_user>question<_bot>answer<_end>`, one turn after another.

    The ids are put between the encoded texts. Encoding a whole string with the marks in it would let a user
    who types `<_bot>` speak for the model, and some of the family's tokenizers do not map the marks at all.
    """

    user: int
    bot: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Template | None:
        """The tokenizer's template, or None when it lacks one of the three specials."""
        names = ("<_user>", "<_bot>", "<_end>")
        if not all(name in tokenizer.special_tokens for name in names):
            return None
        return cls(*(tokenizer.special_id(name) for name in names))


@dataclass
class Conversation:
    """The turns so far. Without a template it is one running text that the model continues.

    When the context is full the oldest turns are left out, whole, and `prompt` says how many.
    """

    tokenizer: Tokenizer
    template: Template | None = None
    turns: list[list[int]] = field(default_factory=list)

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer."""
        chat = {self.template.end, self.template.user} if self.template else set()
        return {self.tokenizer.end_id, *chat}

    def ask(self, text: str) -> None:
        """Open a turn with what the user wrote."""
        if self.template:
            turn = [self.template.user, *self._encoded(text), self.template.bot]
        else:
            # A line typed after an answer starts a line of the running text too.
            turn = self._encoded("\n" + text if self.turns else text)
        self.turns.append(turn)

    def answered(self, ids: Sequence[int]) -> None:
        """Close the open turn with the model's tokens, complete or cut short."""
        self.turns[-1] += [*ids, *([self.template.end] if self.template else [])]

    def withdraw(self) -> None:
        """Forget the open turn, which could not be answered."""
        self.turns.pop()

    def reset(self) -> None:
        """Forget everything."""
        self.turns.clear()

    def _encoded(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text)]

    def prompt(self, room: int) -> tuple[list[int], int]:
        """The ids to continue, and how many old turns were left out to bring them to at most `room`.

        The newest turn always stays; alone it may still be longer than `room`.
        """
        before = [] if self.template else [self.tokenizer.end_id]
        dropped = 0
        while len(self.turns) > 1 and len(before) + sum(map(len, self.turns)) > room:
            self.turns.pop(0)
            dropped += 1
        return before + [i for turn in self.turns for i in turn], dropped
