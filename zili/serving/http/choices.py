"""Choices of an answer in OpenAI's words, whole or piece by piece."""

from __future__ import annotations

import codecs
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from zili.data.reply import Call, Parts
from zili.data.tokenizer import Tokenizer
from zili.serving.generate.generation import Token
from zili.serving.http.answers import AnswerPiece, Stream
from zili.serving.http.prompts import Ready
from zili.serving.http.protocol import ChatRequest, CompletionRequest

Choice = dict[str, Any]


class Choices(Protocol):
    """Words one request's choices."""

    def whole(self, index: int, answer: AnswerPiece) -> Choice:
        """The choice of answer `index`, all of it; an iterator in one is a list that is made as it is written."""

    def piece(self, index: int, piece: AnswerPiece) -> Choice:
        """The choice for a piece of answer `index`."""


class ChatChoices:
    """A chat's: thoughts, content and calls of tools."""

    def __init__(self, asked: ChatRequest, answers: int, tokenizer: Tokenizer) -> None:
        self._asked = asked
        self._tellers = [Told(tokenizer, skip_special=asked.skip_special_tokens) for _ in range(answers)]
        self._calls: dict[int, int] = {}
        """How many calls each answer that has begun has made."""

    def whole(self, index: int, answer: AnswerPiece) -> Choice:
        told = {"content": self._tellers[index].each(answer.tokens), "refusal": None}
        return {
            "index": index,
            "message": message(answer.parts),
            "finish_reason": answer.finish,
            "logprobs": told if self._asked.logprobs else None,
        }

    def piece(self, index: int, piece: AnswerPiece) -> Choice:
        logprobs = self._tellers[index].chat(piece.tokens) if self._asked.logprobs else None
        begins, before = index not in self._calls, self._calls.get(index, 0)
        self._calls[index] = before + len(piece.parts.calls)
        role = {"role": "assistant", "content": ""} if begins else {}
        return {
            "index": index,
            "delta": role | delta(piece.parts, before),
            "logprobs": logprobs,
            "finish_reason": piece.finish,
        }


class CompletionChoices:
    """A completion's: text."""

    def __init__(self, asked: CompletionRequest, streams: list[Stream], ready: Ready, tokenizer: Tokenizer) -> None:
        """`streams`: of each answer."""
        self._asked, self._streams, self._ready, self._tokenizer = asked, streams, ready, tokenizer
        before: list[Sequence[int]] = [() if asked.echo else prompt for prompt in ready.each]
        self._tellers = [Told(tokenizer, prompt, skip_special=asked.skip_special_tokens) for prompt in before]

    def whole(self, index: int, answer: AnswerPiece) -> Choice:
        choice = self.piece(index, answer)
        return {**choice, "text": self._before(index) + choice["text"]}

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
        return joined(teller.echoed(self._streams[index].answer.prompt, unsaid), teller.completion(tokens))

    def piece(self, index: int, piece: AnswerPiece) -> Choice:
        logprobs = self._told(index, piece.tokens) if self._asked.logprobs is not None else None
        return {"index": index, "text": piece.parts.content, "logprobs": logprobs, "finish_reason": piece.finish}


def usage(streams: list[Stream], prompts: list[list[int]]) -> dict[str, Any]:
    """Tokens of each different prompt, and of all answers."""
    prompt, said = sum(map(len, prompts)), sum(stream.tokens for stream in streams)
    reused = sum(stream.answer.reused for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": min(reused, prompt)},
    }


def message(parts: Parts) -> dict[str, Any]:
    """An assistant's turn."""
    tool_calls = [called(call) for call in parts.calls]
    content = parts.content if parts.content or not tool_calls else None
    made: dict[str, Any] = {"role": "assistant", "content": content}
    made |= {"reasoning_content": parts.reasoning} if parts.reasoning else {}
    made |= {"tool_calls": tool_calls} if tool_calls else {}
    return {**made, "refusal": None}


