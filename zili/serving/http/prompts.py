"""From what is asked to prompts as the engine takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from zili.data.dialect import NOT_OPTIONS, Dialect
from zili.data.faithful import check_told
from zili.data.reply import Reply
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError
from zili.serving.forms.form_process import LONGEST
from zili.serving.http.protocol import ChatRequest, CompletionRequest
from zili.serving.http.refusal import Refusal

_STRETCH = 1 << 16
"""Characters of a text that are counted at a time, where it may be too long."""

_TAKEN = NOT_OPTIONS - {"add_generation_prompt", "continue_final_message"}
"""Names that a request may not set among a template's options. The two that are left out may stand in either place."""
_LONG = 10**20
"""Numbers beyond are many tokens."""


@dataclass(frozen=True)
class Ready:
    """What is asked, as the engine takes it."""

    given: list[list[int]]
    """Prompts."""
    answers: int
    """To each of them."""
    form: dict[str, Any] | None
    """What of the request says how answers must look."""
    bias: dict[int, float]
    thinking: str = ""
    """What ends the answer's thoughts, where the prompt opens them."""
    reply: Callable[[], Reply] | None = None
    """Makes what takes each answer apart; None: it is text as it is."""
    unsaid: Sequence[int] = ()
    """Tokens that each text of a completion was put after."""

    @property
    def each(self) -> list[list[int]]:
        """The prompt of each answer."""
        return [prompt for prompt in self.given for _ in range(self.answers)]


class Prompts:
    """Makes one model's prompts. Its methods take longer for larger requests, and raise Refusal."""

    def __init__(self, tokenizer: Tokenizer, dialect: Dialect | None, context: int) -> None:
        self._tokenizer, self._dialect, self._context = tokenizer, dialect, context
        # Whatever a model without a template was trained on, marks of turns end its answers.
        known = dialect or Dialect.named("chatml", tokenizer)
        self.end_ids, self.call_style, self.tags = known.end_ids, known.call_style, known.manners.tags
        self.end_texts = dialect.end_texts if dialect else ()
        """Texts that end an answer of a chat."""

    def conversation(self, asked: ChatRequest) -> Ready:
        """The prompt of a chat."""
        if self._dialect is None:
            raise Refusal(400, "the model has no chat template: use /v1/completions", param="messages")
        prompt = self._rendered(asked, self._dialect)
        thinking = self._dialect.manners.think.end if self._dialect.opening(prompt) else ""
        reply = partial(self._dialect.reply, opened=bool(thinking), tools=asked.offered)
        return Ready([prompt], asked.n, _form(asked), self._bias(asked.logit_bias), thinking, reply)

    def texts(self, asked: CompletionRequest) -> Ready:
        """The prompts of a completion."""
        prompts = [self._ids(prompt, begin=asked.add_special_tokens) for prompt in asked.prompts]
        given, bias = [[*before, *ids] for before, ids in prompts], self._bias(asked.logit_bias)
        return Ready(given, asked.n, _form(asked), bias, unsaid=[len(before) for before, _ in prompts])

    def encoded(self, text: str) -> list[int]:
        """A text's ids, in which special tokens may be written."""
        try:
            return self._tokenizer.encode_marked(text)
        except DataError as error:
            raise Refusal(400, str(error), param="prompt") from error

    def known(self, ids: Sequence[int], param: str = "prompt") -> None:
        """Refuse ids that the tokenizer does not have."""
        beyond = next((id_ for id_ in ids if id_ >= self._tokenizer.vocab_size), None)
        if beyond is not None:
            raise Refusal(400, f"token {beyond}: the tokenizer has {self._tokenizer.vocab_size}", param=param)

    def _rendered(self, asked: ChatRequest, dialect: Dialect) -> list[int]:
        if asked.offered and not dialect.manners.tools:
            raise Refusal(400, "tools: the chat template of this model has no place for them", param="tools")
        try:
            turns = [message.plain() for message in asked.messages]
            options = self._options(asked, dialect)
            self._check_fit([turns, options])
            rendered = dialect.render(turns, **options)
            check_told(rendered, turns, dialect)
            return rendered.ids
        except (DataError, TypeError) as error:
            raise Refusal(400, str(error), param="messages") from error

    @staticmethod
    def _options(asked: ChatRequest, dialect: Dialect) -> dict[str, Any]:
        if taken := _TAKEN & asked.chat_template_kwargs.keys():
            message = f"chat_template_kwargs: {min(taken)} is not one of the template's own"
            raise Refusal(400, message, param="chat_template_kwargs")
        begin = asked.add_generation_prompt
        return {
            "add_generation_prompt": not asked.continue_final_message if begin is None else begin,
            "continue_final_message": asked.continue_final_message,
            "tools": asked.offered or None,
            **_effort(asked.reasoning_effort, dialect),
            **asked.chat_template_kwargs,
        }

    def _ids(self, prompt: str | list[int], *, begin: bool) -> tuple[Sequence[int], list[int]]:
        """What is put before a prompt, and its own ids."""
        if isinstance(prompt, str):
            self._check_fit([prompt])
            ids = self.encoded(prompt)
            before = self._tokenizer.begin_ids if begin else ()
            return before or (() if ids else (self._tokenizer.start_id,)), ids
        self.known(prompt)
        return (), prompt

    def _check_fit(self, given: Any) -> None:
        """Refuse what is far longer than the context, before memory is taken for all of it."""
        texts, count = list(_texts_in(given)), _numbers_in(given)
        if sum(map(len, texts)) + count <= _STRETCH:
            return
        most = 2 * self._context + _STRETCH
        for text in texts:
            for start in range(0, len(text), _STRETCH):
                if count > most:
                    break
                count += len(self.encoded(text[start : start + _STRETCH]))
        if count > most:
            message = f"the context holds {self._context} tokens; what is asked has more than {count:,}"
            raise Refusal(400, message, code="context_length_exceeded")

    def _bias(self, given: dict[str, float | None] | None) -> dict[int, float]:
        try:
            bias = {int(token): value for token, value in (given or {}).items() if value is not None}
        except ValueError as error:
            raise Refusal(400, "its keys are the ids of tokens", param="logit_bias") from error
        if any(not 0 <= token < self._tokenizer.vocab_size for token in bias):
            raise Refusal(400, f"a token is beyond {self._tokenizer.vocab_size}", param="logit_bias")
        return bias


def _effort(effort: str | None, dialect: Dialect) -> dict[str, str]:
    """The template's option, where it has one."""
    word = "reasoning_effort"
    if effort is not None and word in dialect.template.source:
        return {word: effort}
    if effort not in (None, "medium", *(() if dialect.manners.thinks else ("none",))):
        raise Refusal(400, f"{word}: the chat template of this model knows none", param=word)
    return {}


def _form(asked: ChatRequest | CompletionRequest) -> dict[str, Any] | None:
    """What its answer must look like. One that is far too long is not written down for the process that would say so:
    what writes it holds Python's lock."""
    form = asked.formed
    if _numbers_in(form) > LONGEST:
        raise Refusal(400, f"the form is longer than {LONGEST:,} characters", param="response_format")
    return form


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in what was given as JSON, and numbers that are as long as some."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int) and abs(value) > _LONG:
        yield str(value)
    elif isinstance(value, dict | list):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts_in(inner)


def _numbers_in(value: Any) -> int:
    """How much else there is that is written: each is a token at least."""
    if isinstance(value, dict):
        return _numbers_in([*value.values()])
    if isinstance(value, list):
        return sum(map(_numbers_in, value))
    return not isinstance(value, str)
