"""Records as other trainers have them: what changes what is learned is used or refused, and the rest is named."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zili.data.chat import ChatTemplate
from zili.data.dialect import NOT_OPTIONS, Dialect
from zili.data.dialogue_store import split_and_build
from zili.data.dialogues import Dialogue, read_dialogues
from zili.data.reading import read_documents
from zili.data.sources import Census
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [USER, ANSWER]
CALLS = [{"id": name, "type": "function", "function": {"name": name, "arguments": {}}} for name in ("one", "two")]
RESULTS = [{"role": "tool", "tool_call_id": name, "content": f"{name} done"} for name in ("one", "two")]
TOOL = {"type": "function", "function": {"name": "one", "description": "Counts,\nwell.", "parameters": {}}}


def read(folder: Path, *records: Any, census: Census | None = None) -> list[Dialogue]:
    file = folder / "x.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return list(read_dialogues([file], census=census))


def reason(folder: Path, record: Any) -> str:
    """What a record that is refused is counted by."""
    census = Census()
    file = folder / "x.jsonl"
    file.write_text(f"{json.dumps({'messages': TALK})}\n{json.dumps(record)}\n", encoding="utf-8")
    assert len(list(read_dialogues([file], on_error="skip", census=census))) == 1
    (found,) = census.skipped
    return found


def build(folder: Path, tokenizer: Tokenizer, template: str, record: Any) -> list[str]:
    file = folder / "x.jsonl"
    file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    made = Dialect(ChatTemplate(template), tokenizer) if "{" in template else Dialect.named(template, tokenizer)
    return split_and_build([file], made, folder / "data")


@pytest.mark.parametrize(
    "record",
    [
        {"query": "2+2?", "response": "4", "system": "Be brief."},
        {"prompt": "2+2?", "completion": "4", "system": "Be brief."},
        {"prompt": [SYSTEM, USER], "completion": [ANSWER], "label": True},
        {"instruction": "2+2?", "input": float("nan"), "output": "4", "system_prompt": "Be brief."},
        {"messages": TALK, "system": "Be brief.", "system_prompt": "Be brief.", "tools": float("nan")},
    ],
)
def test_questions_with_answers(tmp_path: Path, record: Any) -> None:
    census = Census()
    (found,) = read(tmp_path, record, census=census)
    assert found.messages == [SYSTEM, USER, ANSWER] and found.tools is None
    assert not set(census.unused) - {"label"}


def test_of_a_prompt_with_completion_the_completion_is_learned(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"prompt": [USER, FIVE, USER], "completion": "4"})
    assert found.messages == [USER, {**FIVE, "weight": 0}, USER, ANSWER]


@pytest.mark.parametrize("key", ["reasoning", "thoughts", "thought", "think"])
def test_thoughts_beside_a_question_are_the_answer_s(tmp_path: Path, key: str) -> None:
    (found,) = read(tmp_path, {"instruction": "2+2?", "output": "4", key: "two twice"})
    assert found.messages[-1] == {**ANSWER, "reasoning_content": "two twice"}


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_name_does_not_hide_another(tmp_path: Path, empty: Any) -> None:
    answer = {**ANSWER, "reasoning_content": empty, "reasoning": "two twice"}
    (found,) = read(tmp_path, {"messages": [USER, answer]})
    assert found.messages[-1]["reasoning_content"] == "two twice"


def test_calls_that_come_one_by_one_are_one_answer_s(tmp_path: Path) -> None:
    calls = [{"role": "tool_call", "content": json.dumps(call["function"])} for call in CALLS]
    results = [{"role": "tool_response", "content": "done"}] * 2
    (found,) = read(tmp_path, {"messages": [USER, {**ANSWER, "content": "Let us see."}, *calls, *results, ANSWER]})
    said = {"role": "assistant", "content": "Let us see.", "tool_calls": [call["function"] for call in CALLS]}
    assert found.messages == [USER, said, *([{"role": "tool", "content": "done"}] * 2), ANSWER]
    # One that is learned and one that is not are two answers, for which there is no place.
    calls[1]["loss"] = False  # type: ignore[assignment]
    assert reason(tmp_path, {"messages": [USER, *calls, *results, ANSWER]}) == "in no order"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": TALK, "system": "a", "system_prompt": "b"}, "of an unknown form"),
        ({"messages": [USER, {**ANSWER, "reasoning": "a", "thinking": "b"}]}, "of an unknown form"),
        ({"messages": TALK, "reasoning_content": "whose?"}, "with thoughts beside its turns"),
        ({"messages": [USER, {**ANSWER, "loss_mask": 0}]}, "of weight 0"),
        ({"messages": [USER, {**ANSWER, "mask": 1}]}, "with weights that are not learned by"),
        ({"messages": TALK, "weight": float("nan")}, "with weights that are not learned by"),
        ({"messages": TALK, "mask": "User"}, "with weights that are not learned by"),
        ({"messages": [USER, {**ANSWER, "train_detail": [{"train": 0}]}]}, "with weights that are not learned by"),
        ({"messages": [{"role": "system", "content": "", "tools": [TOOL]}, *TALK]}, "of an unknown form"),
        ({"messages": [USER, {**ANSWER, "tool_call": {"name": "one"}}]}, "of an unknown form"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "one", "parameters": {"x": 1}}]}]},
            "of an unknown form",
        ),
        ({"messages": TALK, "response_rejected": "5"}, "of an unknown form"),
        ({"instruction": "2+2?", "output": "4", "negative": "5"}, "of an unknown form"),
        ({"messages": TALK, "negative_messages": [[USER, FIVE]]}, "of an unknown form"),
        ({"messages": TALK, "rejected_response": "5", "rejected_images": ["x.png"]}, "with more than text"),
        ({"messages": TALK, "image_url": "x.png"}, "with more than text"),
        ({"messages": TALK, "label": 0}, "judged bad"),
        ({"prompt": "2+2?", "completion": "5", "label": False}, "judged bad"),
        ({"messages": TALK, "kto_tag": "false"}, "judged bad"),
        ({"prompt": [SYSTEM], "chosen": TALK, "rejected": [USER, FIVE]}, "with two questions"),
        ({"prompt": "3+3?", "chosen": TALK, "rejected": [USER, FIVE]}, "with two questions"),
        (
            {"messages": [SYSTEM], "input": {"messages": [USER]}, "preferred_output": [ANSWER],
             "non_preferred_output": [FIVE]},
            "of an unknown form",
        ),
    ],
)  # fmt: skip
def test_what_would_change_what_is_learned_is_refused(tmp_path: Path, record: Any, why: str) -> None:
    assert reason(tmp_path, record) == why


def test_what_stands_in_a_part_is_named(tmp_path: Path) -> None:
    census = Census()
    parts = [{"type": "text", "text": "2+", "cache_control": {"type": "ephemeral"}}, {"text": "2?"}]
    (found,) = read(tmp_path, {"messages": [{"role": "user", "content": parts}, ANSWER]}, census=census)
    assert found.messages == TALK and census.unused == {"a turn's part's cache_control": 1}


def test_keys_that_are_data_make_no_endless_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"messages": TALK, "k" * 10**5: 1, **{f"key {number:03}": 1 for number in range(99)}}
    _, line = build(tmp_path, tokenizer, "telechat2", record)
    assert len(line) < 2000 and f"{'k' * 60}... (1)" in line and line.endswith(", and 50 more names")


def test_labels_that_say_something_else_are_named(tmp_path: Path) -> None:
    census = Census()
    read(tmp_path, {"messages": TALK, "label": "0"}, {"messages": TALK, "label": 3}, census=census)
    assert census.unused == {"label": 2}


def test_what_is_said_about_a_pair_is_named(tmp_path: Path) -> None:
    census = Census()
    record = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "chosen_model": "a", "rejected_model": "b"}
    (found,) = read(tmp_path, record, census=census)
    assert found.rejected == [USER, FIVE] and set(census.unused) == {"chosen_model", "rejected_model"}


def test_a_question_of_a_pair_by_another_name(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"})
    assert found.messages == [SYSTEM, USER, ANSWER]


@pytest.mark.parametrize("name", sorted(NOT_OPTIONS))
def test_options_that_are_none(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(DataError, match=f"chat_template_kwargs have '{name}'"):
        build(tmp_path, tokenizer, "telechat2", {"messages": TALK, "chat_template_kwargs": {name: True}})


def test_everything_that_rendering_is_given_is_no_option(tokenizer: Tokenizer) -> None:
    assert {*inspect.signature(Dialect.render).parameters, *tokenizer.roles} - {"options"} <= NOT_OPTIONS


def test_options_that_a_template_does_not_know_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"messages": TALK, "chat_template_kwargs": {"clear_thinking": False, "thinking_budget": 7}}
    *_, line = build(tmp_path, tokenizer, "telechat3-coder", record)
    assert line == "in the records and not used: chat_template_kwargs.thinking_budget (1)"


# ---- what a template makes of them


@pytest.mark.parametrize(
    "content", ["</think>4", "<think>two", "two</think>4", "Well, <think>two</think>4", "<think>a</think></think>4"]
)
def test_thoughts_where_none_are_read(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    with pytest.raises(DataError, match="an answer spells <think> or </think>"):
        build(tmp_path, tokenizer, "telechat3-coder", {"messages": [USER, {**ANSWER, "content": content}]})


def test_results_in_the_order_of_their_calls(tmp_path: Path, tokenizer: Tokenizer) -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": CALLS}
    tools = [{"type": "function", "function": {"name": name}} for name in ("one", "two")]
    talk = {"messages": [USER, calling, *RESULTS[::-1], ANSWER], "tools": tools}
    with pytest.raises(DataError, match="that of 'two' is out of order"):
        build(tmp_path, tokenizer, "telechat2", talk)
    with_ids = "{% for m in messages %}<_user>{% generation %}{{ m }}{% endgeneration %}<_end>{% endfor %}{{ tools }}"
    build(tmp_path, tokenizer, with_ids, talk)


TELLS = "{% for t in tools or [] %}{{ t.function.WHAT }}{% endfor %}{% for m in messages %}<_user>{% generation %}"


@pytest.mark.parametrize(("what", "missing"), [("name", "Counts,"), ("description", "one")])
def test_a_tool_is_told_whole(tmp_path: Path, tokenizer: Tokenizer, what: str, missing: str) -> None:
    template = (
        TELLS.replace("WHAT", what) + "{{ m.content }}{% endgeneration %}<_end>{% endfor %}{{ tools and 'quaxtool' }}"
    )
    with pytest.raises(DataError, match=f"leaves out of a tool: '{missing}'"):
        build(tmp_path, tokenizer, template, {"messages": TALK, "tools": [TOOL]})


def test_a_turn_whose_words_stand_elsewhere_is_missed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = "{% for m in messages %}{% if m.role == 'assistant' or loop.first %}<_user>{% generation %}{{ m.content }}"
    template = first + "{% endgeneration %}<_end>{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="leaves out turn 3"):
        build(tmp_path, tokenizer, template, {"messages": [USER, ANSWER, USER, FIVE]})


def test_where_all_are_left_out_the_reason_is_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"messages": TALK, "tools": [TOOL]}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="nothing to learn") as none:
        split_and_build([file], Dialect.named("chatml", tokenizer), tmp_path / "data", on_error="skip")
    assert "left out: 1 with tools" in str(none.value) and "generation" not in str(none.value)


def test_arguments_are_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "one", "arguments": {"x": float("nan")}}]}
    with pytest.raises(DataError, match="arguments of a call of one are no JSON object"):
        build(tmp_path, tokenizer, "telechat2", {"messages": [USER, call], "tools": [TOOL]})


def test_a_folder_with_other_files_beside(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text("# A set", encoding="utf-8")
    read(folder, {"messages": TALK})
    census = Census()
    assert len(list(read_dialogues([folder], census=census))) == 1 and census.left_out == "1 of another kind"


def test_rows_of_a_table(tmp_path: Path) -> None:
    turns = [USER, {**ANSWER, "function_call": {"name": None, "arguments": None}}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "weight": 1.0}] * 300), tmp_path / "x.parquet")
    found = list(read_dialogues([tmp_path]))
    assert len(found) == 300 and found[0].messages == TALK and found[299].place.endswith("x.parquet: row 300")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "x.parquet")
    for read_them, said in ((read_dialogues, "two of its columns"), (read_documents, "it has 'text' twice")):
        with pytest.raises(DataError, match=said):
            list(read_them([tmp_path]))  # type: ignore[operator]


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a", "more": {"text": "b", "text": "c"}}\n', encoding="utf-8")
    for read_them in (read_dialogues, read_documents):
        with pytest.raises(DataError, match=r"line 1: broken JSON \(the key 'text' stands twice"):
            list(read_them([file]))  # type: ignore[operator]


def test_no_thoughts_leave_no_line_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dialect = Dialect.named("telechat3", tokenizer)
    talk = [USER, {**ANSWER, "content": "<think>\n\n</think>\n\n4"}]
    assert dialect.render(talk).text == dialect.render(TALK).text


def test_utf_16_is_said(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"messages": TALK}), encoding="utf-16")
    with pytest.raises(DataError, match="it begins as UTF-16 does"):
        list(read_dialogues([file]))
