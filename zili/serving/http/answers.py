"""The answers to one request: begun where there is room, and handed on piece by piece as the engine says them.

A token is handed on once: the engine's `Token` goes into an `AnswerPiece`, beside what it adds to the answer. Whoever
streams sends each piece; a whole answer is its pieces joined.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass

from fastapi import Request

from zili.data.reply import Parts, Reply
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError
from zili.serving.generate.engine import Engine
from zili.serving.generate.generation import Ask, Guide, Token
from zili.serving.generate.text_stream import AnswerText
from zili.serving.http.gate import Budget, Limits, too_much
from zili.serving.http.keys import Holder, TooMuch
from zili.serving.http.metrics import Metrics
from zili.serving.http.prompts import Prompts, Ready
from zili.serving.http.protocol import ChatRequest, CompletionRequest
from zili.serving.http.refusal import Refusal, busy

Asked = ChatRequest | CompletionRequest
_AT_ONCE = 64
"""Tokens of an answer that are worded before others of the loop have their turn."""


@dataclass(slots=True)
class AnswerPiece:
    """What has come of an answer: what it says that is safe to send, and the tokens since the last piece."""

    parts: Parts
    tokens: list[Token]
    finish: str | None = None
    """OpenAI's word for why the answer ended, with its last piece."""


def joined(pieces: Sequence[AnswerPiece]) -> AnswerPiece:
    """A whole answer."""
    parts = Parts(
        "".join(piece.parts.reasoning for piece in pieces),
        "".join(piece.parts.content for piece in pieces),
        [call for piece in pieces for call in piece.parts.calls],
    )
    return AnswerPiece(parts, [token for piece in pieces for token in piece.tokens], pieces[-1].finish)


def refusal_of(error: Exception) -> Refusal:
    """How an answer that has failed is refused."""
    if isinstance(error, Refusal):
        return error
    return Refusal(400 if isinstance(error, ConfigError) else 500, str(error))


class Stream:
    """One answer of an engine, in pieces. Whoever stops taking must `cancel`."""

    def __init__(
        self,
        engine: Engine,
        ask: Ask,
        text: AnswerText,
        news: asyncio.Event,
        *,
        reply: Reply | None = None,
        metrics: Metrics | None = None,
        holder: Holder | None = None,
    ) -> None:
        """`news` is set whenever there is something to take. `reply` takes the text apart; None: it is content as it
        is. `holder`: whose tokens prompt and answer are.

        Raises: `ConfigError` as `Engine.submit`; `TooMuch` as `Holder.promise`.
        """
        loop, self._text, self._reply = asyncio.get_running_loop(), text, reply
        self.tokens = 0
        """Of the answer so far."""

        def notify() -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(news.set)

        self._holder, self._promised, self._ended = holder, len(ask.prompt) + ask.max_new_tokens, True
        if holder is not None:
            holder.promise(self._promised)
        try:
            self.answer = engine.submit(ask, notify)
        except ConfigError:
            if holder is not None:
                holder.used(0, self._promised)
            raise
        self._watch, self._ended = metrics.began(len(ask.prompt)) if metrics else None, False

    def __del__(self) -> None:
        # Where whoever asked was gone before anything was sent.
        if not self.__dict__.get("_ended", True):
            self.cancel()

    def cancel(self) -> None:
        """Let the engine's slot go; nothing happens to one that has ended."""
        self.answer.cancel()
        self._end("abort")

    def _end(self, reason: str) -> None:
        if self._ended:
            return
        self._ended = True
        if self._holder is not None:
            # Also what nobody took: it was computed.
            self._holder.used(len(self.answer.ask.prompt) + self.answer.said, self._promised)
        if self._watch is not None:
            self._watch.ended(reason, self.answer.reused)

    def take(self) -> AnswerPiece | None:
        """What has come since the last time; None: nothing. It has at most `_AT_ONCE` tokens: more may be there.

        Raises: what ended the answer, where that is an error.
        """
        finished = self.answer.finished  # asked before the tokens are taken: there are none after it
        tokens = self.answer.take(_AT_ONCE)
        if self.answer.error is not None:
            self._end("error")
            raise self.answer.error
        if finished == "cancelled":  # not by this stream, which takes nothing after it has cancelled
            self._end("abort")
            raise busy("the server ends")
        said, kept = "", []
        for token in tokens:
            kept.append(token)
            said += self._text.push(token.id)
            if self._text.stopped:
                break
        self.tokens += len(kept)
        if self._watch is not None:
            self._watch.said(len(kept))
        reason = None
        if self._text.stopped or (finished is not None and len(tokens) < _AT_ONCE):
            said += "" if self._text.stopped else self._text.finish()
            reason = "stop" if self._text.stopped or finished == "stop" else "length"
            self._end(reason)
            self.cancel()
        return self._piece(said, kept, reason) if said or kept or reason else None

    def _piece(self, said: str, tokens: list[Token], reason: str | None) -> AnswerPiece:
        if self._reply is None:
            return AnswerPiece(Parts(content=said), tokens, reason)
        parts = self._reply.push(said)
        if reason is not None:
            parts += self._reply.finish()
        return AnswerPiece(parts, tokens, "tool_calls" if reason == "stop" and self._reply.calls else reason)


