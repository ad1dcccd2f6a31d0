"""How one model is spoken to and answers: a chat template together with the tokenizer whose tokens it writes.

Whoever trains on conversations, asks a model or reads its answers asks a `Dialect`. A template may write special
tokens; nobody who speaks in the conversation may: `zili.data.guard` keeps them apart. `zili.data.manners` guesses what
a template cannot be asked. To add a family of models, add a file to `templates/` and a line to `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from zili.data.chat import ChatTemplate
from zili.data.guard import BEGIN, END, OPEN, Guard
from zili.data.manners import Manners, find_manners
from zili.data.reply import HERMES, CallStyle, Reply, read_arguments
from zili.data.tokenizer import DOCUMENT_ENDS, Tokenizer
from zili.errors import DataError

_FAMILIES = (
    ("telechat3", ("<_user>", "<_bot>", "<think>")),
    ("telechat2", ("<_user>", "<_bot>", "<_system>")),
    ("telechat1", ("<_user>", "<_bot>")),
    ("chatml", ("<|im_start|>", "<|im_end|>")),
)
"""Templates, and special tokens by which a tokenizer is known to be of their models; the first that fits is taken."""
_OPENING = 16
"""Tokens at the end of a prompt in which it may open the answer's thoughts."""
ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
"""`role` and `content`; an assistant's may have `reasoning_content` and `tool_calls`."""
NOT_OPTIONS = frozenset(
    {
        *("self", "tokenizer", "messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("begin_said", "end_said", "bos_token", "eos_token", "unk_token", "pad_token"),
    }
)
"""Names that a template is given by the renderer; a request cannot set them as options."""


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


def find_dialect(tokenizer: Tokenizer, own: ChatTemplate | None = None, named: str | None = None) -> Dialect | None:
    """The dialect of a model with this tokenizer. Its template is the `named` one (one of Zili's, or a file), else the
    model's `own`, else that of the family which its special tokens are of. None: there is none.

    Raises: DataError, there is no template of that name.
    """
    special = tokenizer.special_tokens
    families = (name for name, marks in _FAMILIES if all(mark in special for mark in marks))
    if named is None and own is not None:
        return Dialect(own, tokenizer)
    named = named or next(families, None)
    return None if named is None else Dialect.named(named, tokenizer)


@dataclass(frozen=True)
class Dialect:
    """A template in the tokens of a tokenizer."""

    template: ChatTemplate
    tokenizer: Tokenizer

    @classmethod
    def named(cls, name: str, tokenizer: Tokenizer) -> Dialect:
        """In the template of a name, as of `ChatTemplate.named`."""
        return cls(ChatTemplate.named(name), tokenizer)

    @property
    def name(self) -> str:
        """The template's."""
        return self.template.name

    @cached_property
    def manners(self) -> Manners:
        """What was found out about the template, which may ask for this tokenizer's tokens by their role."""
        return find_manners(lambda **given: self.template.write(**{**self.tokenizer.roles, **given}))

    @cached_property
    def _guard(self) -> Guard:
        return Guard(self.tokenizer, self.manners.marks, self.template.source, self.name)

    # ---- what ends an answer

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that do: those the model's own files name, and the template's."""
        named = [*DOCUMENT_ENDS, *(mark.text for mark in self.manners.ends)]
        found = (self.tokenizer.token_id(text) for text in named)
        return self.tokenizer.end_ids | {number for number in found if number is not None}

    @cached_property
    def end_texts(self) -> tuple[str, ...]:
        """Texts that do, of a template whose marks are no tokens; empty where they are."""
        ends = self.manners.ends
        if any(self.tokenizer.token_id(mark.text) is not None for mark in ends):
            return ()
        return tuple(mark.text if mark.anywhere else f"\n{mark.text}" for mark in ends)

    def answer_text(self, ids: Iterable[int]) -> str:
        """The text of an answer, without what ends it."""
        said = self.tokenizer.decode([number for number in ids if number not in self.end_ids])
        for end in self.end_texts:
            said = said.partition(end)[0]
        return said

    # ---- thoughts and calls

    def opening(self, prompt: Sequence[int]) -> str:
        """The beginning of an answer's thoughts that a prompt holds already, such as `<think>\\n`; mostly empty."""
        return self.manners.opening(self.tokenizer.decode(prompt[-_OPENING:]))

    @property
    def call_style(self) -> CallStyle:
        """How calls are written; Hermes' where the template does not say, or in a way that is not read back here."""
        return self.manners.calls or HERMES

    def reply(self, *, opened: bool = False, tools: Sequence[Mapping[str, Any]] = ()) -> Reply:
        """Reads one answer as it comes, which may call `tools`; `opened`: its prompt has opened its thoughts."""
        return Reply(thinking=opened, tools=tools, think=self.manners.think, calls=self.call_style)

    # ---- conversations

    def render(
        self,
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
        `<think>...</think>`, or with thoughts in the template's own tags, is taken apart into thoughts and answer where
        the template writes thoughts, and else said as it is.

        Raises:
            DataError: a message without role or content, a role that the template has not, a text that holds a mark
                which the tokenizer has no token for, or a template that fails.
        """
        guard = self._guard
        said = [self._normal(message) for message in messages]
        if continue_final_message and said:
            said[-1]["content"] += OPEN
        given = {
            **{"messages": said, "tools": guard.broken(tools), "add_generation_prompt": add_generation_prompt},
            **{name: guard.broken(value) for name, value in options.items()},
        }
        try:
            text = self.template.write(**self.tokenizer.roles, **given, begin_said=BEGIN, end_said=END)
        except DataError:
            raise
        except Exception as error:  # a template is a foreign program, and raises whatever it likes
            raise DataError(f"{self.name} cannot say this conversation: {error}") from error
        if continue_final_message:
            text, found, _ = text.rpartition(OPEN)
            if not found:
                raise DataError(f"{self.name} does not write the last message as it is: it cannot be continued")
        return _tokens(guard, text)

    def _normal(self, message: Message) -> dict[str, Any]:
        """With a role and a content, thoughts apart from it where the template writes them, and arguments as tables;
        all marks in it broken."""
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"a message's role is {role!r}; it must be one of {', '.join(ROLES)}")
        if content is not None and not isinstance(content, str):
            raise DataError(f"a message of {role} has content of type {type(content).__name__}; text is read")
        normal = {**message, "content": content or ""}
        inline = None
        if role == "assistant":
            thoughts = None if normal.get("reasoning_content") else self.manners.split(normal["content"])
            if thoughts and self.manners.thinks:
                normal |= {"reasoning_content": thoughts[0], "content": thoughts[1]}
            elif thoughts:
                inline = self._with_thoughts(normal["content"])
            normal["tool_calls"] = [_normal_call(call) for call in message.get("tool_calls") or []]
        broken = self._guard.broken({key: value for key, value in normal.items() if key != "role"})
        return {"role": role, **broken, **({} if inline is None else {"content": inline})}

    def _with_thoughts(self, content: str) -> str:
        """A content that begins with thoughts, as it is: those two tags are the assistant's to say."""
        begin, end = self.manners.think
        before, _, rest = content.partition(begin)
        thoughts, _, answer = rest.partition(end)
        broken = self._guard.broken
        return f"{before}{begin}{broken(thoughts)}{end}{broken(answer)}"


def _tokens(guard: Guard, text: str) -> Rendered:
    ids: list[int] = []
    said: list[bool] = []
    turns: list[Turn] = []
    whole, spoken = [], ""
    begun: int | None = None
    for part in guard.segments(text):
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
