"""Fields that OpenAI's and vLLM's documents name and that are not served: refused where they would change an answer."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import Repr
from typing import Any

from zili.serving.http.refusal import Refusal

Neutral = tuple[Any, ...]
"""Values that are as if there were none."""

_ABSENT: Neutral = ()
_FALSE: Neutral = (False,)
_EMPTY: Neutral = ([], {}, "")
_BOTH: dict[str, Neutral] = {
    # OpenAI
    "service_tier": ("auto", "default"),
    # vLLM: how tokens are drawn
    "use_beam_search": _FALSE,
    "length_penalty": (1,),
    "include_stop_str_in_output": _FALSE,
    "truncate_prompt_tokens": _ABSENT,
    "prompt_logprobs": _ABSENT,
    "logprob_token_ids": _EMPTY,
    "watermarking": _FALSE,
    "allowed_token_ids": _ABSENT,
    "bad_words": _EMPTY,
    "logits_processors": _EMPTY,
    "repetition_detection": _ABSENT,
    "thinking_token_budget": (-1,),
    # vLLM: what is answered
    "return_tokens_as_token_ids": _FALSE,
    "return_token_ids": _FALSE,
    # vLLM: how it is worked on
    "priority": (0,),
    "cache_salt": _ABSENT,
    "kv_transfer_params": _EMPTY,
    "ec_transfer_params": _EMPTY,
    "routed_experts_prompt_start": (0,),
    "vllm_xargs": _EMPTY,
    # vLLM's forms of before, now structured_outputs
    "guided_json": _ABSENT,
    "guided_regex": _ABSENT,
    "guided_choice": _ABSENT,
    "guided_grammar": _ABSENT,
    "guided_json_object": _FALSE,
    "guided_decoding_backend": _ABSENT,
    "guided_whitespace_pattern": _ABSENT,
    "structural_tag": _ABSENT,
}
_CHAT: dict[str, Neutral] = {
    # OpenAI
    "audio": _ABSENT,
    "functions": _EMPTY,
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "moderation": _ABSENT,
    "store": _FALSE,
    "verbosity": ("medium",),
    "web_search_options": _ABSENT,
    # vLLM
    "add_special_tokens": _FALSE,
    "best_of": (1,),
    "chat_template": _ABSENT,
    "documents": _EMPTY,
    "echo": _FALSE,
    "include_reasoning": (True,),
    "media_io_kwargs": _EMPTY,
    "mm_processor_kwargs": _EMPTY,
    "return_prompt_text": _FALSE,
}
_COMPLETIONS: dict[str, Neutral] = {"suffix": _EMPTY, "prompt_embeds": _ABSENT}
_PASSED = {
    *("metadata", "prediction", "safety_identifier", "user"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    # vLLM; what only says how to do what is not served, how many tokens an event has, or is for other routes
    *("spaces_between_special_tokens", "truncation_side", "stream_interval", "session_id"),
    *("return_token_offsets", "return_mm_kwargs"),
}
"""Fields that change no answer of ours whatever they are: named here so that it is known that they were thought of."""

_SHORT = Repr()
"""Of a list of millions `str` writes all, and holds Python's lock meanwhile."""


def refuse_unserved(given: Mapping[str, Any], *, chat: bool) -> None:
    """Raises: Refusal, a field is not served and not as if it were absent; 400 with its name."""
    for name, neutral in {**_BOTH, **(_CHAT if chat else _COMPLETIONS)}.items():
        value = given.get(name)
        # In Python 0 is False, and here it is not.
        if value is not None and not any(
            value == one and (type(value) is bool) == (type(one) is bool) for one in neutral
        ):
            instead = "; structured_outputs is" if name.startswith("guided_") else ""
            shown = value[:80] if isinstance(value, str) else _SHORT.repr(value)[:80]
            raise Refusal(400, f"{name}: {shown} is not served{instead}", param=name)
