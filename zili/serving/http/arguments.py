"""Arguments of a call that stand between tags: a text is written there without quotes, and may look like a number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
}
_DEEPEST = 8


class Parameters:
    """Of some tools, by their schemas."""

    def __init__(self, tools: Iterable[Mapping[str, Any]]) -> None:
        """`tools` as OpenAI has them."""
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

    def read(self, tool: str, name: str, text: str, value: Any) -> Any:
        """What an argument is: `value`, which `text` is in JSON, or the text itself."""
        named = self._schemas.get(tool, {}).get("properties")
        types = _types(named.get(name) if isinstance(named, dict) else None)
        if "string" not in types:
            return value
        fits = any(
            isinstance(value, _TYPES[type_]) and isinstance(value, bool) == (type_ == "boolean")
            for type_ in types - {"string"}
        )
        # Where only texts may be, quotes are part of one.
        return value if fits or (isinstance(value, str) and types != {"string"}) else text


def _types(schema: Any, depth: int = 0) -> set[str]:
    """Types that a schema names, where it says so easily; none: any."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if "type" not in schema and isinstance(values, list) and values and all(isinstance(one, str) for one in values):
        return {"string"}
    if arms := next((schema[word] for word in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(word), list)), None):
        of_arms = [_types(arm, depth + 1) for arm in arms]
        return set().union(*of_arms) if all(of_arms) else set()
    given = schema.get("type", [])
    named = {one for one in (given if isinstance(given, list) else [given]) if isinstance(one, str)}
    return named if named <= {"string", *_TYPES} else set()
