"""Pairs of answers: every form is the same pair, what is refused, what of them is learned, and how they lie in rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zili.data.dialect import Dialect
from zili.data.dialogue_store import build_dialogue_store, split_and_build
from zili.data.dialogues import Dialogue, read_dialogues
from zili.data.packing import DialogueLoader
from zili.data.sources import Census
from zili.data.store import TokenStore
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

SYSTEM = {"role": "system", "content": "Be kind."}
BEFORE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
QUESTION = {"role": "user", "content": "1 + 1?"}
CHOSEN, REJECTED = ({"role": "assistant", "content": text} for text in ("2", "Who knows"))
ASKED = [SYSTEM, *BEFORE, QUESTION]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in ASKED[1:]]
FORMS: dict[str, dict[str, Any]] = {
    "whole": {"chosen": [*ASKED, CHOSEN], "rejected": [*ASKED, REJECTED]},
    "whole, with a prompt beside": {"prompt": "1 + 1?", "chosen": [*ASKED, CHOSEN], "rejected": [*ASKED, REJECTED]},
    "prompt of messages": {"prompt": ASKED, "chosen": [CHOSEN], "rejected": [REJECTED]},
    "prompt, answers of text": {"prompt": ASKED, "chosen": "2", "rejected": "Who knows"},
    "messages": {"messages": ASKED, "chosen": CHOSEN, "rejected": REJECTED},
    "sharegpt": {
        "system": "Be kind.",
        "conversations": SHAREGPT,
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "Who knows"},
    },
    "alpaca": {
        "system": "Be kind.",
        "instruction": "1 + 1?",
        "input": "",
        "history": [["Hi", "Hello"]],
        "chosen": "2",
        "rejected": "Who knows",
    },
    "rejected_response": {"messages": [*ASKED, CHOSEN], "rejected_response": "Who knows"},
}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(tmp_path: Path, form: str) -> None:
    (found,) = read_dialogues([lines(tmp_path / "x.jsonl", FORMS[form])])
    assert found.messages == [*ASKED, CHOSEN]
    assert found.rejected == [*ASKED, REJECTED]


def test_a_prompt_of_text_alone(tmp_path: Path) -> None:
    record = {"prompt": "1 + 1?", "chosen": "2", "rejected": "Who knows"}
    (found,) = read_dialogues([lines(tmp_path / "x.jsonl", record)])
    assert found.messages == [QUESTION, CHOSEN] and found.rejected == [QUESTION, REJECTED]


BAD = [
    ({"prompt": "1 + 1?", "rejected": "3"}, "of an unknown form", "no chosen one"),
    ({"prompt": "1 + 1?", "chosen": "2", "rejected": "2"}, "with the same answer twice", "is the rejected one"),
    ({"prompt": "1 + 1?", "chosen": "2", "rejected": " "}, "with an empty turn", "turn 2 .assistant. is empty"),
    ({"prompt": "1 + 1?", "chosen": "2", "rejected": None}, "of an unknown form", "no list of objects"),
    ({"prompt": 3, "chosen": "2", "rejected": "3"}, "not a string", "is int, not text"),
    ({"chosen": "2", "rejected": "3"}, "in no order", "turn 1 is assistant after nothing"),
    (
        {"chosen": [QUESTION, CHOSEN], "rejected": [{"role": "user", "content": "2 + 2?"}, REJECTED]},
        "with two questions",
        "answer different questions",
    ),
    (
        {"chosen": [QUESTION, CHOSEN], "rejected": [QUESTION, CHOSEN, QUESTION, REJECTED]},
        "with two questions",
        "answer different questions",
    ),
    ({"prompt": "x", "chosen": [QUESTION], "rejected": "3"}, "without an answer", "last turn is not"),
    ({"prompt": "x", "chosen": [{"role": "robot", "content": "x"}], "rejected": "3"}, "of an unknown role", "robot"),
]


@pytest.mark.parametrize(("record", "reason", "said"), BAD)
def test_what_is_no_pair_is_said_or_counted(tmp_path: Path, record: Any, reason: str, said: str) -> None:
    path = lines(tmp_path / "x.jsonl", FORMS["whole"], record)
    with pytest.raises(DataError, match=rf"x\.jsonl: line 2: .*{said}"):
        list(read_dialogues([path]))
    census = Census()
    assert len(list(read_dialogues([path], on_error="skip", census=census))) == 1
    assert census.skipped == {reason: 1}


def pair(number: int) -> Dialogue:
    asked = [*BEFORE, {"role": "user", "content": f"{number} + 1?" * (1 + number % 5)}]
    answers = [{"role": "assistant", "content": text} for text in (f"{number + 1}", f"{number + 1}, I think")]
    return Dialogue([*asked, answers[0]], None, f"pair {number}", [*asked, answers[1]])


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer) -> TokenStore:
    report = build_dialogue_store(
        map(pair, range(40)), Dialect.named("telechat2", tokenizer), tmp_path / "pairs", census=Census()
    )
    assert str(report).startswith("40 pairs, ")
    return TokenStore.open(tmp_path / "pairs")


def test_learned_is_the_turn_in_which_they_part(store: TokenStore, tokenizer: Tokenizer) -> None:
    assert store.manifest.pairs and len(store) == 80 and store.learned is not None
    for number in range(80):
        start, length = int(store.offsets[number]), int(store.lengths[number])
        said = store.learned[start : start + length].astype(bool)
        answer = f"{number // 2 + 1}" + (", I think" if number % 2 else "")
        # The answer before is in both and cancels; the words that both begin with are the model's to say all the same.
        assert tokenizer.decode(store.document(number)[said]).removesuffix("<_end>") == answer


def test_a_pair_lies_in_one_row_and_an_epoch_has_each_once(store: TokenStore) -> None:
    loader = DialogueLoader([(store, 1.0)], sequence_length=256, global_batch=1, seed=3)
    # Numbers that say which document they are of.
    loader.reference = {store.identity(): -np.arange(1.0, 81.0, dtype=np.float32)}
    line = loader._lines[0]
    seen: list[tuple[int, list[int]]] = []
    for step in range(line.count):
        batch = loader.batch(step)
        assert batch.reference is not None
        ids, documents, known = batch.input_ids[0], batch.document_ids[0], batch.reference[0]
        for place in range(int((known != 0).sum())):
            of = -int(known[place]) - 1
            assert of % 2 == place % 2, "the chosen first"
            seen.append((of, ids[documents == place].tolist()))
    assert sorted(number for number, _ in seen) == list(range(80))
    assert all(ids == store.document(number)[:-1].tolist() for number, ids in seen)
    assert loader.report[0].startswith(f"pairs: 40 pairs in {line.count} rows of 256 tokens")
    assert loader.learned_share == pytest.approx(40 / (line.count * 256))


def test_every_row_fills_its_last_batch_with_nothing(store: TokenStore) -> None:
    loader = DialogueLoader([(store, 1.0)], sequence_length=256, global_batch=1, seed=3)
    found = list(loader.every_row(0, loader._lines[0].count + 2))
    ((batch, rows),) = found
    assert sorted(document for row in rows for document in row) == list(range(80))
    assert batch.reference is not None and not batch.reference.any()
    assert (batch.labels[-2:] == -100).all() and not batch.document_ids[-2:].any()


def test_too_long_pairs_are_left_out_as_one(store: TokenStore) -> None:
    both = (np.asarray(store.lengths, np.int64) - 1).reshape(-1, 2).sum(1)
    room = int(np.median(both))
    loader = DialogueLoader([(store, 1.0)], sequence_length=room, global_batch=1, seed=0)
    longer = int((both > room).sum())
    assert f"{longer} LEFT OUT, longer than a row (up to {both.max() + 2} tokens)" in loader.report[0]
    with pytest.raises(DataError, match="none of its 40 pairs fits 8 tokens"):
        DialogueLoader([(store, 1.0)], sequence_length=8, global_batch=1, seed=0)


def test_stores_of_two_kinds_are_refused(store: TokenStore, tmp_path: Path, tokenizer: Tokenizer) -> None:
    talk, dialect = Dialogue([QUESTION, CHOSEN], None, "talk"), Dialect.named("telechat2", tokenizer)
    build_dialogue_store([talk], dialect, tmp_path / "talk", census=Census())
    talks = TokenStore.open(tmp_path / "talk")
    with pytest.raises(DataError, match="pairs of answers and conversations"):
        DialogueLoader([(talks, 1.0), (store, 1.0)], sequence_length=256, global_batch=1, seed=0)
    with pytest.raises(DataError, match="pair 1: pairs and conversations in one store"):
        build_dialogue_store([talk, pair(1)], dialect, tmp_path / "both", census=Census())
    assert not (tmp_path / "both.bin").exists()


def test_a_template_that_says_both_alike(tmp_path: Path, tokenizer: Tokenizer) -> None:
    thought = {"role": "assistant", "content": "2", "reasoning_content": "one and one"}
    alike = Dialogue([QUESTION, thought], None, "pair 7", [QUESTION, CHOSEN])
    dialect = Dialect.named("telechat2", tokenizer)
    with pytest.raises(DataError, match="pair 7: telechat2 says the chosen and the rejected answer alike"):
        build_dialogue_store([alike], dialect, tmp_path / "x", census=Census())
    census = Census()
    build_dialogue_store([alike, pair(0)], dialect, tmp_path / "x", census=census, on_error="skip")
    assert census.skipped == {"that the template cannot say": 1}


def test_one_question_is_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [
        {"prompt": f"Say {number}", "chosen": f"{number}", "rejected": f"{number} {again}"}
        for number in range(60)
        for again in ("no", "never")
    ]
    # Which parts at its first answer already: the question is the same.
    for record in records[::2]:
        question, chosen = {"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": "Well?"}
        more = [QUESTION, {"role": "assistant", "content": f"{record['chosen']} at last"}]
        record |= {"chosen": [question, chosen, *more], "rejected": [question, REJECTED]}
    path = lines(tmp_path / "x.jsonl", *records)
    split_and_build([path], Dialect.named("telechat2", tokenizer), tmp_path / "data", held_out=0.3)
    sides = []
    for name in ("train", "held_out"):
        store = TokenStore.open(tmp_path / "data" / name)
        texts = (tokenizer.decode(store.document(number)) for number in range(0, len(store), 2))
        sides.append({re.search(r"Say \d+", text)[0] for text in texts})  # type: ignore[index]
    assert len(sides[0]) + len(sides[1]) == 60 and not sides[0] & sides[1]
