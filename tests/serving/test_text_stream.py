"""Streaming never breaks a character, and nothing shown can drive a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zili.data.tokenizer import Tokenizer
from zili.serving.generate.text_stream import StopText, stream_text, visible


def from_list(ids: Iterable[int]) -> Iterator[int]:
    yield from ids
    return "stop"


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return list(stream_text(tokenizer, from_list(ids)))


@given(text=st.text(max_size=60))
def test_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text).tolist())
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦉b").tolist()
    owl = len(ids) - 2
    assert owl > 1  # several tokens, for four bytes
    assert pieces_of(tokenizer, ids)[: len(ids)] == ["a", *[""] * (owl - 1), "🦉", "b"]


@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_any_ids_a_model_may_draw(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special=True)


def test_the_reason_is_passed_on(tokenizer: Tokenizer) -> None:
    stream = stream_text(tokenizer, from_list([70]))
    with pytest.raises(StopIteration) as end:
        while True:
            next(stream)
    assert end.value.value == "stop"


def test_control_characters_are_shown_not_obeyed() -> None:
    assert visible("a\tb\nc 中") == "a\tb\nc 中"
    assert visible("\x1b[2J\x07\r\x7f\x9b\u202e") == "␛[2J␇␍␡\ufffd\ufffd"


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.text("ab", max_size=30), st.data())
def test_a_stop_ends_where_it_begins_however_the_text_is_cut(stops: list[str], text: str, data: st.DataObject) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text  # the stop that is whole first, of several the longest
    stop, said, rest = StopText(stops), "", text
    while rest and not stop.stopped:
        size = data.draw(st.integers(1, 5))
        said, rest = said + stop.push(rest[:size]), rest[size:]
        assert expected.startswith(said)
    assert said + stop.finish() == expected and stop.stopped == bool(ends)


def test_a_stop_that_the_text_keeps_resembling_costs_no_more() -> None:
    began = time.thread_time()
    stop = StopText(["a" * 1000 + str(number) for number in range(16)])
    for _ in range(2000):
        stop.push("a")
    assert not stop.stopped and time.thread_time() - began < 1.0
