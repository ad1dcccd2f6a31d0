"""How a model answers conversations whose last answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zili.data.dialect import Dialect
from zili.data.dialogues import Dialogue
from zili.errors import DataError
from zili.models.decoder import Decoder
from zili.ops import IGNORE_INDEX
from zili.serving.generate.generation import Sampling, generate

_GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class AnswerScore:
    """How a file of conversations is answered."""

    name: str
    answered: int
    exact: int
    """Greedy answers that are the known one, spaces around them aside."""
    loss: float
    """Mean negative log-probability of a token of the known answers, nats."""
    left_out: int
    """Too long for the model's context."""

    @property
    def share(self) -> float:
        return self.exact / self.answered

    @property
    def error(self) -> float:
        """Standard error of the share."""
        return math.sqrt(self.share * (1 - self.share) / self.answered)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "error": self.error}


@torch.no_grad()
def score_answers(
    model: Decoder,
    dialect: Dialect,
    dialogues: Iterable[Dialogue],
    name: str,
    *,
    max_new_tokens: int = 256,
    progress: Callable[[int], None] | None = None,
) -> AnswerScore:
    """Ask each conversation up to its last turn, greedily, and compare with that turn.

    Raises:
        DataError: none fits the context.
    """
    answered = exact = left_out = tokens = 0
    loss = 0.0
    for dialogue in dialogues:
        if dialogue.messages[-1].get("tool_calls"):
            raise DataError(f"{dialogue.place}: its last answer calls a tool; texts alone are compared here")
        known = str(dialogue.messages[-1]["content"]).strip()
        ids = dialect.tokenizer.encode(known).tolist()
        turns = dialogue.messages[:-1]
        given = {"tools": dialogue.tools, "add_generation_prompt": True, **dialogue.options}
        asked = dialect.render(turns, **given).ids
        if len(asked) + len(ids) > model.config.max_length:
            left_out += 1
            continue
        answered += 1
        said = generate(model, asked, max_new_tokens=max_new_tokens, sampling=_GREEDY, stop_ids=dialect.end_ids)
        exact += dialect.answer_text(said).strip() == known
        loss, tokens = loss + _loss_after(model, asked, ids), tokens + len(ids)
        if progress is not None:
            progress(answered)
    if not answered:
        raise DataError(
            f"{name}: none of {left_out} conversations fits the model's context of {model.config.max_length}"
        )
    return AnswerScore(name, answered, exact, loss / tokens, left_out)


def _loss_after(model: Decoder, prompt: list[int], ids: list[int]) -> float:
    """Summed negative log-probability of `ids` after `prompt`, nats."""
    whole = [*prompt, *ids]
    labels = torch.full((1, len(whole) - 1), IGNORE_INDEX)
    labels[0, len(prompt) - 1 :] = torch.tensor(ids)
    device = model.head_weight.device
    return float(model.loss_sum(torch.tensor([whole[:-1]], device=device), labels.to(device)))
