"""From an engine's tokens to the text of an answer, where a loop of asyncio waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from zili.data.tokenizer import DecodeStream, Tokenizer
from zili.errors import ConfigError
from zili.serving.generate.engine import Answer, Ask, Engine, Token
from zili.serving.http.keys import Holder
from zili.serving.http.metrics import Metrics

_AT_ONCE = 64
"""Tokens that are worded before others of the loop have their turn."""


@dataclass(frozen=True)
class Said:
    """A piece of an answer: text that is safe to send, and the tokens since the last piece."""

    text: str
    tokens: list[Token]
    finish: str | None = None
    """OpenAI's word for why it ended, with the last piece."""


class StopText:
    """Ends a text where one of `stops` begins; what might become one is held back.

    Each character is looked at once for each stop (Knuth, Morris and Pratt 1977), however alike text and stop are.
    The stop that is whole first ends the text, whatever pieces it came in; of several, the one that began first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        """How much of each stop the text ends with."""
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be sent now."""
        if not self._stops:
            return text
        self._held += text
        for place, letter in enumerate(text, start=len(self._held) - len(text) + 1):
            whole = [
                len(stop) for index, (stop, _) in enumerate(self._stops) if self._meets(index, letter) == len(stop)
            ]
            if whole:
                self.stopped = True
                sent, self._held = self._held[: place - max(whole)], ""
                return sent
        cut = len(self._held) - max(self._matched)
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent

    def _meets(self, index: int, letter: str) -> int:
        stop, borders = self._stops[index]
        matched = self._matched[index]
        while matched and stop[matched] != letter:
            matched = borders[matched - 1]
        self._matched[index] = matched = matched + (stop[matched] == letter)
        return matched

    def finish(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """Of each beginning of `stop`, the length of the longest shorter beginning that it ends with."""
    borders = [0] * len(stop)
    matched = 0
    for place in range(1, len(stop)):
        while matched and stop[matched] != stop[place]:
            matched = borders[matched - 1]
        matched += stop[matched] == stop[place]
        borders[place] = matched
    return borders


class Stream:
    """An answer of `engine` as pieces of text. Whoever stops listening must `cancel`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        ask: Ask,
        stops: Sequence[str] = (),
        *,
        skip_special: bool = True,
        goes_on: bool = False,
        metrics: Metrics | None = None,
        holder: Holder | None = None,
    ) -> None:
        """`goes_on`: with the prompt's text. `holder`: whose tokens prompt and answer are.

        Raises: `ConfigError` as `Engine.submit`; `TooMuch` as `Holder.promise`.
        """
        before = ask.prompt if goes_on else ()
        loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._text, self._stop = DecodeStream(tokenizer, skip_special=skip_special, before=before), StopText(stops)
        self._free = ask.min_new_tokens
        """Tokens whose text no stop ends."""
        self.tokens = 0
        """Of the answer so far."""

        def notify() -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(self._news.set)

        self._holder, self._promised, self._ended = holder, len(ask.prompt) + ask.max_new_tokens, True
        if holder is not None:
            holder.promise(self._promised)
        try:
            self.answer: Answer = engine.submit(ask, notify)
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

    async def pieces(self) -> AsyncIterator[Said]:
        """To the end; the last has a `finish`.

        Raises: what ended the answer, where that is an error.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            finished = self.answer.finished  # asked before the tokens are taken: there are none after it
            tokens = self.answer.take(_AT_ONCE)
            if len(tokens) == _AT_ONCE:  # more may be there
                self._news.set()
                finished = None
                await asyncio.sleep(0)
            if self.answer.error is not None:
                self._end("error")
                raise self.answer.error
            said, kept = "", []
            for token in tokens:
                kept.append(token)
                text = self._text.push(token.id)
                said += text if self.tokens + len(kept) <= self._free else self._stop.push(text)
                if self._stop.stopped:
                    break
            self.tokens += len(kept)
            if self._watch is not None:
                self._watch.said(len(kept))
            if self._stop.stopped or finished is not None:
                if not self._stop.stopped:
                    said += self._stop.push(self._text.finish())
                    said += "" if self._stop.stopped else self._stop.finish()
                reason = "stop" if self._stop.stopped or finished == "stop" else "length"
                self._end(reason)
                self.cancel()
                yield Said(said, kept, reason)
                return
            if said or kept:
                yield Said(said, kept)
