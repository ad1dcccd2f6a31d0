"""What is given is learned, or left out for a reason that is counted; and whatever a file holds is read or refused."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zili.data.chat import ChatTemplate
from zili.data.dialect import Dialect
from zili.data.dialogue_store import split_and_build
from zili.data.dialogues import read_dialogues
from zili.data.faithful import check_told
from zili.data.reading import read_documents
from zili.data.sources import Census
from zili.data.store import TokenStore
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
THOUGHT = {"role": "assistant", "content": "<think>\ntwo twice\n</think>\n4"}
APART = {"role": "assistant", "content": "4", "reasoning_content": "two twice"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
FUNCTION = {"name": "weather", "arguments": '{"city": "Xian"}'}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": FUNCTION}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "rain"}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def learned(folder: Path, tokenizer: Tokenizer, template: str, *records: Any) -> tuple[list[str], list[str]]:
    """What the assistant of each conversation is to learn, and the lines of the report."""
    folder.mkdir(exist_ok=True)
    file = lines(folder / "x.jsonl", *records)
    made = Dialect(ChatTemplate(template), tokenizer) if "{" in template else Dialect.named(template, tokenizer)
    report = split_and_build([file], made, folder / "data")
    store = TokenStore.open(folder / "data" / "train")
    assert store.learned is not None
    texts = []
    for number in range(len(store)):
        start, length = int(store.offsets[number]), int(store.lengths[number])
        texts.append(tokenizer.decode(store.document(number)[store.learned[start : start + length].astype(bool)]))
    return texts, report


def refused(folder: Path, tokenizer: Tokenizer, template: str, record: Any) -> tuple[str, str]:
    """Why it is not learned: the message, and the reason that it is counted by."""
    with pytest.raises(DataError) as error:
        learned(folder / "alone", tokenizer, template, record)
    fine = {"messages": [USER, ANSWER]}
    made = Dialect(ChatTemplate(template), tokenizer) if "{" in template else Dialect.named(template, tokenizer)
    file = lines(folder / "y.jsonl", fine, record)
    (line, *_) = split_and_build([file], made, folder / "skipped", on_error="skip")
    assert "1 conversation," in line or "1 pair," in line
    return str(error.value), line.partition("left out: 1 ")[2]


@pytest.mark.parametrize("template", ["telechat1", "telechat2", "telechat3", "telechat3-coder", "chatml", "smollm2"])
def test_thoughts_are_learned_or_refused(tmp_path: Path, tokenizer: Tokenizer, template: str) -> None:
    (said,), _ = learned(tmp_path, tokenizer, template, {"messages": [USER, THOUGHT]})
    assert said.startswith("<think>\ntwo twice\n</think>") and "4" in said
    if "telechat3" in template:
        return
    message, reason = refused(tmp_path, tokenizer, template, {"messages": [USER, APART]})
    assert "does not write thoughts" in message and reason.startswith("with thoughts that the template does not write")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_by_any_name(tmp_path: Path, tokenizer: Tokenizer, key: str) -> None:
    record = {"messages": [USER, {"role": "assistant", "content": "4", key: "two twice"}]}
    (said,), _ = learned(tmp_path, tokenizer, "telechat3", record)
    assert said == "<think>\ntwo twice\n</think>\n4<_end>"


def test_an_answer_whose_thoughts_are_dropped_is_not_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (said,), (line,) = learned(tmp_path, tokenizer, "telechat3", {"messages": [USER, THOUGHT, USER, APART]})
    assert said == "<think>\ntwo twice\n</think>\n4<_end>"
    assert "1 earlier answer NOT LEARNED" in line


@pytest.mark.parametrize("template", ["telechat1", "chatml", "smollm2"])
@pytest.mark.parametrize("record", [{"messages": [USER, CALL]}, {"messages": [USER, ANSWER], "tools": [TOOL]}])
def test_tools_without_a_place_are_refused(tmp_path: Path, tokenizer: Tokenizer, template: str, record: Any) -> None:
    message, reason = refused(tmp_path, tokenizer, template, record)
    assert "has no place for" in message and reason.startswith(("with tools", "with calls"))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, CALL, RESULT, ANSWER], "tools": [TOOL]},
        {
            "messages": [USER, {"role": "assistant", "function_call": FUNCTION}, RESULT, ANSWER],
            "functions": [TOOL["function"]],
        },
        {
            "messages": [
                USER,
                {"role": "tool_call", "content": json.dumps({"name": "weather", "arguments": {"city": "Xian"}})},
                {"role": "tool_response", "content": "rain"},
                ANSWER,
            ],
            "tools": json.dumps([TOOL]),
        },
    ],
)
def test_calls_in_every_spelling(tmp_path: Path, tokenizer: Tokenizer, record: Any) -> None:
    (said,), report = learned(tmp_path, tokenizer, "telechat2", record)
    assert said == '<tool_call>\n{"name": "weather", "arguments": {"city": "Xian"}}\n</tool_call><_end>4<_end>'
    assert len(report) == 1


def test_text_that_a_template_leaves_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    some = "{% for m in messages %}<_user>{% generation %}{{ m.content[:9] }}{% endgeneration %}<_end>{% endfor %}"
    long = {"role": "assistant", "content": "a long, long answer"}
    message, reason = refused(tmp_path, tokenizer, some, {"messages": [USER, long]})
    assert "leaves out of an answer: 'a long, long answer'" in message
    assert reason.startswith("with text that the template leaves out")


@pytest.mark.parametrize("name", ["weight", "loss", "loss_scale", "train"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_what_has_no_weight_is_not_learned(tmp_path: Path, tokenizer: Tokenizer, name: str, value: Any) -> None:
    wrong = {"role": "assistant", "content": "3", name: value}
    talk = [USER, wrong, USER, {**ANSWER, name: 1}]
    (said,), report = learned(tmp_path, tokenizer, "telechat2", {"messages": talk})
    assert said == "4<_end>" and len(report) == 1
    store = TokenStore.open(tmp_path / "data" / "train")
    assert "3" in tokenizer.decode(store.document(0))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "with weights that are not learned by"),
        ({"messages": [USER, {**ANSWER, "loss": "false"}]}, "with weights that are not learned by"),
        ({"messages": [{**USER, "loss": True}, ANSWER]}, "with weights that are not learned by"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "of weight 0"),
        ({"messages": [USER, ANSWER], "weight": 0}, "of weight 0"),
        ({"messages": [USER, ANSWER], "label": False}, "judged bad"),
        ({"messages": [USER, ANSWER], "kto_tag": False}, "judged bad"),
        ({"messages": [USER, ANSWER], "images": ["x.png"]}, "with more than text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "with more than text"),
        ({"messages": [USER, ANSWER], "rejected_answers": ["5"]}, "of an unknown form"),
        ({"messages": [USER, ANSWER], "chosen": "4", "rejected": None}, "of an unknown form"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ANSWER]}, "with two system prompts"),
        ({"system": "a", "messages": [{"role": "system", "content": False}, USER, ANSWER]}, "with two system prompts"),
    ],
)
def test_what_changes_what_is_learned_is_refused(tmp_path: Path, record: Any, reason: str) -> None:
    census = Census()
    found = list(
        read_dialogues(
            [lines(tmp_path / "x.jsonl", {"messages": [USER, ANSWER]}, record)], on_error="skip", census=census
        )
    )
    assert len(found) == 1 and census.skipped == {reason: 1}


SYSTEM = {"role": "system", "content": "Be brief."}
FIVE = {"role": "assistant", "content": "5"}
PAIRS: list[dict[str, Any]] = [
    {"messages": [USER, ANSWER], "rejected_response": "5"},
    {"messages": [USER, ANSWER], "rejected_messages": [USER, FIVE]},
    {"chosen": [USER, ANSWER], "rejected": [USER, FIVE]},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [FIVE]},
    {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [FIVE]},
]


@pytest.mark.parametrize("record", [{"messages": [USER, ANSWER]}, *PAIRS])
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_beside(tmp_path: Path, record: Any, key: str) -> None:
    (found,) = read_dialogues([lines(tmp_path / "x.jsonl", {key: "Be brief.", **record})])
    assert found.messages == [SYSTEM, USER, ANSWER]
    assert found.rejected == (None if record not in PAIRS else [SYSTEM, USER, FIVE])


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER]},
        {"messages": [{"role": "system", "content": None}, USER, ANSWER], "system": ""},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "messages": None},
        {
            "messages": [{**USER, "tool_calls": None}, {**ANSWER, "weight": None}],
            "tools": None,
            "rejected": None,
            "chosen": None,
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2"}, "?"]}, ANSWER], "tools": ""},
    ],
)
def test_nothing_is_none(tmp_path: Path, record: Any) -> None:
    census = Census()
    (found,) = read_dialogues([lines(tmp_path / "x.jsonl", record)], census=census)
    assert found.messages == [USER, ANSWER] and found.rejected is None and found.tools is None and not census.unused


def test_what_is_not_used_is_named_in_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {
        "id": 7,
        "source": "x",
        "empty": [],
        "messages": [{**USER, "name": "Li"}, ANSWER, USER, {**ANSWER, "id": 0}],
    }
    _, report = learned(tmp_path, tokenizer, "telechat2", record, record)
    assert report[1:] == ["in the records and not used: a turn's id (2), a turn's name (2), id (2), source (2)"]


def test_options_of_a_record_are_the_template_s(tmp_path: Path, tokenizer: Tokenizer) -> None:
    talk = {"messages": [USER, THOUGHT, USER, APART], "chat_template_kwargs": {"clear_thinking": False}}
    (said,), _ = learned(tmp_path, tokenizer, "telechat3-coder", talk)
    assert said.count("two twice") == 2


def test_lone_surrogates_are_a_counted_flaw(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "x.jsonl"
    half = '{"messages": [{"role": "user", "content": "q \\ud83d"}, {"role": "assistant", "content": "a"}]}\n'
    talks = "".join(json.dumps({"messages": [{**USER, "content": str(n)}, ANSWER]}) + "\n" for n in range(40))
    file.write_text(half + talks)
    dialect = Dialect.named("telechat2", tokenizer)
    with pytest.raises(DataError, match=r"line 1: lone surrogate U\+D83D"):
        split_and_build([file], dialect, tmp_path / "data", held_out=0.3)
    report = split_and_build([file], dialect, tmp_path / "data", held_out=0.3, on_error="skip")
    assert all("left out: 1 broken UTF-8" in line for line in report)


# ---- whatever a file holds

_NAMES = """role content messages from value user assistant system gpt human tool chosen rejected rejected_response
    prompt instruction output history weight loss tools name tool_calls function arguments function_call conversations
    dialog text {}"""
WORDS = st.sampled_from([*_NAMES.split(), "", "\ud800"])
LEAVES = st.one_of(WORDS, st.none(), st.booleans(), st.integers(-1, 2), st.floats(), st.text(max_size=3))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=12
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "call"]), "content": LEAVES},
    optional={"tool_calls": VALUES, "weight": LEAVES, "reasoning_content": LEAVES, "name": LEAVES},
)
RECORDS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {"messages": st.lists(TURN, max_size=4)},
        optional={"tools": VALUES, "system": LEAVES, "rejected_response": VALUES, "chat_template_kwargs": VALUES},
    ),
    st.fixed_dictionaries({"chosen": VALUES, "rejected": VALUES}, optional={"prompt": VALUES, "input": VALUES}),
    st.fixed_dictionaries({"instruction": LEAVES, "output": LEAVES}, optional={"history": VALUES}),
)
SUFFIXES = [".txt", ".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz", ".json.zst", ".parquet", ".md"]


def read_all(folder: Path, name: str, raw: bytes, tokenizer: Tokenizer) -> None:
    """By every reader there is; all that comes is a `DataError`."""
    file = folder / name
    file.write_bytes(raw)
    for read in (read_documents, read_dialogues):
        for on_error in ("raise", "skip"):
            try:
                for one in read([file], on_error=on_error, census=Census()):  # type: ignore[operator]
                    json.dumps(one.to_json() if hasattr(one, "to_json") else one.messages).encode()
            except DataError as error:
                str(error).encode()
    target = folder / "data"
    try:
        split_and_build([file], Dialect.named("telechat2", tokenizer), target, held_out=0.5, on_error="skip")
    except DataError as error:
        str(error).encode()
    for path in sorted(target.rglob("*"), reverse=True) if target.exists() else []:
        path.rmdir() if path.is_dir() else path.unlink()
    if target.exists():
        target.rmdir()


def fuzz_json(tmp_path: Path, tokenizer: Tokenizer, records: list[Any], suffix: str, array: bool) -> None:
    text = json.dumps(records) if array else "".join(json.dumps(record) + "\n" for record in records)
    raw = text.encode()
    read_all(tmp_path, f"x{suffix}", gzip.compress(raw) if suffix.endswith(".gz") else raw, tokenizer)


def fuzz_bytes(tmp_path: Path, tokenizer: Tokenizer, raw: bytes, suffix: str, at: int) -> None:
    whole = json.dumps({"messages": [USER, ANSWER], "text": "x"}).encode() + b"\n"
    whole = gzip.compress(whole, mtime=0) if suffix.endswith(".gz") else whole
    place = at % (len(whole) + 1)
    read_all(tmp_path, f"x{suffix}", whole[:place] + raw + whole[place:], tokenizer)


JSON_GIVEN = given(
    records=st.lists(RECORDS, max_size=3), suffix=st.sampled_from([".jsonl", ".json", ".json.gz"]), array=st.booleans()
)
BYTES_GIVEN = given(raw=st.binary(max_size=40), suffix=st.sampled_from(SUFFIXES), at=st.integers(0, 400))
FIXTURE = [HealthCheck.function_scoped_fixture]


@JSON_GIVEN
@example(records=[{"instruction": "a", "output": "b", "history": True}], suffix=".json", array=True)
@example(records=[{"messages": [USER, {"role": "assistant", "tool_calls": "x"}]}], suffix=".jsonl", array=False)
@settings(max_examples=25, deadline=None, suppress_health_check=FIXTURE)
def test_no_json_makes_a_traceback(
    tmp_path: Path, tokenizer: Tokenizer, records: list[Any], suffix: str, array: bool
) -> None:
    fuzz_json(tmp_path, tokenizer, records, suffix, array)


def test_no_nesting_makes_a_traceback(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """No example of the above: hypothesis itself cannot print it."""
    fuzz_json(tmp_path, tokenizer, [json.loads("[" * 900 + "]" * 900)], ".jsonl", array=False)


@BYTES_GIVEN
@settings(max_examples=25, deadline=None, suppress_health_check=FIXTURE)
def test_no_bytes_make_a_traceback(tmp_path: Path, tokenizer: Tokenizer, raw: bytes, suffix: str, at: int) -> None:
    fuzz_bytes(tmp_path, tokenizer, raw, suffix, at)


@pytest.mark.slow
@JSON_GIVEN
@settings(max_examples=int(os.environ.get("ZILI_FUZZ", "1500")), deadline=None, suppress_health_check=FIXTURE)
def test_much_json(tmp_path: Path, tokenizer: Tokenizer, records: list[Any], suffix: str, array: bool) -> None:
    fuzz_json(tmp_path, tokenizer, records, suffix, array)


@pytest.mark.slow
@BYTES_GIVEN
@settings(max_examples=int(os.environ.get("ZILI_FUZZ", "1500")), deadline=None, suppress_health_check=FIXTURE)
def test_many_bytes(tmp_path: Path, tokenizer: Tokenizer, raw: bytes, suffix: str, at: int) -> None:
    fuzz_bytes(tmp_path, tokenizer, raw, suffix, at)


def test_what_was_told_is_found_in_time_in_proportion(tokenizer: Tokenizer) -> None:
    """Each of these took a look through all of the text."""
    sort = "{% for k, v in c.function.arguments | dictsort(reverse=true) %}{{ k }}{{ v }}{% endfor %}"
    template = ChatTemplate(
        "{% for m in messages %}<_user>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
        f"{{{{ c.function.name }}}}{sort}</tool_call>{{% endfor %}}{{% endfor %}}"
    )

    def seconds(made: Dialect, count: int) -> float:
        many = {f"k{number:05}": f"v\n{number}" for number in range(count)}
        call = {"function": {"name": "f", "arguments": many}}
        talk = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        rendered, began = made.render(talk), time.thread_time()
        check_told(rendered, talk, made)
        return time.thread_time() - began

    for made in (Dialect(template, tokenizer), Dialect.named("telechat2", tokenizer)):
        few, many = (min(seconds(made, count) for _ in range(2)) for count in (1_500, 12_000))
        assert many < 24 * few, "eight times the text; a look through all of it for each would be 64 times"
