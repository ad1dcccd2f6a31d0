"""OpenAI's words for what an answer has besides its text."""

from __future__ import annotations

import uuid
from typing import Any

from zili.data.tokenizer import Tokenizer
from zili.serving.engine import Token
from zili.serving.reply import Call, Parts
from zili.serving.streaming import Stream


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


def called(call: Call) -> dict[str, Any]:
    """One of `tool_calls`."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def chat_logprobs(tokenizer: Tokenizer, tokens: list[Token]) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""

    def named(id_: int) -> dict[str, Any]:
        text = tokenizer.decode([id_])
        return {"token": text, "bytes": list(text.encode())}

    content = [
        {
            **named(token.id),
            "logprob": token.log_probability,
            "top_logprobs": [
                {**named(id_), "logprob": value}
                for id_, value in sorted(token.likeliest.items(), key=lambda pair: -pair[1])
            ],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def logprobs(tokenizer: Tokenizer, tokens: list[Token]) -> dict[str, Any]:
    """`logprobs` of a completion's choice."""
    texts = [tokenizer.decode([token.id]) for token in tokens]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    likeliest: list[dict[str, float] | None] = []
    for text, token in zip(texts, tokens, strict=True):
        if token.log_probability is None:
            likeliest.append(None)
            continue
        top = {tokenizer.decode([id_]): value for id_, value in token.likeliest.items()}
        likeliest.append({text: token.log_probability, **top})
    return {
        "tokens": texts,
        "token_logprobs": [token.log_probability for token in tokens],
        "top_logprobs": likeliest,
        "text_offset": offsets[:-1],
    }
