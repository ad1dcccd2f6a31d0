"""What a model says to a few fixed tokens: log-probabilities by which two folders are known to be one model.

A model is run a layer at a time, each read from disk when its turn comes. So one of 115 billion parameters is probed in
the memory of its largest part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zili.config.model import ModelConfig
from zili.data.tokenizer import Tokenizer
from zili.errors import CheckpointError
from zili.models.decoder import Decoder
from zili.release.opening import OpenModel, fill_from

TEXT = "自立, to stand on one's own feet: 1 + 1 = 2. 今天的天气很好，我们去公园走走吧。"
TOLERANCE = 1e-4
"""Nats: what two computations of the same log-probability in fp32 may differ by."""
_TOKENS = 48


@dataclass(frozen=True)
class Probe:
    """Rows of ids, and what the model makes of them in fp32."""

    ids: list[list[int]]
    log_probs: list[list[float]]
    """Log-probability of each id of a row but the first, after the ids before it; nats."""
    greedy: list[list[int]]
    """The likeliest id after each id of a row."""
    text: str | None = None
    """What the first row is the tokenizer's ids of; None where there was no tokenizer."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Probe:
        """Raises `CheckpointError` for what is no probe."""
        try:
            probe = cls(**values)
            lengths = [(len(row), len(said) + 1, len(likely)) for row, said, likely in probe._rows()]
            if not lengths or any(len(set(three)) != 1 or three[0] < 2 for three in lengths):
                raise ValueError(f"rows of unlike lengths {lengths}")
            torch.tensor([value for row in probe.log_probs for value in row], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the release's probe cannot be read: {error}") from error
        return probe

    def _rows(self) -> Iterable[tuple[list[int], list[float], list[int]]]:
        return zip(self.ids, self.log_probs, self.greedy, strict=True)

    def difference(self, other: Probe) -> float:
        """Largest difference of a log-probability, nats; of the same ids."""
        pairs = zip(self.log_probs, other.log_probs, strict=True)
        found = [abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]
        return float("inf") if any(map(math.isnan, found)) else max(found)


def make_probe(model: OpenModel, tokenizer: Tokenizer | None) -> Probe:
    """Probe `model` with a text, where there is a tokenizer, and with ids from all over its vocabulary."""
    config = model.config
    length = min(_TOKENS, config.max_length)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for _ in range(2)]
    if tokenizer is None:
        return answered(model, rows, None)
    ids = [tokenizer.end_id, *tokenizer.encode(TEXT).tolist()]
    if max(ids) >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer beside {model.companions} gives id {max(ids)} and the model has {config.vocab_size}; "
            "they do not belong together"
        )
    return answered(model, [ids[: config.max_length], *rows], TEXT)


def answered(model: OpenModel, rows: list[list[int]], text: str | None) -> Probe:
    """The probe of `rows`, ids that `model` has."""
    return probe_of(rows, log_probabilities(model, rows), text)


def probe_of(rows: list[list[int]], answers: list[Tensor], text: str | None) -> Probe:
    """The probe of `rows` of S ids, to which the log-probabilities `answers`, `[S, V]` each, were given."""
    said, greedy = [], []
    for row, log_probs in zip(rows, answers, strict=True):
        after = torch.tensor(row[1:])
        said.append(log_probs[:-1].gather(1, after[:, None])[:, 0].tolist())
        greedy.append(log_probs.argmax(-1).tolist())
    return Probe(rows, said, greedy, text)


@torch.no_grad()
def log_probabilities(model: OpenModel, rows: list[list[int]]) -> list[Tensor]:
    """`[S, V]` fp32 for each row of S ids, the model read from disk a layer at a time."""
    states = [torch.tensor([row]) for row in rows]
    for number in range(model.config.layers):
        part = _part(model.config, range(number, number + 1))
        fill_from([part], model)
        states = [part(state) for state in states]
    return [logits[0].float().log_softmax(-1) for logits in states]


def _part(config: ModelConfig, layers: range) -> Decoder:
    # What only training uses is not read.
    with torch.device("meta"):
        part = Decoder(config.changed(mtp_layers=0), layers)
    part.to_empty(device="cpu")
    for buffer in part.buffers():
        buffer.zero_()
    return part.eval()
