"""Conversations as a token store: each rendered whole, with a mask of what the assistant says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zili.data.building import StoreWriter
from zili.data.chat import ChatTemplate
from zili.data.dialogues import Dialogue, read_dialogues
from zili.data.reading import OnError
from zili.data.sources import Census
from zili.data.split import Split
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError


@dataclass(frozen=True)
class DialogueReport:
    """What was built of conversations."""

    dialogues: int
    tokens: int
    learned: int
    """Tokens that the assistant says."""
    longest: int
    """Tokens of the longest."""
    seconds: float
    left_out: str

    def __str__(self) -> str:
        return (
            f"{self.dialogues:,} conversations, {self.tokens:,} tokens, {self.learned:,} of them learned "
            f"({100 * self.learned / self.tokens:.0f} %), the longest {self.longest:,}, in {self.seconds:.1f} s; "
            f"left out: {self.left_out}"
        )


def build_dialogue_store(
    dialogues: Iterable[Dialogue],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prefix: str | Path,
    *,
    census: Census,
    on_error: OnError = "raise",
    split: str = "all conversations",
    progress: Callable[[int], None] | None = None,
) -> DialogueReport:
    """Render `dialogues` into `prefix.bin`, `.mask`, `.idx` and `.json`; they appear whole or not at all.

    Raises:
        DataError: none there, or one that the template cannot say (counted in `census` instead with on_error "skip").
    """
    started = time.perf_counter()
    learned = 0
    with StoreWriter(Path(prefix), tokenizer, masked=True) as writer:
        for dialogue in dialogues:
            try:
                rendered = template.render(tokenizer, dialogue.messages, tools=dialogue.tools)
            except DataError as error:
                if on_error == "raise":
                    raise DataError(f"{dialogue.place}: {error}") from error
                census.skipped["that the template cannot say"] += 1
                continue
            writer.add_masked(rendered.ids, rendered.said)
            learned += sum(rendered.said)
            if progress is not None and len(writer.lengths) % 100 == 0:
                progress(len(writer.lengths))
        if not learned:
            raise DataError(
                f"{prefix}: nothing to learn: {template.name} marks nothing that the assistant says "
                "({% generation %} in the template does), or there were no conversations."
            )
        writer.finish(0, census, split)
    seconds = time.perf_counter() - started
    return DialogueReport(len(writer.lengths), writer.tokens, learned, max(writer.lengths), seconds, census.left_out)


def split_and_build(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    folder: Path,
    *,
    held_out: float = 0.0,
    on_error: OnError = "raise",
) -> list[str]:
    """Stores `train`, and `held_out` of a share of the conversations chosen by what is said, with the tokenizer and its
    template beside them; returns a line on each. A conversation that is there twice is on one side.

    Raises:
        DataError: as `build_dialogue_store`.
    """
    split = Split.of(held_out) if held_out else None
    lines = []
    for name in ("train", "held_out") if split else ("train",):
        census = Census()
        chosen = (
            dialogue
            for dialogue in read_dialogues(files, on_error=on_error, census=census)
            if split is None or split.holds_out(_said(dialogue)) == (name == "held_out")
        )
        rule = f"{name}: {split.rule}" if split else "all conversations"
        report = build_dialogue_store(
            chosen, tokenizer, template, folder / name, census=census, on_error=on_error, split=rule
        )
        lines.append(f"{folder / name}: {report}")
    tokenizer.save(folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    return lines


def _said(dialogue: Dialogue) -> str:
    return json.dumps(dialogue.messages, sort_keys=True, ensure_ascii=False)
