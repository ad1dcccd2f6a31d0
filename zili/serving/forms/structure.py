"""Answers that must have a form: a JSON schema, a regular expression, the calls of tools. xgrammar tells the tokens
that may come next (Dong et al. 2024).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from zili.data.reply import CallStyle
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError
from zili.serving.forms import patterns
from zili.serving.forms.guides import Form, Processes
from zili.serving.forms.schemas import kept

_WHITESPACE = 32
"""Characters in a row between the parts of JSON, so that an answer cannot be lost in them."""

Part = dict[str, Any]
"""A format of xgrammar's structural tags."""


class Forms:
    """Compiles forms for one tokenizer. Each method returns what makes a `Guide` for each answer; from any thread.

    Raises, each: ConfigError, that is no such form, it takes too long, or xgrammar is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int], tags: Collection[str] = ()) -> None:
        """`tags`: special tokens that an answer may have inside."""
        self._processes = Processes(lambda: _vocabulary(tokenizer, stop_ids, tags))

    def of(self, *parts: Part, thinking: str = "") -> Form:
        """Parts in a row; after the thoughts that the prompt has opened and `thinking` ends, where that is given."""
        return self._processes.form({"parts": parts, "thinking": thinking})

    def asked(self, request: dict[str, Any], *, style: CallStyle, thinking: str) -> Form:
        """What a request's `formed` says, written down where it may take as long as it likes."""
        return self._processes.form({"request": request, "calls": asdict(style), "thinking": thinking})


def schema(given: dict[str, Any] | bool) -> Part:
    """JSON that is valid under a schema; `{"type": "object"}` is any object.

    Raises: ConfigError, naming the keyword that cannot be kept.
    """
    return _json(kept(given))


def _json(made: dict[str, Any]) -> Part:
    return {"type": "json_schema", "json_schema": made, "max_whitespace_cnt": _WHITESPACE}


def regex(pattern: str) -> Part:
    """Text that matches as a whole. Raises: ConfigError, no expression, or one that cannot be kept."""
    written = patterns.of_text(pattern)
    return {"type": "regex", "pattern": written} if written else one_of([""])


def grammar(ebnf: str) -> Part:
    """Text of a grammar in GBNF, whose rule `root` is all of it."""
    return {"type": "grammar", "grammar": ebnf}


def one_of(texts: Collection[str]) -> Part:
    """One of some texts."""
    return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in texts]}


def calls(tools: list[dict[str, Any]], *, several: bool, style: CallStyle) -> Part:
    """At least one call of `tools`, as a chat template has them called."""
    made = [_call(tool["function"], style) for tool in tools]
    if several:
        return {"type": "tags_with_separator", "tags": made, "separator": "\n", "at_least_one": True}
    return {"type": "or", "elements": made}


def _call(function: dict[str, Any], style: CallStyle) -> Part:
    wanted = _arguments(function)
    inside = _tagged(function, wanted, style) if style.tagged else _json(wanted)
    return {"type": "tag", "begin": style.begin(function["name"]), "content": inside, "end": style.end}


def _tagged(function: dict[str, Any], wanted: dict[str, Any], style: CallStyle) -> Part:
    unsaid = set(wanted) & {"anyOf", "$ref", "patternProperties", "minProperties", "maxProperties"}
    if unsaid:
        raise _unkept(function, f"{min(unsaid)} cannot be kept in calls by tags")
    named = {name: wanted[name] for name in ("$defs",) if name in wanted}
    parts = []
    for name, value in wanted.get("properties", {}).items():
        if style.key.end in name or any(style.value.end in str(text) for text in value.get("enum", ())):
            raise _unkept(function, f"{name[:40]!r} holds a tag of calls")
        begin = f"{style.key.begin}{name}{style.key.end}{style.gap}{style.value.begin}"
        end = f"{style.value.end}{style.gap}"
        part = {"type": "tag", "begin": begin, "content": _untagged(value, named), "end": end}
        parts.append(part if name in wanted.get("required", ()) else {"type": "optional", "content": part})
    return {"type": "sequence", "elements": parts} if parts else {"type": "const_string", "value": ""}


def _untagged(value: dict[str, Any], named: dict[str, Any]) -> Part:
    """An argument between tags: JSON, but that a text has no quotes (`zili.data.reply` reads it)."""
    if value == {"type": "string"}:
        return {"type": "any_text"}
    if value.get("type") == "string":
        return {"type": "regex", "pattern": value["pattern"]}
    texts = value.get("enum", ())
    if texts and all(isinstance(text, str) for text in texts):
        return one_of(texts)
    arms = [_untagged(arm, named) for arm in value.get("anyOf", ())]
    if arms and not any(arm["type"] == "json_schema" for arm in arms):
        return {"type": "or", "elements": arms}
    return _json({**value, **named})


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    """What arguments of `function` are, an object; as xgrammar keeps it."""
    given = function.get("parameters") or {}
    try:
        made = kept(given)
        if not {"type", "anyOf", "$ref"} & set(made):
            made = kept({**given, "type": "object"})  # arguments are one, said or not
        elif made.get("type", "object") != "object":
            raise ConfigError("type: arguments are an object")
        return made
    except ConfigError as error:
        raise _unkept(function, str(error)) from error


def _unkept(function: dict[str, Any], why: str) -> ConfigError:
    return ConfigError(f"tools: parameters of {function['name']}: {why}")


def _vocabulary(tokenizer: Tokenizer, stop_ids: Collection[int], tags: Collection[str]) -> dict[str, Any]:
    """As `form_process` takes it."""
    hidden = {id_ for token, id_ in tokenizer.special_tokens.items() if token not in tags}
    texts = [""] * tokenizer.vocab_size  # a token without text is never allowed
    for token, id_ in tokenizer.tokens().items():
        if id_ not in hidden:
            texts[id_] = token
    kinds = {"ByteLevel": "BYTE_LEVEL", "ByteFallback": "BYTE_FALLBACK"}
    used = tokenizer.decoders
    kind = next((kind for name, kind in kinds.items() if name in used), "RAW")
    return {"texts": texts, "kind": kind, "stop_ids": sorted(stop_ids)}
