"""A prompt's continuation as text: what `zili sample` prints and a run's report shows."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any

from zili.data.tokenizer import Tokenizer
from zili.models.decoder import Decoder
from zili.serving.generate.generation import DEFAULT_SAMPLING, FinishReason, Sampling, generate
from zili.serving.generate.text_stream import stream_text


@dataclass(frozen=True)
class Sample:
    """One continuation, with what is needed to draw it again."""

    prompt: str
    text: str
    temperature: float
    seed: int
    ended: FinishReason

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def continue_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Generator[str, None, FinishReason]:
    """Stream the text that follows `prompt` at the start of a document, up to a token that ends it.

    The prompt stands after the token that a document begins after: BOS, or the end of the one before it in training.

    Raises: ConfigError and CheckpointError as `zili.serving.generate.generation.generate`.
    """
    ids = [tokenizer.start_id, *tokenizer.encode(prompt).tolist()]
    tokens = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=tokenizer.end_ids,
        vocabulary=tokenizer.vocab_size,
    )
    return stream_text(tokenizer, tokens, before=ids)


def sample_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Sample:
    """The whole continuation at once."""
    pieces = continue_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling)
    text: list[str] = []
    while True:
        try:
            text.append(next(pieces))
        except StopIteration as end:
            return Sample(prompt, "".join(text), sampling.temperature, sampling.seed, end.value)
