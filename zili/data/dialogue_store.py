"""Conversations as a token store: each rendered whole, with a mask of what the assistant says.

A pair is two documents, the chosen first; learned is what the assistant says from the turn on in which they part.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path

from zili.data.building import StoreWriter
from zili.data.dialect import Dialect, Rendered
from zili.data.dialogues import Dialogue, read_dialogues
from zili.data.faithful import to_learn
from zili.data.reading import OnError
from zili.data.sources import Census
from zili.data.split import Split
from zili.durable import whole_folder
from zili.errors import DataError
from zili.plurals import counted

_TOLD_NAMES = 50
"""Names of keys that were not used; files whose keys are data have more of them than anyone reads."""


@dataclass(frozen=True)
class DialogueReport:
    """What was built of conversations."""

    dialogues: int
    pairs: bool
    """Whether each has a chosen and a rejected answer; tokens are those of both."""
    tokens: int
    learned: int
    """Tokens that the assistant says."""
    longest: int
    """Tokens of the longest."""
    seconds: float
    left_out: str
    thoughtless: int = 0
    """Earlier answers that are in a conversation and not learned: the template drops the thoughts that led to them."""

    def __str__(self) -> str:
        return (
            f"{counted(self.dialogues, 'pair' if self.pairs else 'conversation')}, {counted(self.tokens, 'token')}, "
            f"{self.learned:,} of them learned ({100 * self.learned / self.tokens:.0f} %), the longest "
            f"{self.longest:,}, in {self.seconds:.1f} s; left out: {self.left_out}"
            + (
                f"; {counted(self.thoughtless, 'earlier answer')} NOT LEARNED, whose thoughts the template leaves out"
                if self.thoughtless
                else ""
            )
        )


def build_dialogue_store(
    dialogues: Iterable[Dialogue],
    dialect: Dialect,
    prefix: str | Path,
    *,
    census: Census,
    on_error: OnError = "raise",
    split: str = "all conversations",
) -> DialogueReport:
    """Render `dialogues` into `prefix.bin`, `.mask`, `.idx` and `.json`; they appear whole or not at all.

    Raises:
        DataError: none there, some of them pairs and some not, or one that the template cannot say whole, or both of a
            pair the same (counted in `census` instead with on_error "skip").
    """
    started = time.perf_counter()
    learned = longest = number = thoughtless = 0
    pairs = False
    with StoreWriter(Path(prefix), dialect.tokenizer, masked=True) as writer:
        for dialogue in dialogues:
            if number and pairs != (dialogue.rejected is not None):
                raise DataError(f"{dialogue.place}: pairs and conversations in one store; make a store of each.")
            pairs = dialogue.rejected is not None
            try:
                documents, dropped = _rendered(dialogue, dialect)
            except DataError as error:
                if on_error == "raise":
                    raise DataError(f"{dialogue.place}: {error}") from error
                census.skipped[getattr(error, "reason", "that the template cannot say")] += 1
                continue
            number += 1
            thoughtless += dropped
            for document in documents:
                writer.add_masked(document.ids, document.said)
                learned += sum(document.said)
            longest = max(longest, sum(len(document.ids) for document in documents))
        if not learned:
            raise DataError(
                f"{Path(prefix).name}: nothing to learn: no conversation came here that {dialect.name} can say whole; "
                f"left out: {census.left_out}."
            )
        writer.finish(0, census, split, pairs=pairs)
    seconds = time.perf_counter() - started
    return DialogueReport(number, pairs, writer.tokens, learned, longest, seconds, census.left_out, thoughtless)


def _rendered(dialogue: Dialogue, dialect: Dialect) -> tuple[list[Rendered], int]:
    """The documents of a conversation or a pair, and how many answers in them are not learned for want of thoughts."""
    talks = [dialogue.messages, *([] if dialogue.rejected is None else [dialogue.rejected])]
    made = [dialect.render(talk, tools=dialogue.tools, **dialogue.options) for talk in talks]
    if len(made) == 2 and made[0].ids == made[1].ids:
        raise DataError(f"{dialect.name} says the chosen and the rejected answer alike")
    checked = [to_learn(one, talk, dialogue, dialect) for one, talk in zip(made, talks, strict=True)]
    documents = [one.rendered for one in checked]
    if len(documents) == 1:
        return documents, checked[0].thoughtless
    chosen, rejected = documents
    apart = next(i for i, (a, b) in enumerate(zip_longest(chosen.ids, rejected.ids)) if a != b)
    # Of answers before that one nothing is learned anyway.
    return [_learned_from(apart, document) for document in documents], 0


def _learned_from(apart: int, document: Rendered) -> Rendered:
    """Turns before the one with token `apart` are in both, and their likelihoods cancel."""
    begin = min(apart, len(document.said))
    while begin and document.said[begin - 1]:
        begin -= 1
    turn = next((turn for turn in document.turns if turn.stop > apart), None)
    if not any(document.said[begin : turn.stop if turn else None]):
        raise DataError("the two answers part where the assistant says nothing that is learned")
    return Rendered(document.ids, [False] * begin + document.said[begin:])


def split_and_build(
    files: Sequence[Path],
    dialect: Dialect,
    folder: Path,
    *,
    held_out: float = 0.0,
    on_error: OnError = "raise",
) -> list[str]:
    """Stores `train`, and `held_out` of a share of the conversations chosen by what is said, with the tokenizer and its
    template beside them; returns a line on each. A conversation that is there twice is on one side.

    Raises:
        DataError: as `build_dialogue_store`; or `folder` is there already. Nothing is left of it then.
    """
    split = Split.of(held_out) if held_out else None
    lines = []
    unread: Counter[str] = Counter()
    with whole_folder(folder, DataError) as aside:
        for name in ("train", "held_out") if split else ("train",):
            census = Census()
            chosen = (
                _counting(dialogue, dialect, unread)
                for dialogue in read_dialogues(files, on_error=on_error, census=census)
                if split is None or split.holds_out(_said(dialogue)) == (name == "held_out")
            )
            rule = f"{name}: {split.rule}" if split else "all conversations"
            report = build_dialogue_store(chosen, dialect, aside / name, census=census, on_error=on_error, split=rule)
            lines.append(f"{folder / name}: {report}")
        dialect.tokenizer.save(aside / "tokenizer")
        (aside / "tokenizer" / "chat_template.jinja").write_text(dialect.template.source, encoding="utf-8")
    # Every reading is of all conversations, whichever side they are on; a side has its own options.
    if unused := census.unused + unread:
        told = sorted(unused.most_common(_TOLD_NAMES))
        more = f", and {len(unused) - len(told):,} more names" if len(unused) > len(told) else ""
        lines.append(f"in the records and not used: {', '.join(f'{key} ({count:,})' for key, count in told)}{more}")
    return lines


def _counting(dialogue: Dialogue, dialect: Dialect, unread: Counter[str]) -> Dialogue:
    """`dialogue`, after counting its options that the template does not look up."""
    unread.update(f"chat_template_kwargs.{name}" for name in dialogue.options if name not in dialect.template.asks_for)
    return dialogue


def _said(dialogue: Dialogue) -> str:
    """The text that decides on which side of the split a conversation is. Pairs of one question share it."""
    messages = dialogue.messages
    if dialogue.rejected is not None:
        both = zip(messages, dialogue.rejected, strict=False)
        messages = [chosen for chosen, _ in takewhile(lambda turns: turns[0] == turns[1], both)]
    return json.dumps(messages, sort_keys=True, ensure_ascii=False)
