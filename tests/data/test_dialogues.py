"""Conversations in every form, what is refused of them, and how they lie in rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zili.data.chat import ChatTemplate
from zili.data.dialect import Dialect
from zili.data.dialogue_store import build_dialogue_store, split_and_build
from zili.data.dialogues import Dialogue, read_dialogues
from zili.data.loader import Loader
from zili.data.packing import DialogueLoader, packed
from zili.data.sources import Census
from zili.data.store import TokenStore
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

PLAIN = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
]
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": PLAIN},
    "sharegpt": {
        "system": "Be kind.",
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "1 + 1?"},
            {"from": "gpt", "value": "2"},
        ],
    },
    "alpaca": {"system": "Be kind.", "instruction": "1 + 1?", "input": "", "output": "2", "history": [["Hi", "Hello"]]},
    "telechat2": {
        "system": "Be kind.",
        "dialog": [
            {"role": "user", "content": "Hi"},
            {"role": "bot", "content": "Hello"},
            {"role": "user", "content": "1 + 1?"},
            {"role": "bot", "content": "2"},
        ],
        "multiturn": True,
    },
}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_conversation(tmp_path: Path, form: str) -> None:
    (found,) = read_dialogues([lines(tmp_path / "x.jsonl", FORMS[form])])
    assert found.messages == PLAIN and found.tools is None
    array = tmp_path / "x.json"
    array.write_text(json.dumps([FORMS[form], FORMS[form]]), encoding="utf-8")
    assert [one.messages for one in read_dialogues([array])] == [PLAIN, PLAIN]


def test_tools_calls_and_alpaca_s_input(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    tools = [{"name": "add"}]
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Add"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Three"},
        ],
        "tools": json.dumps(tools),
    }
    alpaca = {"instruction": "Translate", "input": "你好", "output": "Hello"}
    used, asked = read_dialogues([lines(tmp_path / "x.jsonl", sharegpt, alpaca)])
    assert used.tools == tools
    assert used.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert [message["role"] for message in used.messages] == ["user", "assistant", "tool", "assistant"]
    assert asked.messages[0]["content"] == "Translate\n你好"


BAD = [
    ({"messages": [{"role": "robot", "content": "x"}]}, "of an unknown role", "role is 'robot'"),
    ({"messages": [{"role": "user", "content": " "}]}, "with an empty turn", "turn 1 .user. is empty"),
    ({"messages": [{"role": "user", "content": None}]}, "not a string", "is NoneType, not text"),
    ({"messages": [{"role": "user", "content": "x"}]}, "without an answer", "last turn is not the assistant's"),
    ({"messages": []}, "without an answer", "last turn"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "in no order", "turn 1 is assistant after nothing"),
    ({"messages": [PLAIN[1], PLAIN[1], PLAIN[2]]}, "in no order", "turn 2 is user after user"),
    ({"messages": [PLAIN[1], PLAIN[2], PLAIN[0]]}, "in no order", "turn 3 is system after assistant"),
    ({"messages": "hello"}, "of an unknown form", "no list of objects"),
    ({"text": "plain"}, "of an unknown form", "keys 'text'; known: messages"),
    ({"instruction": 3, "output": "x"}, "not a string", "is no text"),
    ({"conversations": [{"from": "function_call", "value": "{"}]}, "broken JSON", "is no JSON"),
    ({"messages": PLAIN, "tools": "{"}, "broken JSON", "its tools are no JSON"),
    (["no object"], "broken JSON", "list where an object was expected"),
]


@pytest.mark.parametrize(("record", "reason", "said"), BAD)
def test_what_cannot_be_learned_from_is_said_or_counted(tmp_path: Path, record: Any, reason: str, said: str) -> None:
    path = lines(tmp_path / "x.jsonl", FORMS["messages"], record)
    with pytest.raises(DataError, match=rf"x\.jsonl: line 2: .*{said}"):
        list(read_dialogues([path]))
    census = Census()
    assert len(list(read_dialogues([path], on_error="skip", census=census))) == 1
    assert census.skipped == {reason: 1}


def test_files_that_hold_none(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('[{"messages": ', encoding="utf-8")
    with pytest.raises(DataError, match="broken JSON"):
        list(read_dialogues([tmp_path / "cut.json"]))
    (tmp_path / "x.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(DataError, match="of another kind"):
        list(read_dialogues([tmp_path / "x.txt"], on_error="skip"))


# ---- in a store


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["hello world, what is 1 + 1? 你好"] * 9, 300)


def talks(count: int, seed: int = 0) -> list[Dialogue]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        messages = []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": "q" * draw.randint(1, 9)})
            messages.append({"role": "assistant", "content": f"{number} " + "a" * draw.randint(1, 12)})
        found.append(Dialogue(messages, None, f"talk {number}"))
    return found


def store_of(folder: Path, tokenizer: Tokenizer, count: int = 60, seed: int = 0) -> TokenStore:
    dialect = Dialect.named("telechat2", tokenizer)
    build_dialogue_store(talks(count, seed), dialect, folder / "talk", census=Census())
    store = TokenStore.open(folder / "talk")
    store.check_tokenizer(tokenizer)
    store.verify()
    return store


def test_a_store_holds_ids_and_what_is_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store, dialect = store_of(tmp_path, tokenizer), Dialect.named("telechat2", tokenizer)
    assert store.learned is not None
    for number, talk in enumerate(talks(60)):
        rendered = dialect.render(talk.messages)
        start, length = int(store.offsets[number]), int(store.lengths[number])
        assert store.document(number).tolist() == rendered.ids
        assert store.learned[start : start + length].astype(bool).tolist() == rendered.said


def test_a_damaged_mask_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store_of(tmp_path, tokenizer)
    mask = tmp_path / "talk.mask"
    content = bytearray(mask.read_bytes())
    content[7] ^= 1
    mask.write_bytes(content)
    with pytest.raises(DataError, match=r"talk\.mask: content changed"):
        TokenStore.open(tmp_path / "talk").verify()
    mask.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"talk\.mask: \d+ tokens take as many bytes"):
        TokenStore.open(tmp_path / "talk")


def test_a_failed_build_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad = Dialogue([{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}], None, "line 9")
    with pytest.raises(DataError, match="line 9: telechat1 cannot say"):
        build_dialogue_store([*talks(3), bad], Dialect.named("telechat1", tokenizer), tmp_path / "x", census=Census())
    assert not list(tmp_path.iterdir())
    census = Census()
    build_dialogue_store(
        [*talks(3), bad], Dialect.named("telechat1", tokenizer), tmp_path / "x", census=census, on_error="skip"
    )
    assert census.skipped == {"that the template cannot say": 1}
    with pytest.raises(DataError, match="nothing to learn"):
        build_dialogue_store(
            talks(3), Dialect(ChatTemplate("{{ messages[0].content }}"), tokenizer), tmp_path / "y", census=Census()
        )


def test_a_share_is_kept_apart_by_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"messages": talk.messages} for talk in talks(200)]
    file = lines(tmp_path / "x.jsonl", *records, *records[:50])
    dialect = Dialect.named("telechat2", tokenizer)
    split_and_build([file], dialect, tmp_path / "data", held_out=0.2)
    parts = [TokenStore.open(tmp_path / "data" / name) for name in ("train", "held_out")]
    there = [{part.document(i).tobytes() for i in range(len(part))} for part in parts]
    assert not there[0] & there[1] and len(parts[0]) + len(parts[1]) == 250
    assert 20 <= len(parts[1]) <= 80
    kept = ChatTemplate.of_folder(tmp_path / "data" / "tokenizer")
    assert kept is not None and kept.source == dialect.template.source


# ---- in rows


@given(lengths=st.lists(st.integers(1, 40), max_size=60), room=st.integers(5, 40))
@settings(max_examples=200)
def test_packing_keeps_everything_that_fits(lengths: list[int], room: int) -> None:
    order = random.Random(len(lengths)).sample(range(len(lengths)), len(lengths))
    rows = packed(lengths, room, order)
    items = sorted(item for row in rows for item in row)
    assert items == [item for item, length in enumerate(lengths) if length <= room]
    assert all(sum(lengths[item] for item in row) <= room for row in rows)
    # No two rows would go into one, so at most one is not half full.
    assert len(rows) <= 2 * sum(lengths[item] for item in items) / room + 1


def test_packing_is_tight_on_many(tmp_path: Path) -> None:
    draw = random.Random(0)
    lengths = [min(2000, int(draw.lognormvariate(5, 1))) for _ in range(20_000)]
    rows = packed(lengths, 2048, range(len(lengths)))
    assert sum(lengths) / (len(rows) * 2048) > 0.99


def rows_of(loader: DialogueLoader, steps: int) -> list[tuple[list[int], list[int], list[int]]]:
    found = []
    for step in range(steps):
        batch = loader.batch(step)
        found += list(zip(*(part.tolist() for part in batch[:3]), strict=True))
    return found


def test_an_epoch_has_every_conversation_once_and_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store, dialect = store_of(tmp_path, tokenizer), Dialect.named("telechat2", tokenizer)
    loader = DialogueLoader([(store, 1.0)], sequence_length=128, global_batch=1, seed=3)
    count = loader._lines[0].count
    seen: list[tuple[list[int], list[int]]] = []
    for inputs, labels, documents in rows_of(loader, count):
        assert documents == sorted(documents)
        for document in range(documents[-1] + 1):
            places = [i for i, of in enumerate(documents) if of == document]
            ids, wanted = [inputs[i] for i in places], [labels[i] for i in places]
            if any(label != -100 for label in wanted):
                seen.append((ids, wanted))
            else:
                assert set(ids) == {tokenizer.end_id}  # what is left of a row
    expected = []
    for talk in talks(60):
        rendered = dialect.render(talk.messages)
        said = zip(rendered.ids[1:], rendered.said[1:], strict=True)
        expected.append((rendered.ids[:-1], [number if learned else -100 for number, learned in said]))
    assert sorted(seen) == sorted(expected)
    assert loader.report[0].startswith(f"talk: 60 conversations in {count} rows of 128 tokens")
    assert "LEFT OUT" not in loader.report[0]
    padding = loader.samples(np.arange(count)).padding
    assert padding is not None
    assert int((~padding).sum()) == sum(len(ids) for ids, _ in expected)
    for filled_up, (inputs, labels, _) in zip(padding.tolist(), rows_of(loader, count), strict=True):
        assert filled_up == sorted(filled_up), "at the end of a row"
        assert {inputs[i] for i, pad in enumerate(filled_up) if pad} <= {tokenizer.end_id}
        assert all(labels[i] == -100 for i, pad in enumerate(filled_up) if pad)
    labels = [label for _, row, _ in rows_of(loader, count) for label in row]
    assert loader.learned_share == pytest.approx(sum(label != -100 for label in labels) / len(labels))


def test_what_is_longer_than_a_row_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = store_of(tmp_path, tokenizer)
    room = int(np.median(store.lengths))
    loader = DialogueLoader([(store, 1.0)], sequence_length=room, global_batch=1, seed=0)
    longer = int((np.asarray(store.lengths) - 1 > room).sum())
    assert longer and f"{longer} LEFT OUT, longer than a row (up to {max(store.lengths)} tokens)" in loader.report[0]
    with pytest.raises(DataError, match="none of its 60 conversations fits 4 tokens"):
        DialogueLoader([(store, 1.0)], sequence_length=4, global_batch=1, seed=0)


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    sources = [(store_of(tmp_path / "a", tokenizer), 2.0), (store_of(tmp_path / "b", tokenizer, 30, 5), 1.0)]

    def made(seed: int = 1) -> DialogueLoader:
        return DialogueLoader(sources, sequence_length=96, global_batch=4, seed=seed)

    first, second = made(), made()
    assert first.fingerprint() == second.fingerprint() != made(2).fingerprint()
    whole = first.batch(7)
    for one, other in zip(whole[:3], second.batch(7)[:3], strict=True):
        assert torch.equal(one, other)
    halves = [second.batch(7, slice(start, start + 2)) for start in (0, 2)]
    for number, part in enumerate(whole[:3]):
        assert torch.equal(part, torch.cat([half[number] for half in halves]))
    assert not torch.equal(made(2).batch(7).input_ids, whole.input_ids)
    assert first.epochs(10)[0] == pytest.approx(10 * 4 * 2 / 3 / first._lines[0].count)


def test_plain_text_among_conversations_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from zili.data.building import build_store
    from zili.data.reading import Document

    build_store([Document("hello world " * 60, "x")], tokenizer, tmp_path / "plain")
    plain = TokenStore.open(tmp_path / "plain")
    assert plain.learned is None and len(Loader([(plain, 1.0)], sequence_length=16, global_batch=1, seed=0).report) == 0
    with pytest.raises(DataError, match="plain text among conversations"):
        DialogueLoader([(store_of(tmp_path, tokenizer), 1.0), (plain, 1.0)], sequence_length=96, global_batch=1, seed=0)


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, dialect = lines(tmp_path / "x.jsonl", FORMS["messages"]), Dialect.named("telechat2", tokenizer)
    target = tmp_path / "data"
    with pytest.raises(DataError, match=r"^(train|held_out): nothing to learn"):  # one conversation has one side
        split_and_build([path], dialect, target, held_out=0.3)
    assert sorted(tmp_path.iterdir()) == [path]
    split_and_build([path], dialect, target)
    with pytest.raises(DataError, match="data exists already"):
        split_and_build([path], dialect, target)
