"""Choices of an answer in OpenAI's words, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from zili.data.reply import Reply
from zili.data.tokenizer import Tokenizer
from zili.serving.generate.engine import Token
from zili.serving.http import wording
from zili.serving.http.delivery import Whole
from zili.serving.http.prompts import Ready
from zili.serving.http.protocol import ChatRequest, CompletionRequest
from zili.serving.http.streaming import Said, Stream

Choice = dict[str, Any]


class Choices(Protocol):
    """Words one request's choices."""

    def whole(self, answers: list[Whole]) -> list[Choice]:
        """The choices of all answers; an iterator in one is a list that is made as it is written."""

    def piece(self, index: int, said: Said, first: bool) -> Choice:
        """The choice for a piece of answer `index`; `first`: nothing of it came before."""


class ChatChoices:
    """A chat's: thoughts, content and calls of tools."""

    def __init__(self, asked: ChatRequest, answers: int, tokenizer: Tokenizer, *, thinking: bool) -> None:
        """`thinking`: the prompt has opened the answers' thoughts."""
        self._asked = asked
        tools = asked.offered
        self._replies = [Reply(thinking=thinking, tools=tools) for _ in range(answers)]
        self._tellers = [wording.Told(tokenizer, skip_special=asked.skip_special_tokens) for _ in range(answers)]

    def whole(self, answers: list[Whole]) -> list[Choice]:
        choices = []
        for index, answer in enumerate(answers):
            parts = self._replies[index].push(answer.text) + self._replies[index].finish()
            finish = "tool_calls" if parts.calls and answer.finish == "stop" else answer.finish
            choice = {"index": index, "message": wording.message(parts), "finish_reason": finish}
            told = {"content": self._tellers[index].each(answer.tokens), "refusal": None}
            choices.append({**choice, "logprobs": told if self._asked.logprobs else None})
        return choices

    def piece(self, index: int, said: Said, first: bool) -> Choice:
        reply, before = self._replies[index], self._replies[index].calls
        parts = reply.push(said.text)
        if said.finish:
            parts += reply.finish()
        finish = "tool_calls" if reply.calls and said.finish == "stop" else said.finish
        logprobs = self._tellers[index].chat(said.tokens) if self._asked.logprobs else None
        delta = {"role": "assistant", "content": ""} if first else {}
        return {
            "index": index,
            "delta": delta | wording.delta(parts, before),
            "logprobs": logprobs,
            "finish_reason": finish,
        }


class CompletionChoices:
    """A completion's: text."""

    def __init__(self, asked: CompletionRequest, streams: list[Stream], ready: Ready, tokenizer: Tokenizer) -> None:
        """`streams`: of each answer."""
        self._asked, self._streams, self._ready, self._tokenizer = asked, streams, ready, tokenizer
        before: list[Sequence[int]] = [() if asked.echo else prompt for prompt in ready.each]
        self._tellers = [wording.Told(tokenizer, prompt, skip_special=asked.skip_special_tokens) for prompt in before]

    def whole(self, answers: list[Whole]) -> list[Choice]:
        choices = []
        for index, answer in enumerate(answers):
            logprobs = self._told(index, answer.tokens) if self._asked.logprobs is not None else None
            text = self._before(index) + answer.text
            choices.append({"index": index, "text": text, "finish_reason": answer.finish, "logprobs": logprobs})
        return choices

    def _before(self, index: int) -> str:
        """The prompt, where it is echoed; without what was put before it."""
        if not self._asked.echo:
            return ""
        given = self._asked.prompts[index // self._asked.n]
        return given if isinstance(given, str) else self._tokenizer.decode(given)

    def _told(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        teller = self._tellers[index]
        if not self._asked.echo:
            return teller.completion(tokens)
        unsaid = self._ready.unsaid[index // self._asked.n]
        return wording.joined(teller.echoed(self._streams[index].answer.prompt, unsaid), teller.completion(tokens))

    def piece(self, index: int, said: Said, first: bool) -> Choice:
        logprobs = self._told(index, said.tokens) if self._asked.logprobs is not None else None
        return {"index": index, "text": said.text, "logprobs": logprobs, "finish_reason": said.finish}
