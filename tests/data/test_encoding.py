import json
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zili.data import Tokenizer
from zili.data.encoding import Encoder, audit, choose_encoder
from zili.errors import DataError


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [row.tolist() for row in tokenizer.encode_batch(texts)]


def split_rows(encoded: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    flat, lengths = encoded
    return [row.tolist() for row in np.split(flat, np.cumsum(lengths)[:-1])]


def test_gigatoken_gives_the_same_ids(tokenizer: Tokenizer, make_texts: Callable) -> None:
    pytest.importorskip("gigatoken")
    texts = [*make_texts(50, seed=3), "", "a<_end>b<_user>", ""]
    encoder = choose_encoder(tokenizer, texts)
    assert encoder.name == "gigatoken" and "ids equal tokenizers'" in str(encoder)
    assert split_rows(encoder.encode(texts)) == expected(tokenizer, texts)
    assert encoder.encode([])[1].size == 0


@settings(max_examples=150)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_gigatoken_gives_the_same_ids_on_any_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    pytest.importorskip("gigatoken")
    encode = choose_encoder(tokenizer, [], "gigatoken").encode
    assert split_rows(encode(texts)) == expected(tokenizer, texts)


def test_without_gigatoken_the_reason_is_said(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = choose_encoder(tokenizer, ["x"])
    assert encoder.name == "tokenizers" and "not installed" in encoder.reason
    assert split_rows(encoder.encode(["ab", "", "c"])) == expected(tokenizer, ["ab", "", "c"])
    with pytest.raises(DataError, match="not installed"):
        choose_encoder(tokenizer, ["x"], "gigatoken")


def test_tokenizer_it_does_not_know(tokenizer: Tokenizer) -> None:
    pytest.importorskip("gigatoken")
    definition = json.loads(tokenizer.definition)
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"[a-c]+|\s|."}
    encoder = choose_encoder(Tokenizer(json.dumps(definition)), ["x"])
    assert encoder.name == "tokenizers" and "cannot load" in encoder.reason


def test_an_engine_with_other_ids_is_not_used(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(len(texts), np.uint32), np.ones(len(texts), np.int64)

    monkeypatch.setattr("zili.data.encoding._load_gigatoken", lambda tokenizer: (wrong, "0"))
    encoder = choose_encoder(tokenizer, ["x"])
    assert encoder.name == "tokenizers" and "ids differ" in encoder.reason


def test_an_engine_that_errs_later_is_caught(tokenizer: Tokenizer) -> None:
    encoder = Encoder("gigatoken", "", lambda texts: (np.zeros(1, np.uint32), np.ones(1, np.int64)))
    with pytest.raises(DataError, match=r"different ids for 'some text'.*engine='tokenizers'"):
        audit(encoder, tokenizer, ["some text"])
    audit(choose_encoder(tokenizer, [], "tokenizers"), tokenizer, ["some text"])
