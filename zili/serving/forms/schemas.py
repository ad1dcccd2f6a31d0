"""JSON schemas in the words that xgrammar keeps.

xgrammar (0.2.9, cpp/json_schema_converter.cc) passes over many keywords, and over others beside those that it reads: it
takes `$ref`, `const`, `enum`, `anyOf`, ... in this order and nothing beside them. So a schema is written anew here, as
one whose texts it can say are all valid under what was asked, or it is refused with the keyword's name. What is left
may be narrower: objects with named properties have no others, and a pattern is matched from end to end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from zili.serving.forms.scalars import MOST_PARTS, Schema, count, is_number, number, refuse, rewritten, string

_DEEPEST = 64
_LARGEST = 2**63 - 1
"""A whole number that xgrammar reads as one."""
_SPOKEN = {
    "object": {
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties"),
    },
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
"""The keywords that say something of one type alone."""
_SINGLE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_NOT_KEPT = (
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains"),
    *("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "extends", "disallow"),
)
_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: is_number(value) and value == math.floor(value),
    "number": lambda value: is_number(value),  # noqa: PLW0108 (defined below)
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def kept(schema: Schema | bool) -> Schema:
    """A schema for xgrammar whose every text is valid under `schema`.

    Raises:
        ConfigError: none is; the message begins with the keyword that cannot be kept, and says where.
    """
    return _Reader(schema).whole()


class _Reader:
    """Reads one schema, each place that is referred to once."""

    def __init__(self, root: Schema | bool) -> None:
        self._root = root
        self._names: dict[str, str] = {}
        """Of the places that are referred to."""
        self._tags = 0

    def whole(self) -> Schema:
        root = self._read(self._root, "", 0)
        made: dict[str, Schema] = {}
        while len(made) < len(self._names):
            for pointer, name in list(self._names.items()):
                if name not in made:
                    made[name] = self._read(self._at(pointer), pointer, 0)
        try:
            TopologicalSorter({name: set(_in_place(part)) for name, part in made.items()}).prepare()
        except CycleError:
            refuse("$ref", "", "one that leads to itself cannot be kept")
        return {**root, "$defs": made} if made else root

    def _read(self, schema: Any, at: str, depth: int) -> Schema:
        if schema is True:
            return {}
        if schema is False:
            refuse("false", at, "nothing is valid")
        if not isinstance(schema, dict):
            refuse("schema", at, f"{str(schema)[:40]!r} is none")
        if depth > _DEEPEST:
            refuse("schema", "", f"nested deeper than {_DEEPEST}")
        for word in _NOT_KEPT:
            if word in schema:
                refuse(word, at, "it cannot be kept")
        if "$id" in schema and at:
            refuse("$id", at, "it cannot be kept but at the top")
        single = next((word for word in _SINGLE if word in schema), None)
        if single is not None:
            return self._single(single, schema, at, depth)
        types = self._types(schema, at)
        parts = [self._typed(type_, schema, at, depth) for type_ in types]
        return {} if not parts else parts[0] if len(parts) == 1 else {"anyOf": parts}

    # ---- what xgrammar takes alone

    def _single(self, word: str, schema: Schema, at: str, depth: int) -> Schema:
        beside = [other for other in ("type", *_SINGLE, *sorted(set().union(*_SPOKEN.values()))) if other in schema]
        alone = {word, "type", "const", "enum"} if word in ("const", "enum") else {word}
        other = next((other for other in beside if other not in alone), None)
        if other is not None:
            named = other if word in ("$ref", "const", "enum") else word
            refuse(named, at, f"{word} beside {other} cannot be kept")
        if word == "$ref":
            return {"$ref": f"#/$defs/{self._name(schema[word], at)}"}
        if word in ("const", "enum"):
            return {"enum": self._values(schema, at)}
        arms = schema[word]
        if not isinstance(arms, list) or not arms:
            refuse(word, at, "it must be a list of schemas")
        if word == "allOf" and len(arms) > 1:
            refuse(word, at, "more than one cannot be kept at once")
        if word == "oneOf":
            for one, another in combinations(arms, 2):
                if not (self._apart(one, another) and self._apart(another, one)):
                    refuse(word, at, "two of them may be valid at once; give them a property with different constants")
        # Nothing is valid under false.
        read = [
            self._read(arm, f"{at}/{word}/{number}", depth + 1) for number, arm in enumerate(arms) if arm is not False
        ]
        if not read:
            refuse(word, at, "nothing is valid")
        return read[0] if len(read) == 1 else {"anyOf": read}

    def _name(self, pointer: Any, at: str) -> str:
        if not isinstance(pointer, str) or (pointer != "#" and not pointer.startswith("#/")):
            refuse("$ref", at, f"{pointer!r} is no place in the schema (#/...)")
        self._at(pointer[1:])
        return self._names.setdefault(pointer[1:], f"d{len(self._names)}")

    def _at(self, pointer: str) -> Any:
        place = self._root
        for step in pointer.split("/")[1:]:
            if isinstance(place, dict) and place is not self._root and "$id" in place:
                refuse("$id", "", f"it cannot be kept on the way to #{pointer[:80]}: other places are meant below it")
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(place, dict) and name in place:
                place = place[name]
            elif isinstance(place, list) and name.isascii() and name.isdecimal() and int(name[:9]) < len(place):
                place = place[int(name)]
            else:
                refuse("$ref", "", f"there is no #{pointer}")
        return place

    def _values(self, schema: Schema, at: str) -> list[Any]:
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list):
            refuse("enum", at, "it must be a list")
        types = self._types(schema, at) or list(_TYPES)
        fitting = [
            value
            for value in values
            if any(_TYPES[type_](value) for type_ in types)
            and ("const" not in schema or _written(value) == _written(schema["const"]))
        ]
        word = "enum" if "enum" in schema else "const"
        if not fitting:
            refuse(word, at, "nothing is valid")
        if not all(_is_said(value) for value in fitting):
            refuse(word, at, "a number beyond 64 bits, or none, cannot be kept")
        return fitting

    # ---- oneOf

    def _apart(self, one: Any, other: Any) -> bool:
        """Whether nothing that is said for `one` is valid under `other`, as far as that is easily seen."""
        one, other = self._followed(one), self._followed(other)
        if one is False or other is False:
            return True
        if not isinstance(one, dict) or not isinstance(other, dict):
            return False
        mine, theirs = _finite(one), _finite(other)
        if mine is not None and theirs is not None:
            return not mine & theirs
        common = self._possible(one) & self._possible(other)
        if not common:
            return True
        return common == {"object"} and self._differ(one, other)

    def _differ(self, one: Schema, other: Schema) -> bool:
        required, others = set(_strings(one, "required", "")), _table(other, "properties", "")
        if other.get("additionalProperties") is False and "patternProperties" not in other and required - set(others):
            return True
        mine = _table(one, "properties", "")
        for name in required & set(others) & set(mine):
            said, valid = _finite(self._followed(mine[name])), _finite(self._followed(others[name]))
            if said is not None and valid is not None and not said & valid:
                return True
        return False

    def _possible(self, schema: Schema) -> set[str]:
        """Types of what is valid; numbers are one."""
        finite = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(finite, list):
            found = {name for value in finite for name, holds in _TYPES.items() if holds(value)}
        else:
            found = set(self._types({"type": schema["type"]}, "") if "type" in schema else _TYPES)
        return {"number" if name == "integer" else name for name in found}

    def _followed(self, schema: Any) -> Any:
        for _ in range(_DEEPEST):
            if isinstance(schema, dict) and isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
                schema = self._at(schema["$ref"][1:])
            elif isinstance(schema, dict) and isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1:
                schema = schema["allOf"][0]
            else:
                return schema
        return True

    # ---- one type

    def _types(self, schema: Schema, at: str) -> list[str]:
        """Those that are named, or that its keywords speak of; none: any."""
        if "type" not in schema:
            return [type_ for type_, words in _SPOKEN.items() if words & set(schema)]
        given = schema["type"]
        types = given if isinstance(given, list) else [given]
        wrong = next((one for one in types if not isinstance(one, str) or one not in _TYPES), None)
        if wrong is not None or not types:
            refuse("type", at, f"{wrong!r} is none; they are {', '.join(_TYPES)}")
        return [one for one in dict.fromkeys(types) if one != "integer" or "number" not in types]

    def _typed(self, type_: str, schema: Schema, at: str, depth: int) -> Schema:
        if type_ == "object":
            return self._object(schema, at, depth)
        if type_ == "array":
            return self._array(schema, at, depth)
        if type_ == "string":
            return string(schema, at)
        if type_ in ("number", "integer"):
            return number(type_, schema, at)
        return {"type": type_}

    def _object(self, schema: Schema, at: str, depth: int) -> Schema:
        named, extra, key = self._members(schema, at)
        required = _strings(schema, "required", at)
        if key is not None and required:
            refuse("required", at, "it cannot be kept beside patternProperties or propertyNames")
        for name in required:
            if named.setdefault(name, extra) is False:
                refuse("required", at, f"{name!r} may not be there")
        parts = {
            name: self._read(one, f"{at}/properties/{name}", depth + 1)
            for name, one in named.items()
            if one is not False
        }
        least, most = count(schema, "minProperties", at) or 0, count(schema, "maxProperties", at)
        if parts:
            return self._closed(parts, required, least, most, at)
        if extra is False or most == 0:
            if least:
                refuse("minProperties", at, "there may be none")
            return {"type": "object", "properties": {}, "additionalProperties": False}
        if least > 1 or (most is not None and least > most):
            refuse("minProperties", at, f"{least} cannot be kept among names that may be repeated")
        counts = {"minProperties": least} if least else {}
        counts |= {} if most is None else {"maxProperties": min(most, MOST_PARTS)}
        value = self._read(extra, f"{at}/additionalProperties", depth + 1)
        if key is not None:
            return {"type": "object", "patternProperties": {key: value}, "additionalProperties": False, **counts}
        return {"type": "object", "additionalProperties": value, **counts} if value or counts else {"type": "object"}

    def _members(self, schema: Schema, at: str) -> tuple[Schema, Any, str | None]:
        """Properties by name, what others are, and an expression for the names of these; None: any."""
        named, extra = dict(_table(schema, "properties", at)), schema.get("additionalProperties", True)
        by_pattern, names = _table(schema, "patternProperties", at), schema.get("propertyNames", True)
        if by_pattern:
            if len(by_pattern) > 1 or named or names is not True:
                refuse("patternProperties", at, "more than one, or one beside properties, cannot be kept")
            ((pattern, value),) = by_pattern.items()
            return {}, value, rewritten(pattern, at)
        if names is True:
            return named, extra, None
        names = {"enum": []} if names is False else names
        values = names.get("enum") if isinstance(names, dict) else None
        if isinstance(values, list) and not (_words(names) - {"enum", "type"}):
            chosen = [name for name in values if isinstance(name, str)]
            return {name: named.get(name, extra) for name in chosen}, False, None
        if not isinstance(names, dict) or named or _words(names) - {"type", *_SPOKEN["string"]}:
            refuse("propertyNames", at, "a list of names, or a pattern or a length without properties, can be kept")
        return named, extra, string(names, at).get("pattern")

    def _closed(self, parts: Schema, required: list[str], least: int, most: int | None, at: str) -> Schema:
        """With these properties and no others."""
        needed = set(required)
        if least > len(parts):
            refuse("minProperties", at, f"{least} are more than the {len(parts)} that are named")
        if most is not None and most < max(len(needed), least):
            refuse("maxProperties", at, f"{most} are fewer than must be there")
        # xgrammar takes two schemas for one that differ only in properties of some names, such as "title".
        self._tags += 1
        made: Schema = {"type": "object", "properties": parts, "additionalProperties": False, "zili": self._tags}
        made |= {"required": sorted(needed)} if needed else {}
        made |= {"minProperties": least} if least > len(needed) else {}
        return made | ({} if most is None or most >= len(parts) else {"maxProperties": most})

    def _array(self, schema: Schema, at: str, depth: int) -> Schema:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if not isinstance(first, list):
            refuse("prefixItems", at, "it must be a list of schemas")
        if isinstance(rest, list):
            refuse("items", at, "a list of schemas is prefixItems")
        least, most = count(schema, "minItems", at) or 0, count(schema, "maxItems", at)
        if schema.get("uniqueItems", False) is not False and most not in (0, 1):
            refuse("uniqueItems", at, "it cannot be kept")
        if least > MOST_PARTS or (most is not None and least > most):
            refuse("minItems", at, f"{least} are too many")
        ends = [number for number, one in enumerate(first) if one is False]
        ends += [most] if most is not None and most <= len(first) else []
        if ends:
            first, rest = first[: min(ends)], False
        parts = [self._read(one, f"{at}/prefixItems/{number}", depth + 1) for number, one in enumerate(first)]
        made: Schema = {"type": "array", **({"prefixItems": parts} if parts else {})}
        made |= {"minItems": least} if least else {}
        if rest is False:
            if least > len(parts):
                refuse("minItems", at, f"{least} are more than there may be")
            return {**made, "items": False}
        item = self._read(rest, f"{at}/items", depth + 1)
        made |= {} if most is None else {"maxItems": min(most, MOST_PARTS)}
        return {**made, "items": item} if item or len(made) > 1 else made


def _in_place(part: Schema) -> Iterator[str]:
    """What `part` is, or may be, without anything said before."""
    if "$ref" in part:
        yield part["$ref"].rpartition("/")[2]
    for arm in part.get("anyOf", ()):
        yield from _in_place(arm)


def _finite(schema: Any) -> set[str] | None:
    """Its values, where they are named and plain."""
    if not isinstance(schema, dict):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(isinstance(value, float | list | dict) for value in values):
        return None
    return {_written(value) for value in values}


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _is_said(value: Any) -> bool:
    """Whether xgrammar writes a constant as it is."""
    if isinstance(value, list):
        return all(map(_is_said, value))
    if isinstance(value, dict):
        return all(map(_is_said, value.values()))
    if isinstance(value, int):
        return -_LARGEST <= value <= _LARGEST
    return not isinstance(value, float) or math.isfinite(value)


def _words(schema: Schema) -> set[str]:
    """Its keywords that say what is valid."""
    return set(schema) & {"type", *_SINGLE, *_NOT_KEPT, *set().union(*_SPOKEN.values())}


def _table(schema: Schema, word: str, at: str) -> Schema:
    found = schema.get(word, {})
    if not isinstance(found, dict):
        refuse(word, at, "it must be an object of schemas")
    return found


def _strings(schema: Schema, word: str, at: str) -> list[str]:
    found = schema.get(word, [])
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        refuse(word, at, "it must be a list of names")
    return found
