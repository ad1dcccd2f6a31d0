"""Every field that OpenAI's and vLLM's documents name: what is absent, what is done, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from zili.serving.protocol import BaseModel, ChatRequest, CompletionRequest, TokenizeRequest

ASKED: list[Any] = [{"role": "user", "content": "snow?"}]
BODIES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatRequest, {"messages": ASKED}),
    (CompletionRequest, {"prompt": "snow"}),
    (TokenizeRequest, {"prompt": "snow"}),
]


@pytest.mark.parametrize(("model", "body"), BODIES)
def test_null_is_absent(model: type[BaseModel], body: dict[str, Any]) -> None:
    plain = model.model_validate(body)
    names = {field.alias or name for name, field in model.model_fields.items() if not field.is_required()}
    assert model.model_validate({**body, **dict.fromkeys(names)}) == plain
    described = model.model_json_schema()["properties"]
    assert all({"type": "null"} in described[name]["anyOf"] for name in names)


def test_null_is_absent_inside() -> None:
    tool: Any = {"type": None, "function": {"name": "add", "description": None, "strict": None}}
    asked = ChatRequest.model_validate(
        {
            "messages": [{"role": "assistant", "content": None, "tool_calls": None, "name": None}],
            "stream_options": {"include_usage": None},
            "response_format": {"type": "json_object", "json_schema": None},
            "structured_outputs": {"regex": None, "json": {"const": None}, "choice": None},
            "tools": [tool],
            "logit_bias": {"5": None},
            "chat_template_kwargs": {"enable_thinking": None},
        }
    )
    assert not asked.with_usage and not asked.logit_bias and not asked.chat_template_kwargs
    assert asked.offered == [{"type": "function", "function": {"name": "add"}}]
    assert asked.structured_outputs is not None and asked.structured_outputs.json_ == {"const": None}
