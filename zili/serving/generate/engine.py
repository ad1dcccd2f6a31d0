"""Many conversations at once with one model: continuous batching (Yu et al. 2022, Orca).

Each step is one forward pass over what every running sequence has next: a token of those that answer, a piece of the
prompt of those that begin (chunked prefill). Sequences come and go between steps. One that ends leaves its keys in its
slot; who comes next with the same beginning goes on from there, or from a copy of another's.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from zili.errors import ConfigError
from zili.models.decoder import Decoder
from zili.serving.cpu.kernels import compiled
from zili.serving.cpu.packed import pack
from zili.serving.generate.generation import DEFAULT_SAMPLING, Sampling, check_known, draw
from zili.serving.generate.slots import Piece, SlotCache, serve_from, served_length

_GUIDES_SECONDS = 0.001
"""After which guides that were not ready are asked again."""
FinishReason = Literal["stop", "length", "context", "cancelled"]


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


class Answer:
    """What comes back, as it comes. Its methods are safe from any thread."""

    def __init__(self, ask: Ask, notify: Callable[[], None] | None = None) -> None:
        """`notify` is called by the engine's thread whenever there is something new."""
        self.ask = ask
        self.reused = 0
        """Tokens of the prompt whose keys were there already."""
        self.said = 0
        """Tokens that have come."""
        self.prompt: list[Token] = []
        self.error: Exception | None = None
        self.cancelled = False
        self._tokens: deque[Token] = deque()
        self._finished: FinishReason | None = None
        self._notify = notify
        self._changed = threading.Condition()

    def cancel(self) -> None:
        """Nobody waits for it any more: the engine lets go of it before its next step."""
        self.cancelled = True

    @property
    def finished(self) -> FinishReason | None:
        """Why it ended; None while it goes on."""
        return self._finished

    def take(self, most: int | None = None) -> list[Token]:
        """Tokens since the last call, at most so many."""
        with self._changed:
            count = len(self._tokens)
            return [self._tokens.popleft() for _ in range(count if most is None else min(count, most))]

    def wait(self, timeout: float | None = None) -> list[Token]:
        """All tokens to the end.

        Raises: what ended it, where that is an error; TimeoutError.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._finished or self.error, timeout):
                raise TimeoutError("no answer in time")
        if self.error is not None:
            raise self.error
        return self.take()

    def _say(
        self, token: Token | None = None, finished: FinishReason | None = None, error: Exception | None = None
    ) -> None:
        with self._changed:
            if token is not None:
                self._tokens.append(token)
                self.said += 1
            self._finished, self.error = finished or self._finished, error or self.error
            if self._finished or self.error:
                self._changed.notify_all()
        if self._notify is not None:
            self._notify()


@dataclass
class _Sequence:
    answer: Answer
    slot: int
    ids: list[int]
    """Prompt and answer so far."""
    computed: int
    """Of these, how many have their keys in the slot."""
    random: torch.Generator
    said: int = 0
    guide: Guide | None = None
    bias: Tensor | None = None
    held: tuple[Tensor, float, int] | None = None
    """What the next token is drawn of, until the guide is ready: `_say_next`'s."""


