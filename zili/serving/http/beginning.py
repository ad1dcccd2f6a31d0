"""Answers that begin: whether there is room, and how long each may become."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import ExitStack

from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError
from zili.serving.generate.engine import Ask, Engine, Guide
from zili.serving.http.budget import Budget
from zili.serving.http.gate import Limits, too_much
from zili.serving.http.keys import Holder, TooMuch
from zili.serving.http.metrics import Metrics
from zili.serving.http.prompts import Prompts, Ready
from zili.serving.http.protocol import ChatRequest, CompletionRequest
from zili.serving.http.refusal import Refusal, busy
from zili.serving.http.streaming import Stream

Asked = ChatRequest | CompletionRequest


class Beginner:
    """Begins the answers of one engine."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, limits: Limits, metrics: Metrics, prompts: Prompts
    ) -> None:
        self._engine, self._tokenizer, self._limits, self._metrics = engine, tokenizer, limits, metrics
        self._ends, self._end_texts = prompts.end_ids, prompts.end_texts
        self._log_probabilities = Budget(limits.log_probabilities)

    def check_room(self, asked: Asked, ready: Ready, held: ExitStack) -> None:
        """Whether answers can begin now. What they take of memory is given back when `held` ends.

        Raises: Refusal.
        """
        running, waiting = self._engine.load
        answers = len(ready.given) * ready.answers
        if running + waiting + answers > self._engine.slots + self._limits.waiting:
            raise busy(f"{waiting} answers wait already, {self._limits.waiting} may")
        if asked.told is None:
            return
        each, most = asked.told + 1, self._log_probabilities.most
        tokens = ready.answers * sum(self._most_told(asked, prompt) for prompt in ready.given)
        if tokens * each > most:
            message = (
                f"logprobs: {tokens:,} tokens with {each} log-probabilities each may be answered, and {most:,} of "
                "these are kept at once: give a smaller max_tokens, or ask for fewer of them"
            )
            raise Refusal(400, message, param="logprobs")
        if not self._log_probabilities.take(tokens * each, held):
            raise busy(f"{most:,} log-probabilities are kept at once, and others have asked for most of them")

    def _most_told(self, asked: Asked, prompt: list[int]) -> int:
        """Tokens of which log-probabilities are told."""
        room = self._engine.context - len(prompt)
        answer = room if asked.longest is None else min(room, asked.longest)
        return answer + (len(prompt) if asked.echoed else 0)

    def streams(
        self, asked: Asked, ready: Ready, guide: Callable[[], Guide] | None, holder: Holder | None
    ) -> list[Stream]:
        """One for each answer. Raises: Refusal; none has begun then."""
        prompts = ready.each
        seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**63
        streams: list[Stream] = []
        try:
            for number, prompt in enumerate(prompts):
                most = self._longest(prompt, asked, holder, len(prompts) - number)
                ask = self._ask(prompt, most, seed + number, asked, ready, guide)
                streams.append(self._stream(ask, asked, holder))
        except (Refusal, ConfigError, TooMuch) as error:
            for stream in streams:
                stream.cancel()
            raise _refused(error) from error
        return streams

    def _longest(self, prompt: list[int], asked: Asked, holder: Holder | None, answers: int) -> int:
        """Tokens of an answer at most: as asked, else what the context has room for, and the holder's quota has for
        each of so many answers."""
        room, longest = self._engine.context - len(prompt), asked.longest
        if longest is None:
            free = holder.free() if holder is not None else None
            return room if free is None else max(1, min(room, free // answers - len(prompt)))
        if longest > room:
            message = (
                f"the context holds {self._engine.context} tokens; {len(prompt)} of the prompt and {longest} of "
                "the answer are more"
            )
            raise Refusal(400, message, param="max_tokens", code="context_length_exceeded")
        return longest

    def _ask(
        self, prompt: list[int], most: int, seed: int, asked: Asked, ready: Ready, guide: Callable[[], Guide] | None
    ) -> Ask:
        ends = frozenset() if asked.ignore_eos and guide is None else self._ends
        return Ask(
            prompt,
            most,
            asked.sampling(seed),
            ends | set(asked.stop_token_ids),
            log_probabilities=asked.told,
            of_prompt=asked.echoed,
            bias=ready.bias,
            guide=guide,
            min_new_tokens=asked.min_tokens,
        )

    def _stream(self, ask: Ask, asked: Asked, holder: Holder | None) -> Stream:
        texts = self._end_texts if isinstance(asked, ChatRequest) and not asked.ignore_eos else ()
        return Stream(
            self._engine,
            self._tokenizer,
            ask,
            [*asked.stops, *texts],
            skip_special=asked.skip_special_tokens,
            goes_on=isinstance(asked, CompletionRequest),
            metrics=self._metrics,
            holder=holder,
        )


def _refused(error: Refusal | ConfigError | TooMuch) -> Refusal:
    if isinstance(error, TooMuch):
        return too_much(error)
    return error if isinstance(error, Refusal) else Refusal(400, str(error), code="context_length_exceeded")
