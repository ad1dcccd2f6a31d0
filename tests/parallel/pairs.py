"""Pairs of answers for the tiny models: of two that are alike, the polite one was chosen."""

from __future__ import annotations

import random
from pathlib import Path

from zili.data.dialect import Dialect
from zili.data.dialogue_store import build_dialogue_store
from zili.data.dialogues import Dialogue
from zili.data.sources import Census
from zili.data.tokenizer import Tokenizer


def polite_pairs(tokenizer: Path, prefix: Path) -> str:
    """Builds a store at `prefix`; returns the override that makes a run read it."""
    draw, words = random.Random(0), ["the", "model", "trains", "on", "what", "it", "said", "and", "asks", "for", "more"]

    def line(most: int = 5) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    talks = []
    for number in range(200):
        before = [{"role": role, "content": line(3)} for role in ("user", "assistant")] if number % 3 == 0 else []
        asked, answer = [*before, {"role": "user", "content": line()}], line(3)
        chosen, rejected = ([*asked, {"role": "assistant", "content": f"{answer}{end}"}] for end in (" please", " no"))
        talks.append(Dialogue(chosen, None, f"pair {number}", rejected))
    dialect = Dialect.named("telechat2", Tokenizer.from_folder(tokenizer))
    build_dialogue_store(talks, dialect, prefix, census=Census())
    return f"data.sources=[{{store='{prefix}'}}]"
