"""What is asked over HTTP: OpenAI's requests, as far as they are served, with the limits of each field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_MOST_CHOICES = 16


class _Asked(BaseModel):
    """Fields that chat and completions share. Unknown fields are let pass, as OpenAI's clients send ever new ones."""

    model_config = ConfigDict(extra="ignore", strict=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer; empty ones end nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False


class Message(BaseModel):
    """One turn. Content may come in parts, of which text is read."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        rest = {"reasoning_content": self.reasoning_content, "tool_calls": self.tool_calls}
        return {"role": role, "content": content, **{name: value for name, value in rest.items() if value}}


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Function(BaseModel):
    """What a tool is: its description goes to the chat template as it is."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """One of `tools`."""

    type: Literal["function"] = "function"
    function: Function


class ChatRequest(_Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that may be called, as a chat template takes them."""
        tools = self.tools if self.tool_choice == "auto" else None
        return [tool.model_dump(exclude_none=True) for tool in tools or []]

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Asked):
    """`POST /v1/completions`."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(BaseModel):
    """`POST /tokenize`."""

    prompt: str
    add_special_tokens: bool = False


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    tokens: list[Annotated[int, Field(ge=0)]]


for _request in (_Asked, ChatRequest, CompletionRequest, Message, Tool):
    _request.model_rebuild()
