"""Answers that must have a form: a JSON schema, a regular expression, the calls of tools. xgrammar tells the tokens
that may come next (Dong et al. 2024).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zili.data.manners import ANSWER_TAGS, THOUGHT
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError
from zili.serving import patterns
from zili.serving.schemas import kept

if TYPE_CHECKING:
    import xgrammar

_LONGEST = 65_536
"""Characters of a schema or an expression."""
_CACHE_BYTES = 256 << 20
_WHITESPACE = 32
"""Characters in a row between the parts of JSON, so that an answer cannot be lost in them."""

Part = dict[str, Any]
"""A format of xgrammar's structural tags."""


class Guide:
    """Where in its form one answer is."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, stop_ids: Collection[int]) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=sorted(stop_ids))
        self._bits = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        self._apply = xgrammar.apply_token_bitmask_inplace

    def allowed(self, scores: Tensor) -> Tensor:
        """`scores [V]`, minus infinity where a token cannot come next.

        Raises: ConfigError, no token can.
        """
        if self._matcher.fill_next_token_bitmask(self._bits):
            scores = scores.clone()
            self._apply(scores, self._bits[0])
            if scores.max() == -float("inf"):
                raise ConfigError("the tokenizer has no token that goes on with the form that was asked for")
        return scores

    def accept(self, token: int) -> None:
        """It has come."""
        self._matcher.accept_token(token)


class Forms:
    """Compiles forms for one tokenizer. Each method returns what makes a `Guide` for each answer; from any thread.

    Raises, each: ConfigError, that is no such form, or xgrammar is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._lock = threading.Lock()
        self._made: xgrammar.GrammarCompiler | None = None

    def of(self, *parts: Part, thinking: bool = False) -> Callable[[], Guide]:
        """Parts in a row; with `thinking` after the thoughts that the prompt has opened."""
        if len(json.dumps(parts)) > _LONGEST:
            raise ConfigError(f"the form is longer than {_LONGEST:,} characters")
        before = [{"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": THOUGHT}] if thinking else []
        whole = {"type": "sequence", "elements": [*before, *parts]}
        with self._lock:  # the first makes the compiler, and two at once would take each other's CPUs
            compiler = self._compiler()
            try:
                compiled = compiler.compile_structural_tag({"type": "structural_tag", "format": whole})
            except (ValueError, RuntimeError) as error:  # whatever its C++ finds
                raise ConfigError(f"the form cannot be compiled: {_first_line(error)}") from error
        return lambda: Guide(compiled, self._stop_ids)

    def _compiler(self) -> xgrammar.GrammarCompiler:
        if self._made is None:
            try:
                import xgrammar
            except ImportError as error:
                raise ConfigError("forms need xgrammar: pip install 'zili[serve]'") from error
            info = _vocabulary(self._tokenizer, self._stop_ids)
            self._made = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)
        return self._made


def schema(given: dict[str, Any] | bool) -> Part:
    """JSON that is valid under a schema; `{"type": "object"}` is any object.

    Raises: ConfigError, naming the keyword that cannot be kept.
    """
    return _json(kept(given))


def _json(made: dict[str, Any]) -> Part:
    return {"type": "json_schema", "json_schema": made, "max_whitespace_cnt": _WHITESPACE}


def regex(pattern: str) -> Part:
    """Text that matches as a whole. Raises: ConfigError, no expression, or one that cannot be kept."""
    return {"type": "regex", "pattern": patterns.of_text(pattern)}


def grammar(ebnf: str) -> Part:
    """Text of a grammar in GBNF, whose rule `root` is all of it."""
    return {"type": "grammar", "grammar": ebnf}


def one_of(texts: Collection[str]) -> Part:
    """One of some texts."""
    return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in texts]}


def calls(tools: list[dict[str, Any]], *, several: bool, tagged: bool) -> Part:
    """At least one call of `tools`, as a chat template has them called: `tagged` as TeleChat3-Coder's, or Hermes'."""
    made = [(_tagged if tagged else _hermes)(tool["function"]) for tool in tools]
    if several:
        return {"type": "tags_with_separator", "tags": made, "separator": "\n", "at_least_one": True}
    return {"type": "or", "elements": made}


def _hermes(function: dict[str, Any]) -> Part:
    begin = f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": '
    return {"type": "tag", "begin": begin, "content": _json(_arguments(function)), "end": "}\n</tool_call>"}


def _tagged(function: dict[str, Any]) -> Part:
    wanted = _arguments(function)
    unsaid = set(wanted) & {"anyOf", "$ref", "patternProperties", "minProperties", "maxProperties"}
    if unsaid:
        raise ConfigError(f"tools: parameters of {function['name']}: {min(unsaid)} cannot be kept in calls by tags")
    named = {name: wanted[name] for name in ("$defs",) if name in wanted}
    parts = []
    for name, value in wanted.get("properties", {}).items():
        content = {"type": "any_text"} if value == {"type": "string"} else _json({**value, **named})
        begin = f"<param_key>{name}</param_key><param_value>"
        part = {"type": "tag", "begin": begin, "content": content, "end": "</param_value>"}
        parts.append(part if name in wanted.get("required", ()) else {"type": "optional", "content": part})
    inside = {"type": "sequence", "elements": parts} if parts else {"type": "const_string", "value": ""}
    return {"type": "tag", "begin": f"<tool_call>{function['name']}", "content": inside, "end": "</tool_call>"}


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
        raise ConfigError(f"tools: parameters of {function['name']}: {error}") from error


def _vocabulary(tokenizer: Tokenizer, stop_ids: Collection[int]) -> xgrammar.TokenizerInfo:
    import xgrammar

    hidden = {id_ for token, id_ in tokenizer.special_tokens.items() if token not in ANSWER_TAGS}
    texts = [""] * tokenizer.vocab_size  # a token without text is never allowed
    for token, id_ in tokenizer.tokens().items():
        if id_ not in hidden:
            texts[id_] = token
    kinds = {"ByteLevel": xgrammar.VocabType.BYTE_LEVEL, "ByteFallback": xgrammar.VocabType.BYTE_FALLBACK}
    used = tokenizer.decoders()
    kind = next((kind for name, kind in kinds.items() if name in used), xgrammar.VocabType.RAW)
    return xgrammar.TokenizerInfo(texts, kind, stop_token_ids=sorted(stop_ids))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\S+:\d+: ", "", lines[0])  # without the place in xgrammar's source
