"""Answers that are held to a form, whatever a model would rather say."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

import openai
import pytest
import torch
from served import KEYS, Place, serve_a_tiny_model, tiny_tokenizer
from waiting import until

from zili.data import reply
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError
from zili.serving.forms import guides
from zili.serving.forms.guides import TooManyForms
from zili.serving.forms.structure import Forms, Part, calls, grammar, one_of, regex, schema
from zili.serving.http import api

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
ASKED: Any = [{"role": "user", "content": "snow?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def forms(tokenizer: Tokenizer) -> Forms:
    return Forms(tokenizer, {tokenizer.end_id})


def allows(forms: Forms, tokenizer: Tokenizer, form: Part, text: str, *, thinking: str = "") -> bool:
    """Whether `text`, and then its end, may be said."""
    guide = forms.of(form, thinking=thinking)()
    for id_ in [*tokenizer.encode(text).tolist(), tokenizer.end_id]:
        if guide.allowed(torch.zeros(tokenizer.vocab_size))[id_] < 0:
            return False
        guide.accept(id_)
    return True


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Xi\'an", "days": 3}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
TAGGED = (
    '<tool_call>weather<param_key>city</param_key><param_value>Xi\'an < "3"</param_value>'
    "<param_key>days</param_key><param_value>3</param_value></tool_call>"
)
one, several = calls(TOOLS, several=False, style=reply.HERMES), calls(TOOLS, several=True, style=reply.HERMES)
tagged = calls(TOOLS, several=False, style=reply.TAGGED)
WORDS = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"]},
        "code": {"type": "string", "pattern": "^[0-9]{2}$"},
        "either": {"anyOf": [{"type": "string", "maxLength": 2}, {"const": "none"}]},
        "perhaps": {"type": ["string", "null"]},
    },
    "required": ["unit", "code", "either"],
}
GLM = reply.CallStyle(
    True, "\n", key=reply.Tags("<arg_key>", "</arg_key>"), value=reply.Tags("<arg_value>", "</arg_value>")
)
glm = calls(TOOLS, several=False, style=GLM)
words = calls([{"function": {"name": "w", "parameters": WORDS}}], several=False, style=reply.TAGGED)


def tagged_call(**given: str) -> str:
    inside = "".join(f"<param_key>{key}</param_key><param_value>{value}</param_value>" for key, value in given.items())
    return f"<tool_call>w{inside}</tool_call>"


CASES: list[tuple[Part, str, bool]] = [
    (schema(CITY), '{"city": "北京", "days": 3}', True),
    (schema(CITY), '{\n  "city": "x"\n}', True),
    (schema(CITY), '{"days": 3}', False),
    (schema(CITY), '{"city": "x", "days": 3.5}', False),
    (schema(CITY), '{"city": "x"} and more', False),
    (schema(CITY), '{"city": "x"' + " " * 200 + "}", False),
    (schema({"type": "object"}), '{"a": [1, {"b": null}]}', True),
    (schema({"type": "object"}), "[1]", False),
    (regex(r"\d{3}-\d{4}"), "555-1234", True),
    (regex(r"\d{3}-\d{4}"), "555-12345", False),
    (one_of(["red", "blue"]), "blue", True),
    (one_of(["red", "blue"]), "b", False),
    (grammar('root ::= "a" root | "b"'), "aaab", True),
    (one, HERMES, True),
    (one, NOW, True),
    (one, HERMES + "\n" + NOW, False),
    (several, HERMES + "\n" + NOW, True),
    (one, HERMES.replace("weather", "wether"), False),
    (one, HERMES.replace("3", '"3"'), False),
    (one, "Let me see.", False),
    (tagged, TAGGED, True),
    (tagged, TAGGED.replace("<param_value>3", "<param_value>three"), False),
    (tagged, "<tool_call>weather</tool_call>", False),
    (tagged, "<tool_call>now</tool_call>", True),
    (glm, TAGGED.replace("param", "arg").replace("><", ">\n<").replace("weather<", "weather\n<"), True),
    (glm, TAGGED, False),
    (words, tagged_call(unit="C", code="07", either="5"), True),
    (words, tagged_call(unit="F", code="07", either="none", perhaps="null"), True),
    (words, tagged_call(unit="F", code="07", either="5", perhaps='"so"'), True),
    (words, tagged_call(unit='"C"', code="07", either="5"), False),
    (words, tagged_call(unit="C", code='"07"', either="5"), False),
    (words, tagged_call(unit="C", code="07", either="567"), False),
]


@pytest.mark.parametrize(("form", "text", "may"), CASES)
def test_what_may_be_said(forms: Forms, tokenizer: Tokenizer, form: Part, text: str, may: bool) -> None:
    assert allows(forms, tokenizer, form, text) == may


def test_thoughts_come_before_the_form(forms: Forms, tokenizer: Tokenizer) -> None:
    assert allows(forms, tokenizer, one_of(["red"]), "Is it red? Yes.</think>red", thinking="</think>")
    assert not allows(forms, tokenizer, one_of(["red"]), "Is it red? Yes.</think>blue", thinking="</think>")


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (schema, {"type": "nonsense"}, "nonsense"),
        (schema, {"$ref": "#/nowhere"}, "nowhere"),
        (schema, {"type": "string", "pattern": "("}, r"pattern.*\)"),
        (schema, {"enum": ["x" * 70_000]}, "longer than 65,536"),
        (regex, "(", r"\)"),
        (grammar, "root := x", "EBNF"),
        (regex, "a" * 100_000, "longer than 65,536"),
        (regex, "(?=a)b", "cannot be kept"),
        (regex, "a^b", "cannot be kept"),
    ],
)
def test_what_is_no_form(forms: Forms, make: Callable[[Any], Part], given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        forms.of(make(given))


# ---- over the API, from a model of random weights


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(KEYS, context=1024)


CHOICE = {
    "type": "object",
    "properties": {"colour": {"enum": ["white", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "choice", "schema": CHOICE, "strict": True}}
PAINT: Any = {"type": "function", "function": {"name": "paint", "parameters": CHOICE}}
WAIT: Any = {"type": "function", "function": {"name": "wait"}}


def test_json_of_a_schema(place: Place) -> None:
    for seed in range(3):
        answer = place.client().chat.completions.create(
            model="tiny", messages=ASKED, response_format=FORMAT, seed=seed, n=2, logprobs=True
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop" and choice.message.content is not None
            said = json.loads(choice.message.content)
            assert said["colour"] in ("white", "blue") and isinstance(said["sure"], bool) and len(said) == 2


def test_a_stream_and_a_completion_of_a_pattern(place: Place) -> None:
    outputs = {"structured_outputs": {"regex": r"\d{3}-\d{4}"}, "ignore_eos": True}
    parts = place.client().chat.completions.create(model="tiny", messages=ASKED, stream=True, extra_body=outputs)
    assert re.fullmatch(r"\d{3}-\d{4}", "".join(part.choices[0].delta.content or "" for part in parts))
    answer = place.client().completions.create(
        model="tiny", prompt=["snow", "sky"], max_tokens=20, extra_body={"structured_outputs": {"choice": ["a", "bb"]}}
    )
    assert all(choice.text in ("a", "bb") and choice.finish_reason == "stop" for choice in answer.choices)


def test_calls_that_must_be_made(place: Place) -> None:
    named: Any = {"type": "function", "function": {"name": "paint"}}
    for choice in ("required", named):
        answer = place.client().chat.completions.create(
            model="tiny",
            messages=ASKED,
            tools=[PAINT, WAIT] if choice == named else [PAINT],
            tool_choice=choice,
            parallel_tool_calls=False,
            seed=1,
        )
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and call.function.name == "paint"
        assert json.loads(call.function.arguments)["colour"] in ("white", "blue")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema comes with"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, ")"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "one of json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [WAIT], "tool_choice": {"type": "function", "function": {"name": "paint"}}}, "no tool 'paint'"),
    ],
)
def test_refusals(place: Place, more: dict[str, Any], said: str) -> None:
    status, answer = place.post("/v1/chat/completions", {"messages": ASKED, **more})
    assert status == 400 and said in answer["error"]["message"], answer


def test_others_answer_while_one_is_held(place: Place) -> None:
    """A form changes nothing for who has none."""
    plain = place.client().completions.create(model="tiny", prompt="snow", temperature=0, max_tokens=30).choices[0].text
    both = place.client().chat.completions.with_raw_response
    with pytest.raises(openai.BadRequestError):
        both.create(model="tiny", messages=ASKED, extra_body={"structured_outputs": {"regex": "["}})
    place.client().chat.completions.create(model="tiny", messages=ASKED, response_format=FORMAT)
    again = place.client().completions.create(model="tiny", prompt="snow", temperature=0, max_tokens=30)
    assert again.choices[0].text == plain


def test_a_costly_form_ends_its_own_answer_alone(place: Place) -> None:
    """Masks of this one double: the 28th takes a quarter of a second, some tokens later one takes minutes."""
    plain: Any = {"model": "tiny", "prompt": "snow", "temperature": 0, "max_tokens": 100}
    alone = place.client().completions.create(**plain).choices[0].text
    said: list[tuple[int, dict[str, Any]]] = []
    push = {str(place.served.tokenizer.encode("a").tolist()[0]): 100}
    costly = {"prompt": "a", "max_tokens": 200, "logit_bias": push}
    costly["structured_outputs"] = {"regex": "(((a{1,60}){1,60}){1,60}){1,60}"}
    other = threading.Thread(target=lambda: said.append(place.post("/v1/completions", costly)))
    other.start()
    until(lambda: place.served.engine.load[0] > 0 or bool(said), seconds=60)
    assert place.client().completions.create(**plain).choices[0].text == alone
    other.join(120)
    (status, answer) = said[0]
    assert status == 400 and "takes too long" in answer["error"]["message"]
    again = place.post("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["blue"]}})
    assert again[0] == 200 and again[1]["choices"][0]["text"] == "blue"


def test_forms_that_wait_have_a_bound(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "a", "structured_outputs": {"choice": ["blue"]}}
    monkeypatch.setattr(api, "_MOST_FORMING", 0)
    status, answer = place.post("/v1/completions", body)
    assert status == 503 and "wait to be compiled" in answer["error"]["message"]
    monkeypatch.setattr(api, "_MOST_FORMING", 1)
    assert [place.post("/v1/completions", body)[0] for _ in range(2)] == [200, 200]


def test_a_form_is_compiled_once_and_its_process_ends_with_it(forms: Forms, monkeypatch: pytest.MonkeyPatch) -> None:
    one = forms.of(regex("a+"))
    assert forms.of(regex("a+")) is one
    monkeypatch.setattr(guides, "_MOST", 0)
    with pytest.raises(TooManyForms):
        forms.of(regex("b+"))
    monkeypatch.setattr(guides, "_MOST", 48)
    guide = one()
    one._line.close()  # as where the system ends it
    with pytest.raises(ConfigError, match="too long or too much memory"):
        guide.accept(0)
    assert guide.ready
    assert forms.of(regex("a+")) is not one


def test_a_machine_that_has_no_time_for_a_form_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one did whose processes of another priority came first: a client waited for minutes."""
    here, there = Pipe()
    parent = type("Parent", (), {"alive": True, "fork": lambda self: here})()
    monkeypatch.setattr(guides._Parent, "of", lambda vocabulary: parent)
    monkeypatch.setattr(guides, "_PATIENCE", 0.05)
    with pytest.raises(TooManyForms, match="no time to compile"):
        guides.Processes(dict).form({"parts": []})
    assert there.poll(5) and there.recv_bytes() and there.poll(5), "its process is told to end"
