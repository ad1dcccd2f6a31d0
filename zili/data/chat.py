"""Chat templates: a conversation as token ids, and which of them the assistant says.

A template is the text that transformers and vLLM take as `chat_template`; those of the TeleChat family lie beside this
file. It may write special tokens; nobody who speaks in the conversation may: `zili.data.guard` keeps them apart. What a
template cannot be asked is guessed in `zili.data.manners`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zili.data.guard import BEGIN, END, OPEN, Guard
from zili.data.manners import THINK, THOUGHT, Manners, find_manners, read_arguments, split_thoughts
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
"""`role` and `content`; an assistant's may have `reasoning_content` and `tool_calls`."""
NOT_OPTIONS = frozenset(
    {
        *("self", "tokenizer", "messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("begin_said", "end_said", "bos_token", "eos_token", "unk_token", "pad_token"),
    }
)
"""What a template is given, and so no option of its own."""
_MARK = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")


@dataclass(frozen=True)
class Turn:
    """What the assistant says at one place."""

    start: int
    stop: int
    """Its tokens are those from `start` to before `stop`."""
    text: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model reads it."""

    ids: list[int]
    said: list[bool]
    """Whether the assistant says it, what ends its turn included: what is learned."""
    turns: list[Turn] = field(default_factory=list, compare=False)
    text: str = field(default="", compare=False)
    """All of it."""


@dataclass(frozen=True)
class ChatTemplate:
    """One template. Rendering is sandboxed: a template that came with a model may look at messages and no more."""

    source: str
    name: str = "chat template"
    _compiled: Callable[..., str] = field(init=False, repr=False, compare=False)
    _guards: WeakKeyDictionary[Tokenizer, Guard] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_guards", WeakKeyDictionary())
        try:
            object.__setattr__(self, "_compiled", _environment().from_string(self.source).render)
        except (jinja2.TemplateError, RecursionError) as error:
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
        """The template beside a model, as transformers looks for it; None where there is none.

        Raises: DataError, it is there and cannot be read.
        """
        if (file := folder / "chat_template.jinja").is_file():
            return cls(_text(file), str(file))
        for name in ("chat_template.json", "tokenizer_config.json"):
            if (file := folder / name).is_file() and (text := _template_in(file)):
                return cls(text, str(file))
        return None

    def manners(self, tokenizer: Tokenizer | None = None) -> Manners:
        """How it has a model speak; of a tokenizer, whose tokens it may ask for by their role."""
        return find_manners(self._bare({})) if tokenizer is None else self._guard(tokenizer).manners

    def _bare(self, roles: Mapping[str, str]) -> Callable[..., str]:
        """The template without marks of what is said, asked for an answer or not."""

        def render(**given: Any) -> str:
            neutral = {"tools": None, "add_generation_prompt": False, "begin_said": "", "end_said": "", "bos_token": ""}
            return self._compiled(**{**neutral, "eos_token": "", **roles, **given})

        return render

    def _guard(self, tokenizer: Tokenizer) -> Guard:
        guard = self._guards.get(tokenizer)
        if guard is None:
            manners = find_manners(self._bare(tokenizer.roles))
            guard = self._guards[tokenizer] = Guard(tokenizer, manners, self.source, self.name)
        return guard

    @cached_property
    def asks_for(self) -> frozenset[str]:
        """Names that it looks up: of options others change nothing."""
        return frozenset(meta.find_undeclared_variables(_environment().parse(self.source)))

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
        continue_final_message: bool = False,
        **options: Any,
    ) -> Rendered:
        """The ids of `messages`, of which `add_generation_prompt` ends with what an answer begins after, and
        `continue_final_message` with the last one's content, to go on with.

        `options` are the template's own, such as enable_thinking. An assistant's content that begins with
        `<think>...</think>` is taken apart into thoughts and answer where the template writes thoughts, and else said
        as it is.

        Raises:
            DataError: a message without role or content, a role that the template has not, a text that holds a mark
                which the tokenizer has no token for, or a template that fails.
        """
        guard = self._guard(tokenizer)
        said = [_normal(message, guard) for message in messages]
        if continue_final_message and said:
            said[-1]["content"] += OPEN
        try:
            text = self._compiled(
                messages=said,
                tools=guard.broken(tools),
                add_generation_prompt=add_generation_prompt,
                begin_said=BEGIN,
                end_said=END,
                **{"bos_token": "", **tokenizer.roles},
                **{name: guard.broken(value) for name, value in options.items()},
            )
        except DataError:
            raise
        except Exception as error:  # a template is a foreign program, and raises whatever it likes
            raise DataError(f"{self.name} cannot say this conversation: {error}") from error
        if continue_final_message:
            text, found, _ = text.rpartition(OPEN)
            if not found:
                raise DataError(f"{self.name} does not write the last message as it is: it cannot be continued")
        return _tokens(guard, text)


def _tokens(guard: Guard, text: str) -> Rendered:
    ids: list[int] = []
    said: list[bool] = []
    turns: list[Turn] = []
    whole, spoken = [], ""
    begun: int | None = None
    for part in guard.pieces(text):
        if part.text in (BEGIN, END):
            if begun is not None:
                turns.append(Turn(begun, len(ids), spoken))
            begun, spoken = (len(ids) if part.text == BEGIN else None), ""
            continue
        ids += part.ids
        said += [begun is not None] * len(part.ids)
        whole.append(part.text)
        spoken += part.text if begun is not None else ""
    return Rendered(ids, said, turns, "".join(whole))


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


def _normal(message: Message, guard: Guard) -> dict[str, Any]:
    """With a role and a content, thoughts apart from it where the template writes them, and arguments as tables; all
    marks in it broken."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"a message's role is {role!r}; it must be one of {', '.join(ROLES)}")
    if content is not None and not isinstance(content, str):
        raise DataError(f"a message of {role} has content of type {type(content).__name__}; text is read")
    normal = {**message, "content": content or ""}
    inline = None
    if role == "assistant":
        thoughts = None if normal.get("reasoning_content") else split_thoughts(normal["content"])
        if thoughts and guard.manners.thinks:
            normal |= {"reasoning_content": thoughts[0], "content": thoughts[1]}
        elif thoughts:
            inline = _with_thoughts(normal["content"], guard)
        normal["tool_calls"] = [_normal_call(call) for call in message.get("tool_calls") or []]
    broken = guard.broken({key: value for key, value in normal.items() if key != "role"})
    return {"role": role, **broken, **({} if inline is None else {"content": inline})}


def _with_thoughts(content: str, guard: Guard) -> str:
    """A content that begins with thoughts, as it is: those two tags are the assistant's to say."""
    before, _, rest = content.partition(THINK)
    thoughts, _, answer = rest.partition(THOUGHT)
    return f"{before}{THINK}{guard.broken(thoughts)}{THOUGHT}{guard.broken(answer)}"


def _normal_call(call: Any) -> dict[str, Any]:
    """As OpenAI has it, which templates are written for: the function inside."""
    inner = call.get("function") or call if isinstance(call, Mapping) else {}
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"a tool call has no name: {str(call)[:100]}")
    arguments = read_arguments(inner.get("arguments"))
    if arguments is None:
        raise DataError(f"the arguments of a call of {inner['name']} are no JSON object")
    function = {"name": inner["name"], "arguments": arguments}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": function}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}).") from error


def _template_in(file: Path) -> str | None:
    """A JSON file's `chat_template`; of several named ones the one named default."""
    try:
        config = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: broken JSON ({error}).") from error
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


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
