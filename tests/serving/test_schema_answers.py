"""What is said for a JSON schema is valid under it, as another library has it; else its keyword is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zili.data.reply import HERMES, TAGGED
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError
from zili.serving.forms.schemas import kept
from zili.serving.forms.structure import Forms, calls, schema

TOKENIZER = Tokenizer.train(['\t\n\\ "" {}[],: 0123456789 true false null 北京 é 🦊 abcdefgh'] * 4, 300)
TEXTS = [TOKENIZER.decode([id_]) for id_ in range(TOKENIZER.vocab_size)]
FORMS = Forms(TOKENIZER, {TOKENIZER.end_id})
WHOLE: Any = {"type": "integer"}
TEXT: Any = {"type": "string"}


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def answers(wanted: Any, seed: int, tries: int = 3, longest: int = 120) -> Iterator[str]:
    """What a model that says anything it may has said by the end, if it came to one."""
    make, chance = FORMS.of(schema(wanted)), random.Random(seed)
    for _ in range(tries):
        guide, ids = make(), list[int]()
        while len(ids) < longest:
            may = torch.nonzero(guide.allowed(torch.zeros(TOKENIZER.vocab_size)) == 0).flatten().tolist()
            if TOKENIZER.end_id in may and (len(may) == 1 or chance.random() < 0.6):
                yield TOKENIZER.decode(ids)
                break
            may = [id_ for id_ in may if id_ != TOKENIZER.end_id]
            closing = [id_ for id_ in may if TEXTS[id_] in {'"', "}", "]", '":'}]
            some = closing if closing and chance.random() < (0.5 if len(ids) > 30 else 0.2) else may
            ids.append(chance.choice([id_ for id_ in some if TEXTS[id_].strip()] or some))
            guide.accept(ids[-1])


def check(wanted: Any, seed: int = 0, **how: int) -> int:
    """How many answers were valid. Raises ConfigError: it is refused."""
    validator = jsonschema_rs.validator_for(wanted, validate_formats=True)
    count = 0
    for text in answers(wanted, seed, **how):
        value = json.loads(text)
        try:
            # A number beyond those of 64 bits is JSON, and none of this library; so is half a surrogate pair.
            assert validator.is_valid(value) or "Infinity" in json.dumps(value), (wanted, text)
        except ValueError as error:
            assert "surrogate" in str(error), (wanted, text)
        count += 1
    return count


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "object", "required": ["a"]},
        # xgrammar takes these two for one, as "title" says nothing of a schema.
        closed(a=closed(title=WHOLE), b=closed(title=TEXT)),
        {"type": "string", "minLength": 1, "maxLength": 5},  # said with raw tabs
        {"type": "string", "pattern": "^.{3}$"},  # said with bytes that are no UTF-8
        {"type": "string", "pattern": r"^[^\s]\W$"},
        {"type": "string", "pattern": "^(a|b)$|^cc$", "minLength": 1, "maxLength": 2},
        {"type": "string", "format": "date-time"},
        {"type": "string", "format": "email"},
        {"type": "string", "format": "ipv6"},
        {"type": "string", "format": "uri"},
        {"type": "string", "enum": ["a", 1]},
        {"const": 'x"\\\n\u0001é🦊/'},
        {"type": "integer", "minimum": 3.5, "exclusiveMaximum": 6},
        {"type": "number", "exclusiveMinimum": -0.3, "maximum": 0.1},
        {"type": "array", "minItems": 2, "maxItems": 3},
        {"type": "array", "prefixItems": [True, TEXT], "minItems": 3, "maxItems": 3},
        {"type": "object", "properties": {"a": WHOLE}, "additionalProperties": TEXT},
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": WHOLE},
        {"type": "object", "propertyNames": False},
        {"type": "object", "propertyNames": {"pattern": "^[a-c]{2}$"}, "additionalProperties": WHOLE},
        {"type": "object", "properties": dict.fromkeys("abcd", WHOLE), "minProperties": 2, "maxProperties": 3},
        {"oneOf": [closed(kind={"const": "a"}, value=WHOLE), closed(kind={"const": "b"}, value=TEXT)]},
        {"properties": {"next": {"$ref": "#"}, "n": {"$ref": "#/$defs/a~1b%25"}}, "$defs": {"a/b%": WHOLE}},
        {"allOf": [{"$ref": "#/$defs/a"}], "description": "x", "$defs": {"a": {"type": ["string", "null"]}}},
    ],
)
def test_what_is_kept(wanted: Any) -> None:
    assert sum(check(wanted, seed) for seed in range(2))


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ({"type": "object", "properties": {"a": WHOLE}, "allOf": [{"required": ["a"]}, {"required": ["b"]}]}, "allOf"),
        ({"allOf": [WHOLE, {"minimum": 3}]}, "allOf"),
        ({"type": "array", "items": WHOLE, "minItems": 3, "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "anyOf": [{"required": ["a"]}]}, "anyOf"),
        ({"oneOf": [WHOLE, {"type": "number"}]}, "oneOf"),
        ({"oneOf": [{"required": ["a"]}, WHOLE]}, "oneOf"),
        ({"not": TEXT}, "not"),
        ({"if": TEXT, "then": TEXT}, "if"),
        ({"type": "array", "contains": WHOLE}, "contains"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "object", "patternProperties": {"^a": WHOLE}, "properties": {"ab": TEXT}}, "patternProperties"),
        ({"type": "object", "additionalProperties": WHOLE, "minProperties": 2}, "minProperties"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "required"),
        ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": WHOLE}}, "minimum"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, r"\$ref"),
        ({"$ref": "https://example.com/a"}, r"\$ref"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf"),
        ({"type": "integer", "multipleOf": 7, "minimum": 1}, "multipleOf"),
        ({"type": "number", "minimum": 1e-8, "maximum": 2e-8}, "minimum"),
        ({"type": "integer", "minimum": 1.2, "maximum": 1.8}, "minimum"),
        ({"type": "integer", "exclusiveMinimum": 1, "maximum": 1}, "exclusiveMinimum"),
        *(
            ({"minLength": 1, word: 10**400}, word)
            for word in ("minimum", "exclusiveMaximum", "multipleOf", "minItems")
        ),
        ({"const": 10**400}, "const"),
        ({"type": "array", "items": [WHOLE]}, "items"),
        ({"$ref": "#/$defs/a/$defs/b", "$defs": {"a": {"$id": "x", "$defs": {"b": {"$ref": "#/$defs/c"}}}}}, r"\$id"),
        ({"type": "string", "pattern": "^(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": "a^b"}, "pattern"),
        ({"type": "string", "pattern": '^"a"$'}, "pattern"),
        ({"type": "string", "pattern": r"^\p{L}$"}, "pattern"),
        ({"type": "string", "pattern": "(?i)a"}, "pattern"),
        ({"type": "string", "pattern": "a+", "maxLength": 3}, "maxLength"),
        ({"type": "string", "pattern": "a", "format": "date"}, "pattern"),
        ({"type": "string", "format": "regex"}, "format"),
        ({"enum": [2**70]}, "enum"),
        ({"enum": []}, "enum"),
        ({"type": "object", "properties": {"a": {"items": {"not": {}}}}}, "not .*properties/a/items"),
    ],
)
def test_what_is_refused(wanted: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=f"^{word}"):
        kept(wanted)


def test_a_schema_of_any_depth() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ConfigError, match="deeper"):
        kept(deep)


def test_calls_with_what_is_not_kept() -> None:
    tool = {"function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"not": WHOLE}}}}}
    for style in (HERMES, TAGGED):
        with pytest.raises(ConfigError, match="parameters of add: not"):
            calls([tool], several=False, style=style)


# ---- any schema

NAMES = st.sampled_from(["a", "b", "title", "default", "日", 'x"', "kind"])
PATTERNS = st.sampled_from(
    ["^[a-c]+$", "a|b", "^.{1,3}$", r"^\d+$", "[^x]", r"^\S{2}$", "^(a|b)?c$", r"\w@\w", '"', "^a$|b", r"^\s*$", "日"]
)
FEW = st.integers(0, 4)
BOUNDS = st.integers(-3, 12) | st.floats(-5, 5).map(lambda value: round(value, 3))
CONSTANTS = st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["a", "é"]) | st.floats(-2, 2)


def some(type_: str | None = None, **words: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A schema with some of these keywords."""
    said: dict[str, Any] = {} if type_ is None else {"type": st.just(type_)}
    return st.fixed_dictionaries(said, optional=words)


