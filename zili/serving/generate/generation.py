"""Token by token generation: what is asked, how a token is drawn, and the step that `generate` and the engine take.

A step is one forward pass over what every sequence has next: a token of those that answer, a chunk of the prompt of
those that begin (chunked prefill). `generate` takes it with one sequence, `Engine` with many.

One rule for the context: prompt and answer together hold at most the model's `max_length` tokens. A prompt
that leaves no room is refused, and generation ends when the room is used up; nothing is dropped silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from zili.errors import CheckpointError, ConfigError
from zili.models.cache import Chunk, KeyValueCache
from zili.models.decoder import Decoder

_COLDEST = 1e-5
"""Temperatures below are 0: logits divided by them would not be numbers."""
_MOSTLY = 512
"""Tokens that nearly always have all the mass of a nucleus."""
PREFILL_CHUNK = 512
"""Prompt tokens a forward pass: a whole long prompt's hidden states would take gigabytes."""

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""A stop token, `max_new_tokens`, a full context, or nobody waits for it any more."""


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


class Guide(Protocol):
    """What one answer may say next."""

    @property
    def ready(self) -> bool:
        """Whether `allowed` does not wait: the others' answers go on until it is."""

    def allowed(self, scores: Tensor) -> Tensor:
        """`scores [V]`, minus infinity where a token may not come. Raises ZiliError, none may."""

    def accept(self, token: int) -> None:
        """It has come."""

    def close(self) -> None:
        """The answer has ended."""


class Token(NamedTuple):
    """One token of an answer, or of a prompt whose log-probabilities were asked for."""

    id: int
    log_probability: float | None
    """Under the model itself: before temperature and cuts. None where none was asked for, and of a first token."""
    likeliest: dict[int, float]
    """The most probable tokens in its place, as many as were asked for."""


@dataclass(frozen=True)
class Ask:
    """What is to be continued, and how."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = DEFAULT_SAMPLING
    stop_ids: Collection[int] = ()
    log_probabilities: int | None = None
    """Tell each token's, and those of so many likeliest ones."""
    of_prompt: bool = False
    """Tell those of the prompt's tokens as well."""
    bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of tokens."""
    guide: Callable[[], Guide] | None = None
    """Makes what holds the answer to a form, its end included."""
    min_new_tokens: int = 0
    """Before so many no stop token is drawn."""

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest as the model has it."""
        return self.sampling.plain and not self.bias and self.guide is None and not self.min_new_tokens

    def check(self, vocabulary: int, context: int) -> None:
        """Raises: ConfigError, it cannot be answered by a model that knows `vocabulary` tokens, in this context."""
        self.sampling.checked()
        if not self.prompt:
            raise ConfigError("generation needs at least one token to start from; give the end-of-text token")
        if (beyond := max(self.prompt)) >= vocabulary:  # the tokenizer may have tokens that have no weights
            raise ConfigError(f"token {beyond} is not the model's: it knows {vocabulary}")
        if (excess := len(self.prompt) - context + (self.max_new_tokens > 0)) > 0:
            raise ConfigError(
                f"the prompt has {len(self.prompt)} tokens and the context holds {context}, answer included; "
                f"shorten the prompt by {excess} tokens or more"
            )


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = DEFAULT_SAMPLING,
    stop_ids: Collection[int] = (),
    vocabulary: int | None = None,
) -> Generator[int, None, FinishReason]:
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
    ask = Ask(prompt_ids, max_new_tokens, sampling, stop_ids)
    ask.check(model.config.vocab_size, model.config.max_length)
    return _alone(model, ask, vocabulary)


def _alone(model: Decoder, ask: Ask, vocabulary: int | None) -> Generator[int, None, FinishReason]:
    """One sequence, step by step, in a cache of its own."""
    context = model.config.max_length
    cache = model.new_cache(1, min(context, len(ask.prompt) + ask.max_new_tokens))
    steps, sequence = Steps(model, cache, PREFILL_CHUNK, vocabulary), ActiveSequence(ask)
    while sequence.finished is None:
        for _, scores in steps.step([sequence]):
            if (token := sequence.say(scores, context)) is not None:
                yield token.id
    return sequence.finished


# ---- a step


class Scores(NamedTuple):
    """What a sequence's next token is drawn of."""

    logits: Tensor
    """`[V]` fp32, on the CPU."""
    highest: float
    likeliest: int


