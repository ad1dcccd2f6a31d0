"""What is asked over HTTP: OpenAI's requests, as far as they are served, with the limits of each field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic import BaseModel as _BaseModel
from pydantic_core import from_json

from zili.data.reply import CallStyle
from zili.serving.forms import structure
from zili.serving.generate.generation import Sampling
from zili.serving.http.refusal import Refusal
from zili.serving.http.unserved import refuse_unserved


def _integral(value: Any) -> Any:
    # In JSON 1.0 is a whole number as well as 1.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _all_integral(value: Any) -> Any:
    return [_integral(one) for one in value] if isinstance(value, list) else value


_MOST_CHOICES = 16
_MOST_ITEMS = 8192
"""Longest list that is not of tokens. More items make no conversation that fits into a context."""
_MOST_IDS = 1 << 20
_LONGEST_STOP = 1024

Whole = Annotated[int, BeforeValidator(_integral)]
_Id = Annotated[int, Field(ge=0)]
# A list's first wrong item ends its validation: a body of wrong ones would take gigabytes to say so of each.
Ids = Annotated[list[_Id], Field(min_length=1, max_length=_MOST_IDS, fail_fast=True), BeforeValidator(_all_integral)]
_Stop = Annotated[str, Field(max_length=_LONGEST_STOP)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Several = Field(min_length=1, max_length=_MOST_ITEMS, fail_fast=True)
_Any = Field(max_length=_MOST_ITEMS, fail_fast=True)


def _given(value: Any) -> Any:
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


class BaseModel(_BaseModel):
    """Nothing is taken for what it is not: "5" is no number. What is null is absent, as clients mean it."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return _given(data)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        made = handler(core)
        inside = handler.resolve_ref_schema(made)
        for name, one in inside.get("properties", {}).items():
            if name not in inside.get("required", ()) and {"type": "null"} not in one.get("anyOf", ()):
                inside["properties"][name] = {"anyOf": [one, {"type": "null"}]}
        return made


class _Asked(BaseModel):
    """Fields that chat and completions share. Fields that no document names pass: clients send ever new ones."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    max_tokens: Annotated[Whole, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[Whole, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    min_tokens: Annotated[Whole, Field(ge=0)] = 0
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Annotated[Whole, Field(ge=0)]], Field(max_length=64, fail_fast=True)] = []
    n: Annotated[Whole, Field(ge=1, le=_MOST_CHOICES)] = 1
    logit_bias: Annotated[dict[str, _Bias | None], AfterValidator(_given)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    request_id: Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_served(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse_unserved(data, chat="messages" in cls.model_fields)
        return data

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer; empty ones end nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    def sampling(self, seed: int) -> Sampling:
        """How tokens are drawn."""
        return Sampling(
            self.temperature,
            self.top_p,
            max(0, self.top_k),  # -1 is all, too
            self.repetition_penalty,
            seed,
            self.min_p,
            self.frequency_penalty,
            self.presence_penalty,
        )

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def with_usage_so_far(self) -> bool:
        return self.with_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def formed(self) -> dict[str, Any] | None:
        """What of the request says how the answer must look; None: it may look as it likes."""
        said = self.response_format is not None and self.response_format.type != "text"
        return self._of_form() if said or self.structured_outputs is not None else None

    def _of_form(self) -> dict[str, Any]:
        named = {"response_format", "structured_outputs", "tools", "tool_choice", "parallel_tool_calls"}
        return self.model_dump(include=named, by_alias=True, exclude_unset=True)

    @property
    def form(self) -> structure.Part | None:
        """What the answer must look like; None: as it likes. It may take long to say."""
        if self.structured_outputs is not None:
            return self.structured_outputs.form
        return None if self.response_format is None else self.response_format.form


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: usage comes with each event, where it comes at all."""


class JsonSchema(BaseModel):
    """Of `response_format`."""

    name: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")] = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format`, OpenAI's way to a form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with the type json_schema, and only with it")
        return self

    @property
    def form(self) -> structure.Part | None:
        if self.json_schema is not None:
            return structure.schema(self.json_schema.schema_)
        return structure.schema({"type": "object"}) if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """`structured_outputs`, vLLM's way to a form: one of these."""

    model_config = ConfigDict(extra="forbid")

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], _Several] | None = None
    grammar: str | None = None
    json_object: bool = False
    # How vLLM would go about it.
    disable_fallback: bool = False
    disable_any_whitespace: Annotated[bool, Field(json_schema_extra={"const": False})] = False
    disable_additional_properties: bool = False

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        forms = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        if self.disable_any_whitespace:  # no Literal, to which 0 is False
            raise ValueError("disable_any_whitespace: true is not served")
        if sum(one is not None for one in forms) != 1:
            raise ValueError("one of json, regex, choice, grammar and json_object")
        if isinstance(self.json_, str):
            self.json_ = from_json(self.json_, allow_inf_nan=False)  # `json` fails otherwise for what is nested deep
            if not isinstance(self.json_, dict):
                raise ValueError("json: a schema is an object")
        return self

    @property
    def form(self) -> structure.Part:
        if isinstance(self.json_, dict) or self.json_object:
            return structure.schema(self.json_ if isinstance(self.json_, dict) else {"type": "object"})
        if self.regex is not None:
            return structure.regex(self.regex)
        return structure.one_of(self.choice) if self.choice else structure.grammar(self.grammar or "")