NUMBERS = dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), BOUNDS)
SIMPLE = st.one_of(
    st.sampled_from([True, False, {}, {"type": "null"}, {"type": ["number", "string"]}, {"$ref": "#/$defs/d"}]),
    some("integer", multipleOf=st.sampled_from([1, 2, 0.5, 7]), **NUMBERS),
    some("number", multipleOf=st.sampled_from([1, 0.1]), **NUMBERS),
    some("string", minLength=FEW, maxLength=FEW, pattern=PATTERNS, format=st.sampled_from(["date", "email", "int32"])),
    some(minLength=FEW, minimum=BOUNDS, required=st.lists(NAMES, max_size=2, unique=True)),
    some(enum=st.lists(CONSTANTS, min_size=1, max_size=3), type=st.sampled_from(["string", "integer", "boolean"])),
    st.fixed_dictionaries({"const": CONSTANTS}),
)


def compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    counts = {"minProperties": FEW, "maxProperties": FEW, "additionalProperties": inner}
    required = st.lists(NAMES, max_size=3, unique=True)
    return st.one_of(
        some("object", properties=st.dictionaries(NAMES, inner, max_size=4), required=required, **counts),
        some("object", patternProperties=st.dictionaries(PATTERNS, inner, max_size=2), **counts),
        some("object", propertyNames=some(pattern=PATTERNS, minLength=FEW), **counts),
        some("array", items=inner, prefixItems=several, minItems=FEW, maxItems=FEW, uniqueItems=st.booleans()),
        some(anyOf=several, title=st.just("x")),
        some(oneOf=several),
        some(allOf=several),
    )


SCHEMAS = st.builds(
    lambda one, other: {**one, "$defs": {"d": other}} if isinstance(one, dict) else one,
    st.recursive(SIMPLE, compound, max_leaves=6),
    SIMPLE,
)


def holds(wanted: Any, seed: int, **how: int) -> None:
    try:
        check(wanted, seed, **how)
    except ConfigError as error:
        assert str(error)


@given(SCHEMAS, st.integers(0, 10**6))
@settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_some_schemas(wanted: Any, seed: int) -> None:
    holds(wanted, seed, tries=1, longest=40)


@pytest.mark.slow
@given(SCHEMAS, st.integers(0, 10**6))
@settings(max_examples=3000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_many_schemas(wanted: Any, seed: int) -> None:
    holds(wanted, seed)