class ActiveSequence:
    """One sequence: its tokens, how many of them are computed, and how its next token is drawn."""

    def __init__(self, ask: Ask, slot: int = 0, computed: int = 0) -> None:
        """`slot`: its place in the cache, which has the keys of its first `computed` tokens."""
        self.ask, self.slot, self.computed = ask, slot, computed
        self.ids = list(ask.prompt)
        """Prompt and answer so far."""
        self.prompt: list[Token] = []
        """The prompt's tokens, where their log-probabilities are asked for."""
        self.guide: Guide | None = None
        self.finished: FinishReason | None = None
        self._random = torch.Generator().manual_seed(ask.sampling.seed)
        self._bias: Tensor | None = None

    @property
    def said(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.ask.prompt)

    def say(self, scores: Scores, context: int) -> Token | None:
        """Draw the next token and append it; None: the answer has ended before it. `finished` is set with the last.

        Raises: CheckpointError, the logits are not numbers; ZiliError, the guide allows none.
        """
        ask = self.ask
        if self.said >= ask.max_new_tokens:  # of 0
            self.finished = "length"
            return None
        plainly = ask.greedy and math.isfinite(scores.highest)
        id_ = scores.likeliest if plainly else self._draw(scores.logits)
        if id_ in ask.stop_ids:
            self.finished = "stop"
            return None
        token = _token(ask, id_, scores.logits)
        self.ids.append(id_)
        if self.said >= ask.max_new_tokens:
            self.finished = "length"
        elif len(self.ids) >= context:
            self.finished = "context"
        return token

    def _draw(self, logits: Tensor) -> int:
        ask, guide = self.ask, self.guide
        if ask.bias and self._bias is None:
            self._bias = _bias(ask, len(logits))
        scores = logits if self._bias is None else logits + self._bias
        if self.said < ask.min_new_tokens:
            early = torch.tensor([id_ for id_ in ask.stop_ids if id_ < len(scores)], dtype=torch.int64)
            scores = scores.index_fill(0, early, -math.inf)
        if guide is not None:
            scores = guide.allowed(scores)
        token = draw(scores, self.ids, ask.sampling, self._random, prompt=len(ask.prompt))
        if guide is not None and token not in ask.stop_ids:
            guide.accept(token)
        return token


T = TypeVar("T", bound=ActiveSequence)


class Steps:
    """Forward passes of a model over what sequences have next, in the slots of a cache."""

    def __init__(self, model: Decoder, cache: KeyValueCache, tokens_a_step: int, vocabulary: int | None = None) -> None:
        """`tokens_a_step`: of a pass at most. `vocabulary`: tokens that may be drawn, the first so many; None: all."""
        self._model, self._cache = model, cache
        self._tokens_a_step, self._vocabulary = tokens_a_step, vocabulary

    @torch.no_grad()
    def step(self, sequences: Sequence[T]) -> list[tuple[T, Scores]]:
        """One pass; the sequences whose next token can be drawn now, in their order. Empty: none has anything next.

        A cache whose keys change with the length of a sequence (`KeyValueCache.stretches`) takes one at a time.
        """
        assert len(sequences) <= 1 or not self._cache.stretches
        chunks = self._chunks(sequences)
        if not chunks:
            return []
        row, last = self._cache.lay([chunk for _, chunk in chunks], max(len(sequence.ids) for sequence, _ in chunks))
        hidden = self._model.hidden_states(row, cache=self._cache)[0]
        speaking = []
        for (sequence, chunk), place in zip(chunks, last, strict=True):
            sequence.computed = chunk.end
            if sequence.ask.of_prompt and not sequence.said:
                self._tell_prompt(sequence, chunk, hidden[place + 1 - len(chunk.ids) : place + 1])
            if sequence.computed == len(sequence.ids):
                speaking.append((sequence, place))
        return self._scored(speaking, hidden)

    def _chunks(self, sequences: Sequence[T]) -> list[tuple[T, Chunk]]:
        """Who answers goes first; prompts share what is left of the step, the oldest first."""
        chunks, left = [], self._tokens_a_step
        for sequence in sequences:
            if not self._cache.holds(sequence.slot, len(sequence.ids)):
                sequence.computed = 0
        for sequence in sorted(sequences, key=lambda one: len(one.ids) - one.computed > 1):
            if ids := sequence.ids[sequence.computed : sequence.computed + left]:
                chunks.append((sequence, Chunk(sequence.slot, sequence.computed, ids)))
                left -= len(ids)
        return chunks

    def _scored(self, speaking: list[tuple[T, int]], hidden: Tensor) -> list[tuple[T, Scores]]:
        if not speaking:
            return []
        places = torch.tensor([place for _, place in speaking], device=hidden.device)
        logits = self._logits(hidden[places])
        best, likeliest = logits.max(-1)  # of all at once: a pass for each takes longer than some layers
        each = zip(speaking, logits, best.tolist(), likeliest.tolist(), strict=True)
        return [(sequence, Scores(*scores)) for (sequence, _), *scores in each]

    def _tell_prompt(self, sequence: ActiveSequence, chunk: Chunk, hidden: Tensor) -> None:
        """Log-probabilities of the tokens after those of `chunk`, as far as they are the prompt's."""
        prompt = sequence.ask.prompt
        if chunk.start == 0:
            sequence.prompt.append(Token(prompt[0], None, {}))
        following = prompt[chunk.start + 1 : chunk.end + 1]
        if following:
            logits = self._logits(hidden[: len(following)])
            sequence.prompt += [_token(sequence.ask, id_, row) for id_, row in zip(following, logits, strict=True)]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)[:, : self._vocabulary].cpu()


def _token(ask: Ask, token: int, logits: Tensor) -> Token:
    if ask.log_probabilities is None:
        return Token(token, None, {})
    probabilities = logits.log_softmax(-1)
    top = probabilities.topk(min(ask.log_probabilities, len(probabilities)))
    likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Token(token, float(probabilities[token]), likeliest)


def _bias(ask: Ask, vocabulary: int) -> Tensor | None:
    """`[V]`, what is added to the logits; made once, since a client may name every token there is."""
    ids = [id_ for id_ in ask.bias if id_ < vocabulary]
    if not ids:
        return None
    return torch.zeros(vocabulary).index_add(0, torch.tensor(ids), torch.tensor([ask.bias[id_] for id_ in ids]))


# ---- drawing


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