class Message(BaseModel):
    """One turn. Content may come in parts, of which text is read."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], _Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """As vLLM calls it now."""
    refusal: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], _Any] | None = None
    function_call: dict[str, Any] | None = None
    """As OpenAI had it before there were `tool_calls`."""
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("audio") is not None:
            raise Refusal(400, "messages: one has audio; this model reads text", param="messages")
        parts = data.get("content") if isinstance(data, dict) else None
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise Refusal(
                    400, f"messages: a part is of type {kind[:80]!r}; this model reads text", param="messages"
                )
        return data

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        calls = [*(self.tool_calls or []), *([{"function": self.function_call}] if self.function_call else [])]
        rest = {
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_calls": calls,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
        }
        said = {name: value for name, value in rest.items() if value}
        return {"role": role, "content": content or self.refusal or "", **said}


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


class _Named(BaseModel):
    name: str


class OneTool(BaseModel):
    """`tool_choice` that names one."""

    type: Literal["function"] = "function"
    function: _Named


class ChatRequest(_Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], _Several]
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | OneTool = "auto"
    parallel_tool_calls: bool = True
    max_completion_tokens: Annotated[Whole, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] = 0
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    reasoning_effort: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_given)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: it and add_generation_prompt exclude each other")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: they come with logprobs")
        return self

    @model_validator(mode="after")
    def _known_tool(self) -> ChatRequest:
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice: there are no tools to call")
        if isinstance(self.tool_choice, OneTool) and not self.offered:
            raise ValueError(f"tool_choice: there is no tool {self.tool_choice.function.name!r}")
        return self

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that may be called, as a chat template takes them."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        if isinstance(self.tool_choice, OneTool):
            tools = [tool for tool in tools if tool.function.name == self.tool_choice.function.name]
        return [tool.model_dump(exclude_none=True) for tool in tools]

    @property
    def formed(self) -> dict[str, Any] | None:
        return self._of_form() if self.offered and self.tool_choice != "auto" else super().formed

    def form_with_calls(self, style: CallStyle) -> structure.Part | None:
        """What the answer must look like, calls of tools in a style included."""
        if not self.offered or (self.tool_choice == "auto" and self.form is None):
            return self.form
        several = self.parallel_tool_calls and not isinstance(self.tool_choice, OneTool)
        calls = structure.calls(self.offered, several=several, style=style)
        return {"type": "or", "elements": [calls, self.form]} if self.tool_choice == "auto" else calls

    @property
    def longest(self) -> int | None:
        """Tokens of an answer at most; None: as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def told(self) -> int | None:
        """Number of likeliest tokens whose log-probabilities are returned beside each token's; None: none."""
        return self.top_logprobs if self.logprobs else None

    @property
    def echoed(self) -> bool:
        """Whether log-probabilities of the prompt are returned too."""
        return False


class CompletionRequest(_Asked):
    """`POST /v1/completions`."""

    prompt: str | Ids | Annotated[list[str], _Several] | Annotated[list[Ids], _Several]
    max_tokens: Annotated[Whole, Field(ge=0)] | None = 16
    echo: bool = False
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool = True
    best_of: Annotated[Whole, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _each_is_sent(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise Refusal(400, f"best_of: {self.best_of} is not served, but for as many as n", param="best_of")
        return self

    @property
    def longest(self) -> int | None:
        """As of a chat."""
        return self.max_tokens

    @property
    def told(self) -> int | None:
        """As of a chat."""
        return self.logprobs

    @property
    def echoed(self) -> bool:
        """As of a chat."""
        return self.echo

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(BaseModel):
    """`POST /tokenize`."""

    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    tokens: Annotated[list[_Id], Field(max_length=_MOST_IDS, fail_fast=True), BeforeValidator(_all_integral)]


for _request in (_Asked, ChatRequest, CompletionRequest, Message, Tool):
    _request.model_rebuild()
