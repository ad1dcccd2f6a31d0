"""Chat templates: a conversation as token ids, and which of them the assistant says.

A template is the text that transformers and vLLM take as `chat_template`; those of the TeleChat family lie beside this
file. It may write special tokens; nobody who speaks in the conversation may. Before it is rendered every spelling of a
special token in what people, tools and system prompts say is broken with a character that occurs nowhere, and only what
is whole afterwards becomes the special id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
"""`role` and `content`; an assistant's may have `reasoning_content` and `tool_calls`."""
_PRIVATE = range(0xE000, 0xF900)
"""Characters without a meaning of their own, of which some are taken that occur nowhere else."""
_THOUGHT = re.compile(r"\s*<think>\n?(.*?)\n?</think>(.*)", re.DOTALL)
_MARK = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model reads it."""

    ids: list[int]
    said: list[bool]
    """Whether the assistant says it, what ends its turn included: what is learned."""


@dataclass(frozen=True)
class ChatTemplate:
    """One template. Rendering is sandboxed: a template that came with a model may look at messages and no more."""

    source: str
    name: str = "chat template"
    _compiled: Callable[..., str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "_compiled", _environment().from_string(self.source).render)
        except jinja2.TemplateError as error:
            raise DataError(f"{self.name} is no chat template that can be read: {error}") from error

    @classmethod
    def named(cls, name: str) -> ChatTemplate:
        """One of Zili's: telechat1, telechat2, telechat3, telechat3-coder, chatml; or a file with a template."""
        names = template_names()
        if name in names:
            text = (resources.files("zili.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
            return cls(text, name)
        try:
            return cls(Path(name).read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"there is no chat template {name!r}: choose {', '.join(names)}, or a file with one ({error})"
            ) from error

    @classmethod
    def of_folder(cls, folder: Path) -> ChatTemplate | None:
        """The template beside a model, as transformers looks for it; None where there is none."""
        file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), str(file))
        if not config.is_file():
            return None
        try:
            text = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        except ValueError as error:
            raise DataError(f"{config}: broken JSON ({error}).") from error
        return cls(text, str(config)) if isinstance(text, str) else None

    @property
    def without_marks(self) -> str:
        """Its text for engines that do not know what `generation` marks.

        A condition that always holds stands there instead, so that white space is trimmed as before.
        """
        return _MARK.sub(lambda found: f"{found[1]}{'endif' if found[2] else 'if true'}{found[3]}", self.source)

    def render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> Rendered:
        """The ids of `messages`, of which `add_generation_prompt` ends with what an answer begins after.

        `options` are the template's own, such as enable_thinking. An assistant's content that begins with
        `<think>...</think>` is taken apart into thoughts and answer.

        Raises:
            DataError: a message without role or content, a role that the template has not, or a template that fails.
        """
        said = [_normal(message) for message in messages]
        signs = _signs(self.source + json.dumps([said, tools], ensure_ascii=False))
        guard = _Guard(tokenizer, *signs)
        try:
            text = self._compiled(
                messages=guard.broken(said),
                tools=guard.broken(tools),
                add_generation_prompt=add_generation_prompt,
                begin_said=guard.begin,
                end_said=guard.end,
                **_named(tokenizer),
                **options,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{self.name} cannot say this conversation: {error}") from error
        ids, spoken = [], []
        for token_ids, by_assistant in guard.pieces(text):
            ids += token_ids
            spoken += [by_assistant] * len(token_ids)
        return Rendered(ids, spoken)


def template_names() -> list[str]:
    """Of the templates that come with Zili."""
    files = (resources.files("zili.data") / "templates").iterdir()
    return sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja"))


def template_for(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that a tokenizer's special tokens are those of, for a model that brings none."""
    special = tokenizer.special_tokens
    for name, marks in (
        ("telechat3", ("<_user>", "<_bot>", "<think>")),
        ("telechat2", ("<_user>", "<_bot>", "<_system>")),
        ("telechat1", ("<_user>", "<_bot>")),
        ("chatml", ("<|im_start|>", "<|im_end|>")),
    ):
        if all(mark in special for mark in marks):
            return ChatTemplate.named(name)
    return None


def _normal(message: Message) -> dict[str, Any]:
    """With a role and a content, thoughts apart from it, and arguments of calls as tables."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"a message's role is {role!r}; it must be one of {', '.join(ROLES)}")
    if content is not None and not isinstance(content, str):
        raise DataError(f"a message of {role} has content of type {type(content).__name__}; text is read")
    normal = {**message, "content": content or ""}
    if role == "assistant":
        thought = None if normal.get("reasoning_content") else _THOUGHT.fullmatch(normal["content"])
        if thought:
            normal |= {"reasoning_content": thought[1], "content": thought[2].removeprefix("\n")}
        normal["tool_calls"] = [_normal_call(call) for call in message.get("tool_calls") or []]
    return normal


def _normal_call(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else {}
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"a tool call has no name: {str(call)[:100]}")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"the arguments of a call of {inner['name']} are no JSON ({error})") from error
    return {**inner, "arguments": arguments}


def _named(tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens that templates ask for by role."""
    roles = {"bos_token": "<_start>", "unk_token": "<_unk>", "pad_token": "<_pad>"}
    named = {role: token for role, token in roles.items() if token in tokenizer.special_tokens}
    return {"bos_token": "", **named, "eos_token": tokenizer.end_token}


def _signs(text: str) -> tuple[str, str, str]:
    """Three characters that do not occur in `text`."""
    used = set(text)
    free = (chr(code) for code in _PRIVATE if chr(code) not in used)
    return next(free), next(free), next(free)


class _Guard:
    """Keeps what is said apart from what the template writes."""

    def __init__(self, tokenizer: Tokenizer, breaking: str, begin: str, end: str) -> None:
        self._tokenizer, self._breaking, self.begin, self.end = tokenizer, breaking, begin, end
        spellings = sorted(tokenizer.special_tokens, key=len, reverse=True)
        alternatives = [re.escape(text) for text in (*spellings, begin, end) if text]
        self._cut = re.compile("(" + "|".join(alternatives) + ")")

    def broken(self, value: Any) -> Any:
        """`value` with a sign in every spelling of a special token in it."""
        if isinstance(value, str):
            return self._cut.sub(lambda found: found[0][:1] + self._breaking + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self.broken(key): self.broken(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.broken(inner) for inner in value]
        return value

    def pieces(self, text: str) -> Iterator[tuple[list[int], bool]]:
        """Ids of the parts of a rendered text, and whether the assistant says them."""
        spoken = False
        for part in self._cut.split(text):
            if part in (self.begin, self.end):
                spoken = part == self.begin
            elif part in self._tokenizer.special_tokens:
                yield [self._tokenizer.special_id(part)], spoken
            elif part:
                yield self._tokenizer.encode(part.replace(self._breaking, "")).tolist(), spoken


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads a plain attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        signs = [nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("begin_said", "end_said")]
        return cast(nodes.Node, nodes.Scope([signs[0], *body, signs[1]], lineno=line))


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers has it (utils/chat_template_utils.py), so that a template means the same in both."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