def delta(parts: Parts, before: int) -> dict[str, Any]:
    """What has come anew of it, after `before` calls of tools."""
    made: dict[str, Any] = {"content": parts.content} if parts.content else {}
    made |= {"reasoning_content": parts.reasoning} if parts.reasoning else {}
    calls = [{"index": before + number, **called(call)} for number, call in enumerate(parts.calls)]
    return made | ({"tool_calls": calls} if calls else {})


def called(call: Call) -> dict[str, Any]:
    """One of `tool_calls`."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class Told:
    """Log-probabilities of a text's tokens, as they come."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), *, skip_special: bool = True) -> None:
        """`before`: ids of the text that it goes on with. `skip_special`: special tokens are not in it."""
        self._tokenizer = tokenizer
        self._special = set(tokenizer.special_tokens.values())
        self._skipped = self._special if skip_special else set()
        self._begins = self._special.issuperset(before) and tokenizer.drops_first_space
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def chat(self, tokens: list[Token]) -> dict[str, Any]:
        """`logprobs` of a chat's choice."""
        return {"content": [*self.each(tokens)], "refusal": None}

    def each(self, tokens: list[Token]) -> Iterator[dict[str, Any]]:
        """Of `logprobs`' content: one after another, as all of a long answer take ten times what its tokens do."""
        for token in tokens:
            top = sorted(token.likeliest.items(), key=lambda pair: -pair[1])
            named = [{**self._named(id_), "logprob": value} for id_, value in top]
            yield {**self._named(token.id), "logprob": token.log_probability, "top_logprobs": named}
            self._pass(token.id)

    def completion(self, tokens: list[Token]) -> dict[str, Any]:
        """`logprobs` of a completion's choice. `text_offset` counts characters; a part of one begins where it does."""
        texts, offsets, likeliest = [], [], list[dict[str, float] | None]()
        for token in tokens:
            texts.append(_completion_text(self._bytes(token.id)))
            offsets.append(self._length)
            likeliest.append(self._likeliest(token) if token.log_probability is not None else None)
            self._pass(token.id)
        return {
            "tokens": texts,
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }

    def echoed(self, tokens: list[Token], unsaid: int) -> dict[str, Any]:
        """`completion` of a prompt that its answer follows: its special tokens are in the text, but not the first
        `unsaid`, which were put before it."""
        skipped, self._skipped = self._skipped, self._special
        before = self.completion(tokens[:unsaid])
        self._skipped = set()
        told = joined(before, self.completion(tokens[unsaid:]))
        self._skipped = skipped
        return told

    def _likeliest(self, token: Token) -> dict[str, float]:
        """Log-probabilities by the tokens' texts; where several have the same text, all but the first by their ids."""
        found: dict[str, float] = {}
        for id_, value in {token.id: token.log_probability or 0.0, **token.likeliest}.items():
            text = _completion_text(self._bytes(id_))
            found[f"token_id:{id_}" if text in found else text] = value
        return found

    def _named(self, id_: int) -> dict[str, Any]:
        """A token's name in OpenAI's chat: a token that is no text by itself is spelled in bytes."""
        told = self._bytes(id_)
        return {"token": _whole(told) if _whole(told) is not None else _escaped(told), "bytes": list(told)}

    def _bytes(self, id_: int) -> bytes:
        told = self._tokenizer.bytes_of(id_)
        return told.removeprefix(b" ") if self._begins and id_ not in self._special else told

    def _pass(self, id_: int) -> None:
        if id_ not in self._skipped:
            self._length += len(self._text.decode(self._bytes(id_)))
        self._begins = self._begins and id_ in self._special


def joined(one: dict[str, Any], following: dict[str, Any]) -> dict[str, Any]:
    """`logprobs` of a text in two parts."""
    return {name: told + following[name] for name, told in one.items()}


def _whole(told: bytes) -> str | None:
    try:
        return told.decode()
    except UnicodeDecodeError:
        return None


def _escaped(told: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in told)


def _completion_text(told: bytes) -> str:
    text = _whole(told)
    return f"bytes:{_escaped(told)}" if text is None else text