class Answers:
    """All answers to one request. They are let go when nobody takes from them any more."""

    def __init__(self, streams: list[Stream], news: asyncio.Event) -> None:
        """`news`: of all `streams`."""
        self.streams, self._news = streams, news

    async def pieces(self, request: Request, seconds: float) -> AsyncGenerator[tuple[int, AnswerPiece]]:
        """Each with the number of its answer, as they come. Whoever hangs up meanwhile frees the slots.

        Raises: Refusal, it takes longer than `seconds`, or whoever asked has gone; what ended an answer, where that is
            an error.
        """
        gone = asyncio.create_task(self._gone(request))
        end = asyncio.get_running_loop().time() + seconds
        going = dict(enumerate(self.streams))
        try:
            while going:
                await self._some_news(end, seconds)
                if gone.done():
                    raise Refusal(499, "the client has gone")
                for index, stream in list(going.items()):
                    if (piece := stream.take()) is None:
                        continue
                    if piece.finish is not None:
                        del going[index]
                    yield index, piece
                    if len(piece.tokens) == _AT_ONCE:
                        self._news.set()
                        await asyncio.sleep(0)
        finally:
            gone.cancel()
            for stream in self.streams:
                stream.cancel()

    async def whole(self, request: Request, seconds: float) -> list[AnswerPiece]:
        """All answers to their end. Raises: as `pieces`."""
        found: list[list[AnswerPiece]] = [[] for _ in self.streams]
        async with aclosing(self.pieces(request, seconds)) as pieces:
            async for index, piece in pieces:
                found[index].append(piece)
        return [joined(all_of_one) for all_of_one in found]

    async def _some_news(self, end: float, seconds: float) -> None:
        try:
            async with asyncio.timeout_at(end):
                await self._news.wait()
        except TimeoutError as error:
            raise Refusal(504, f"the answer was not finished in {seconds:g} seconds", code="timeout") from error
        self._news.clear()

    async def _gone(self, request: Request) -> None:
        """Ends when whoever asked has hung up."""
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        self._news.set()


class Beginner:
    """Begins the answers of one engine."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, limits: Limits, metrics: Metrics, prompts: Prompts
    ) -> None:
        self._engine, self._tokenizer, self._limits, self._metrics = engine, tokenizer, limits, metrics
        self._prompts = prompts
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
        """Tokens for which log-probabilities are returned."""
        room = self._engine.context - len(prompt)
        answer = room if asked.longest is None else min(room, asked.longest)
        return answer + (len(prompt) if asked.echoed else 0)

    def begin(self, asked: Asked, ready: Ready, guide: Callable[[], Guide] | None, holder: Holder | None) -> Answers:
        """All answers. Raises: Refusal; none has begun then."""
        prompts, news = ready.each, asyncio.Event()
        seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**63
        streams: list[Stream] = []
        try:
            for number, prompt in enumerate(prompts):
                most = self._longest(prompt, asked, holder, len(prompts) - number)
                ask = self._ask(prompt, most, seed + number, asked, ready, guide)
                streams.append(self._stream(ask, asked, ready, news, holder))
        except (Refusal, ConfigError, TooMuch) as error:
            for stream in streams:
                stream.cancel()
            raise _refused(error) from error
        return Answers(streams, news)

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
        ends = frozenset() if asked.ignore_eos and guide is None else self._prompts.end_ids
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

    def _stream(self, ask: Ask, asked: Asked, ready: Ready, news: asyncio.Event, holder: Holder | None) -> Stream:
        chats = isinstance(asked, ChatRequest)
        text = AnswerText(
            self._tokenizer,
            [*asked.stops, *(self._prompts.end_texts if chats and not asked.ignore_eos else ())],
            skip_special=asked.skip_special_tokens,
            before=() if chats else ask.prompt,
            free=ask.min_new_tokens,
        )
        reply = ready.reply() if ready.reply else None
        return Stream(self._engine, ask, text, news, reply=reply, metrics=self._metrics, holder=holder)


def _refused(error: Refusal | ConfigError | TooMuch) -> Refusal:
    if isinstance(error, TooMuch):
        return too_much(error)
    return error if isinstance(error, Refusal) else Refusal(400, str(error), code="context_length_exceeded")
