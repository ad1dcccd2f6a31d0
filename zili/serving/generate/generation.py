"""Token by token generation with a key/value cache.

One rule for the context: prompt and answer together hold at most the model's `max_length` tokens. A prompt
that leaves no room is refused, and generation ends when the room is used up; nothing is dropped silently.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from zili.errors import CheckpointError, ConfigError

_COLDEST = 1e-5
"""Temperatures below are 0: logits divided by them would not be numbers."""
_MOSTLY = 512
"""Tokens that nearly always have all the mass of a nucleus."""
PREFILL_CHUNK = 512
"""Prompt tokens a forward pass: a whole long prompt's logits over a large vocabulary would take gigabytes."""

StopReason = Literal["stop", "length", "context"]
"""A stop token, `max_new_tokens`, or a full context."""


class CausalModel(Protocol):
    """What generation asks of a model; `zili.load` gives it."""

    @property
    def config(self) -> Any: ...
    def parameters(self) -> Iterator[Tensor]: ...
    def new_cache(self, batch: int, max_length: int) -> Any: ...
    def __call__(self, input_ids: Tensor, *, cache: Any) -> Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    `temperature` 0 takes the likeliest. `top_p` is nucleus sampling (Holtzman et al. 2020, section 3.1), 1
    keeps all. `top_k` 0 keeps all. `min_p` keeps tokens of so large a share of the likeliest one's probability
    (Nguyen et al. 2024), 0 all. `repetition_penalty` is that of CTRL (Keskar et al. 2019, section 4.1), 1 leaves the
    logits alone; it counts prompt and answer. `frequency_penalty` and `presence_penalty` are OpenAI's: taken from a
    token's logit for each time it is in the answer so far, and once if it is. The same `seed` gives the same tokens
    for the same logits on every chip: the draw itself is always made on the CPU.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether each token is the likeliest as the model has it."""
        penalised = self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        return self.temperature == 0 and not penalised

    def checked(self) -> Self:
        """Itself, or ConfigError naming the setting that cannot be used."""
        limits = [
            (self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (all) or more"),
            (self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0"),
            (0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (all) to 1"),
        ]
        for holds, name, value, wanted in limits:
            if not holds:
                raise ConfigError(f"{name} is {value}; it must be {wanted}")
        return self


DEFAULT_SAMPLING = Sampling()


def generate(
    model: CausalModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = DEFAULT_SAMPLING,
    stop_ids: Collection[int] = (),
    vocabulary: int | None = None,
) -> Generator[int, None, StopReason]:
    """Yield token ids that continue `prompt_ids`, one by one, and return why it ended.

    Args:
        prompt_ids: at least one token, fewer than the model's `max_length`.
        stop_ids: tokens that end the answer; they are not yielded.
        vocabulary: tokens the tokenizer knows; rows of the model beyond it are padding and are never drawn.
    Raises:
        ConfigError: an unusable setting, an empty prompt, one that leaves no room for an answer, or with a token that
            the model does not know.
        CheckpointError: the model's logits are not numbers.
    """
    room = room_for_answer(model, len(prompt_ids))
    check_known(prompt_ids, int(model.config.vocab_size))
    tokens = _tokens(model, prompt_ids, min(max_new_tokens, room), sampling.checked(), vocabulary)
    return _until_stop(tokens, stop_ids, "length" if max_new_tokens <= room else "context")


def check_known(ids: Sequence[int], vocabulary: int) -> None:
    """Raises: ConfigError, an id has no weights in the model: its tokenizer may have tokens beyond."""
    beyond = max(ids, default=0)
    if beyond >= vocabulary:
        raise ConfigError(f"token {beyond} is not the model's: it knows {vocabulary}")


def room_for_answer(model: CausalModel, prompt_tokens: int) -> int:
    """Tokens left in the context after a prompt of so many; ConfigError if there are none."""
    limit = int(model.config.max_length)
    if prompt_tokens < 1:
        raise ConfigError("generation needs at least one token to start from; give the end-of-text token")
    if prompt_tokens >= limit:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens and the model's context holds {limit}, answer included; "
            f"shorten the prompt by {prompt_tokens - limit + 1} tokens or more"
        )
    return limit - prompt_tokens


def _until_stop(
    tokens: Iterator[int], stop_ids: Collection[int], otherwise: StopReason
) -> Generator[int, None, StopReason]:
    for token in tokens:
        if token in stop_ids:
            return "stop"
        yield token
    return otherwise


def _tokens(
    model: CausalModel, prompt_ids: Sequence[int], count: int, sampling: Sampling, vocabulary: int | None
) -> Iterator[int]:
    random = torch.Generator().manual_seed(sampling.seed)
    cache = model.new_cache(1, len(prompt_ids) + count)
    seen = list(prompt_ids)
    fresh: Sequence[int] = prompt_ids
    for _ in range(count):
        token = draw(_last_logits(model, fresh, cache)[:vocabulary], seen, sampling, random, prompt=len(prompt_ids))
        yield token
        seen.append(token)
        fresh = [token]


@torch.no_grad()
def _last_logits(model: CausalModel, ids: Sequence[int], cache: Any) -> Tensor:
    """Logits `[V]` fp32 on the CPU after feeding `ids`, in pieces, to the cache."""
    device = next(model.parameters()).device
    logits = torch.empty(0)
    for piece in torch.tensor([list(ids)], dtype=torch.int64, device=device).split(PREFILL_CHUNK, dim=1):
        logits = model(piece, cache=cache)[0, -1]
    return logits.float().cpu()


def draw(logits: Tensor, seen: Sequence[int], sampling: Sampling, random: torch.Generator, *, prompt: int = 0) -> int:
    """One token from `logits [V]` (fp32, CPU); of the tokens `seen` the first `prompt` are the prompt's."""
    if not torch.isfinite(logits.max()):  # NaN, where there is one
        raise CheckpointError(
            "the model's logits are not numbers (NaN, or infinite): its weights have diverged or were damaged; "
            "take an earlier checkpoint"
        )
    if sampling.repetition_penalty != 1.0:
        logits = _penalised(logits, seen, sampling.repetition_penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        logits = _lowered(logits, seen[prompt:], sampling)
    if sampling.temperature < _COLDEST:
        return int(logits.argmax())
    scores = logits / sampling.temperature
    if sampling.min_p:
        scores = scores.masked_fill(scores < scores.max() + math.log(sampling.min_p), -torch.inf)
    scores = _likeliest(scores, sampling.top_k, sampling.top_p)
    # One random number and the sum up to each token: `torch.multinomial` draws one for every token of the vocabulary.
    below = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    share = 1 - torch.rand(1, generator=random, dtype=torch.float64)  # above 0: a token without mass is never hit
    return int(torch.searchsorted(below, share * below[-1]))


def _penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Logits of tokens already seen, moved down: divided where positive, multiplied where negative."""
    ids = torch.tensor(sorted({i for i in seen if i < len(logits)}), dtype=torch.int64)
    old = logits[ids]
    return logits.index_copy(0, ids, torch.where(old > 0, old / penalty, old * penalty))


def _lowered(logits: Tensor, said: Sequence[int], sampling: Sampling) -> Tensor:
    """Logits of tokens in the answer, by how often they are there."""
    ids, counts = torch.tensor([i for i in said if i < len(logits)], dtype=torch.int64).unique(return_counts=True)
    return logits.index_add(0, ids, -(sampling.frequency_penalty * counts + sampling.presence_penalty).to(logits.dtype))


def _likeliest(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """`scores [V]` with everything outside the `top_k` and the nucleus of mass `top_p` at minus infinity."""
    if 0 < top_k < len(scores):
        kept = scores.topk(top_k)
        scores = torch.full_like(scores, -torch.inf).index_copy(0, kept.indices, kept.values)
    if top_p < 1:
        probabilities = scores.softmax(-1)
        # To put a whole vocabulary in order takes as long as some layers; mostly a few have the mass.
        top = probabilities.topk(min(_MOSTLY, len(scores)))
        if top.values.sum() < top_p:
            top = probabilities.topk(len(scores))
        # A token stays while the mass before it is short of top_p: the likeliest one always does.
        stays = top.values.cumsum(-1) - top.values < top_p
        stays[0] = True  # also where top_p is too small for fp32
        nucleus = top.indices[stays]
        scores = torch.full_like(scores, -torch.inf).index_copy(0, nucleus, scores[nucleus])
    return scores