class Engine:
    """Answers what is asked, in a thread of its own. `close`, or leaving its block, ends it."""

    def __init__(
        self,
        model: Decoder,
        *,
        slots: int = 16,
        context: int | None = None,
        tokens_a_step: int = 512,
        vocabulary: int | None = None,
    ) -> None:
        """The model is the engine's from here on.

        Args:
            slots: sequences at once; further ones wait.
            context: tokens of a sequence, prompt and answer; None: the model's, as far as `served_length` allows.
            tokens_a_step: of a forward pass at most, so that a long prompt delays the others by that much only.
            vocabulary: tokens the tokenizer knows; rows of the model beyond are never drawn.
        """
        if min(slots, tokens_a_step) < 1:
            raise ConfigError(f"{slots=}, {tokens_a_step=}: at least 1")
        self.model = model.eval()
        self.context = served_length(model.config, context or model.config.max_length)
        weight = model.head_weight
        kernels = compiled(model.config, weight.dtype) if weight.device.type == "cpu" else None
        self._cache = SlotCache(
            model.config, slots, self.context, dtype=weight.dtype, device=weight.device, kernels=kernels
        )
        serve_from(model, self._cache)
        pack(model, kernels)
        self._vocabulary, self.slots = vocabulary, slots
        self._tokens_a_step = max(tokens_a_step, slots)
        self._waiting: deque[Answer] = deque()
        self._running: list[_Sequence] = []
        self._kept: dict[int, list[int]] = {slot: [] for slot in range(slots)}
        """Ids whose keys free slots have, the one that was used last at the end."""
        self._work = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="zili-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def load(self) -> tuple[int, int]:
        """How many sequences run, and how many wait."""
        return len(self._running), len(self._waiting)

    @property
    def usage(self) -> float:
        """Share of the slots' room that running sequences use."""
        return sum(len(one.ids) for one in list(self._running)) / (self.slots * self.context)

    def submit(self, ask: Ask, notify: Callable[[], None] | None = None) -> Answer:
        """Begin to answer.

        Raises:
            ConfigError: an empty prompt, one that leaves no room in the context or has a token that the model does not
                know, or settings that cannot be used.
        """
        ask.sampling.checked()
        check_known(ask.prompt, self.model.config.vocab_size)
        if not ask.prompt:
            raise ConfigError("generation needs at least one token to start from; give the end-of-text token")
        if len(ask.prompt) >= self.context + (ask.max_new_tokens == 0):
            raise ConfigError(
                f"the prompt has {len(ask.prompt)} tokens and the context holds {self.context}, answer included"
            )
        answer = Answer(ask, notify)
        with self._work:
            if self._closed:
                raise ConfigError("the engine is closed")
            self._waiting.append(answer)
            self._work.notify()
        return answer

    def close(self, *, finish: bool = False) -> None:
        """End the thread: after what was begun is answered, with `finish`, else at once."""
        with self._work:
            self._closed = True
            if not finish:
                for answer in (*self._waiting, *(sequence.answer for sequence in self._running)):
                    answer.cancel()
            self._work.notify()
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._waiting or self._running or self._closed)
                if self._closed and not self._waiting and not self._running:
                    return
            try:
                self._step()
            except Exception as error:  # whoever waits hears of it; the next one may fare better
                for sequence in self._running:
                    self._release(sequence, keep=False)
                    sequence.answer._say(error=error)
                self._running.clear()

    @torch.no_grad()
    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._say_held()
        pieces, sequences = [], []
        left = self._tokens_a_step
        # Who answers goes first; prompts share what is left of the step, the oldest first.
        for sequence in sorted(self._running, key=lambda one: len(one.ids) - one.computed > 1):
            ids = sequence.ids[sequence.computed : sequence.computed + left]
            if ids:
                pieces.append(Piece(sequence.slot, sequence.computed, ids))
                sequences.append(sequence)
                left -= len(ids)
        if not pieces:
            if self._running:  # all wait for their guides
                with self._work:
                    self._work.wait(_GUIDES_SECONDS)
            return
        row, last = self._cache.lay(pieces)
        hidden = self.model.hidden_states(row, cache=self._cache)[0]  # type: ignore[arg-type]
        speaking = []
        for piece, sequence, place in zip(pieces, sequences, last, strict=True):
            sequence.computed = piece.end
            if sequence.answer.ask.of_prompt and not sequence.said:
                self._tell_prompt(sequence, piece, hidden[place + 1 - len(piece.ids) : place + 1])
            if sequence.computed == len(sequence.ids):
                speaking.append((sequence, place))
        if speaking:
            places = torch.tensor([place for _, place in speaking], device=hidden.device)
            logits = self.model.logits(hidden[places])[:, : self._vocabulary].cpu()
            best, likeliest = logits.max(-1)  # of all at once: a pass for each takes longer than some layers
            for number, (sequence, _) in enumerate(speaking):
                self._say_next(sequence, logits[number], float(best[number]), int(likeliest[number]))

    def _drop_cancelled(self) -> None:
        for answer in [answer for answer in self._waiting if answer.cancelled]:
            self._waiting.remove(answer)
            answer._say(finished="cancelled")
        for sequence in [sequence for sequence in self._running if sequence.answer.cancelled]:
            self._finish(sequence, "cancelled")

    def _admit(self) -> None:
        while self._waiting and self._kept:
            answer = self._waiting.popleft()
            prompt = list(answer.ask.prompt)
            # The last token is computed in any case, for what follows it; all of them where all are told.
            limit = 0 if answer.ask.of_prompt else len(prompt) - 1
            slot = max(self._kept, key=lambda one: _common(self._kept[one], prompt, limit))
            found = _common(self._kept[slot], prompt, limit)
            if not found:
                slot = next(iter(self._kept))  # the one that was used longest ago
            others = [(_common(one.ids[: one.computed], prompt, limit), one.slot) for one in self._running]
            longest, other = max(others, default=(0, 0))
            del self._kept[slot]
            random = torch.Generator().manual_seed(answer.ask.sampling.seed)
            # Among those that run before anything can fail, so that it hears of it.
            self._running.append(sequence := _Sequence(answer, slot, prompt, found, random))
            try:
                sequence.guide = answer.ask.guide() if answer.ask.guide else None
            except Exception as error:
                self._fail(sequence, error)
                continue
            if longest > found:
                self._cache.copy(other, slot, longest)
                sequence.computed = longest
            answer.reused = sequence.computed

    def _say_held(self) -> None:
        for sequence in [one for one in self._running if one.held is not None]:
            held, sequence.held = sequence.held, None
            if held is not None:
                self._say_next(sequence, *held)

    def _tell_prompt(self, sequence: _Sequence, piece: Piece, hidden: Tensor) -> None:
        """Log-probabilities of the tokens after those of `piece`, as far as they are the prompt's."""
        prompt, answer = sequence.answer.ask.prompt, sequence.answer
        if piece.start == 0:
            answer.prompt.append(Token(prompt[0], None, {}))
        following = prompt[piece.start + 1 : piece.end + 1]
        if following:
            logits = self.model.logits(hidden[: len(following)])[:, : self._vocabulary].cpu()
            answer.prompt += [self._token(answer.ask, id_, row) for id_, row in zip(following, logits, strict=True)]

    def _say_next(self, sequence: _Sequence, logits: Tensor, highest: float, likeliest: int) -> None:
        ask, answer = sequence.answer.ask, sequence.answer
        if sequence.said >= ask.max_new_tokens:  # of 0
            self._finish(sequence, "length")
            return
        if sequence.guide is not None and not sequence.guide.ready:
            sequence.held = logits, highest, likeliest
            return
        try:
            plainly = ask.greedy and math.isfinite(highest)
            token = likeliest if plainly else self._draw(sequence, logits)
            told = None if token in ask.stop_ids else self._token(ask, token, logits)
        except Exception as error:  # whatever it is, it is this sequence's alone
            self._fail(sequence, error)
            return
        if told is None:
            self._finish(sequence, "stop")
            return
        sequence.ids.append(token)
        sequence.said += 1
        answer._say(told)
        if sequence.said >= ask.max_new_tokens:
            self._finish(sequence, "length")
        elif len(sequence.ids) >= self.context:
            self._finish(sequence, "context")

    @staticmethod
    def _draw(sequence: _Sequence, logits: Tensor) -> int:
        ask, guide = sequence.answer.ask, sequence.guide
        if ask.bias and sequence.bias is None:
            sequence.bias = _bias(ask, len(logits))
        scores = logits if sequence.bias is None else logits + sequence.bias
        if sequence.said < ask.min_new_tokens:
            early = torch.tensor([id_ for id_ in ask.stop_ids if id_ < len(scores)], dtype=torch.int64)
            scores = scores.index_fill(0, early, -math.inf)
        if guide is not None:
            scores = guide.allowed(scores)
        token = draw(scores, sequence.ids, ask.sampling, sequence.random, prompt=len(ask.prompt))
        if guide is not None and token not in ask.stop_ids:
            guide.accept(token)
        return token

    @staticmethod
    def _token(ask: Ask, token: int, logits: Tensor) -> Token:
        if ask.log_probabilities is None:
            return Token(token, None, {})
        probabilities = logits.log_softmax(-1)
        top = probabilities.topk(min(ask.log_probabilities, len(probabilities)))
        likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Token(token, float(probabilities[token]), likeliest)

    def _fail(self, sequence: _Sequence, error: Exception) -> None:
        self._running.remove(sequence)
        self._release(sequence, keep=False)
        sequence.answer._say(error=error)

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        self._running.remove(sequence)
        self._release(sequence, keep=True)
        sequence.answer._say(finished=reason)

    def _release(self, sequence: _Sequence, *, keep: bool) -> None:
        self._kept[sequence.slot] = sequence.ids[: sequence.computed] if keep else []
        if sequence.guide is not None:
            sequence.guide.close()


def _bias(ask: Ask, vocabulary: int) -> Tensor | None:
    """`[V]`, what is added to the logits; made once, since a client may name every token there is."""
    ids = [id_ for id_ in ask.bias if id_ < vocabulary]
    if not ids:
        return None
    return torch.zeros(vocabulary).index_add(0, torch.tensor(ids), torch.tensor([ask.bias[id_] for id_ in ids]))


def _common(kept: Sequence[int], prompt: Sequence[int], limit: int) -> int:
    """How many tokens both begin with, at most `limit`."""
    count = 0
    for one, other in zip(kept, prompt[:limit], strict=False):
        if one != other:
            break
        count += 1
    return count
