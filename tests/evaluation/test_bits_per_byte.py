"""Bits per byte against a slow reference, a closed form, and the tokenizer's own arithmetic."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zili.config.model import ModelConfig
from zili.data.tokenizer import Tokenizer
from zili.errors import ConfigError, DataError
from zili.evaluation.bits_per_byte import bits_per_byte, expected_seconds, limit_bytes, score_token_ids
from zili.models.decoder import Decoder

TEXTS = [
    "def read(self, size=-1):\n    return self._buffer[:size]\n" * 3,
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "x",
    "",
    "Selamat pagi, kemandirian! " * 9,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocab_size=300)


@pytest.fixture(scope="module")
def model() -> Decoder:
    shape = ModelConfig(
        vocab_size=304,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn_hidden_size=48,
        init_std=0.3,
    )
    return Decoder(shape).eval()


@torch.no_grad()
def slow_nats(model: Decoder, ids: Sequence[int], start: int, length: int) -> float:
    """One token at a time, the context spelled out again: what the windows must add up to."""
    line, total = [start, *ids], 0.0
    context = math.ceil(length / 2)
    stride = length - context
    for target in range(1, len(line)):
        index = target - 1
        window = 0 if index < length else 1 + (index - length) // stride
        begin = window * stride
        logits = model(torch.tensor([line[begin:target]]))[0, -1]
        total += float(F.cross_entropy(logits[None].double(), torch.tensor([line[target]])))
    return total


@pytest.mark.parametrize(("length", "batch_size"), [(2, 1), (7, 3), (16, 2), (400, 1)])
def test_equals_one_token_at_a_time(model: Decoder, tokenizer: Tokenizer, length: int, batch_size: int) -> None:
    score = bits_per_byte(model, tokenizer, TEXTS, sequence_length=length, batch_size=batch_size)
    encoded = [tokenizer.encode(text).tolist() for text in TEXTS]
    nats = sum(slow_nats(model, ids, tokenizer.end_id, length) for ids in encoded)
    size = len("".join(TEXTS).encode())
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert score.loss_per_token == pytest.approx(nats / sum(map(len, encoded)), rel=1e-5)
    assert (score.tokens, score.bytes, score.documents) == (sum(map(len, encoded)), size, 4)


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(model: Decoder, tokenizer: Tokenizer) -> None:
    flat = Decoder(model.config).eval()
    with torch.no_grad():
        flat.head_weight.zero_()
    score = bits_per_byte(flat, tokenizer, TEXTS, sequence_length=16, batch_size=2)
    assert score.loss_per_token == pytest.approx(math.log(304), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(math.log2(304) * score.tokens / score.bytes, rel=1e-6)


def test_the_order_and_company_of_documents_do_not_matter(model: Decoder, tokenizer: Tokenizer) -> None:
    forward = bits_per_byte(model, tokenizer, TEXTS, sequence_length=16, batch_size=2)
    backward = bits_per_byte(model, tokenizer, TEXTS[::-1], sequence_length=16, batch_size=5)
    assert forward.bits_per_byte == pytest.approx(backward.bits_per_byte, rel=1e-5)


def test_long_streams_are_scored_piece_by_piece(model: Decoder, tokenizer: Tokenizer) -> None:
    """More windows than are held at once give the same as one text scored alone."""
    once = bits_per_byte(model, tokenizer, TEXTS[:1], sequence_length=8, batch_size=1)
    seen: list[int] = []
    many = bits_per_byte(
        model, tokenizer, (TEXTS[0] for _ in range(30)), sequence_length=8, batch_size=1, progress=seen.append
    )
    assert many.bits_per_byte == pytest.approx(once.bits_per_byte, rel=1e-5)
    assert seen == sorted(seen) and seen[-1] == many.tokens == 30 * once.tokens


def test_the_training_mode_is_restored(model: Decoder, tokenizer: Tokenizer) -> None:
    model.train()
    bits_per_byte(model, tokenizer, ["abc"], sequence_length=8, batch_size=1)
    assert model.training
    model.eval()


def test_documents_already_encoded(model: Decoder, tokenizer: Tokenizer) -> None:
    ids = [(ids, len(text.encode())) for ids, text in zip(tokenizer.encode_batch(TEXTS), TEXTS, strict=True)]
    fast = score_token_ids(model, ids, start_token=tokenizer.end_id, sequence_length=16, batch_size=2)
    assert fast.bits_per_byte == bits_per_byte(model, tokenizer, TEXTS, sequence_length=16, batch_size=2).bits_per_byte


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 60, 10_000, None])
def test_limit_cuts_at_a_character(limit: int | None) -> None:
    kept = "".join(limit_bytes(["春眠", "ab", "c"], limit))
    assert "春眠abc".startswith(kept)
    assert limit is None or len(kept.encode()) <= limit
    assert limit is None or limit >= 9 or len(kept.encode()) > limit - 4


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error(model: Decoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        bits_per_byte(model, tokenizer, texts, sequence_length=8, batch_size=1)


def test_an_unusable_length_is_an_error(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="sequence_length 1"):
        bits_per_byte(model, tokenizer, TEXTS, sequence_length=1, batch_size=1)


def test_a_diverged_model_gives_valid_json(model: Decoder, tokenizer: Tokenizer) -> None:
    broken = Decoder(model.config).eval()
    with torch.no_grad():
        broken.head_weight.fill_(math.nan)
    score = bits_per_byte(broken, tokenizer, ["abc"], sequence_length=8, batch_size=1)
    assert math.isnan(score.bits_per_byte)
    assert json.loads(json.dumps(score.as_json(), allow_nan=False))["bits_per_byte"] is None


def test_ids_may_be_of_any_integer_type(model: Decoder) -> None:
    for kind in (np.uint16, np.int32, np.int64):
        score = score_token_ids(model, [(np.array([5, 6, 7], kind), 3)], start_token=2, sequence_length=8, batch_size=1)
        assert score.tokens == 3


def test_what_scoring_will_take_is_told_from_one_batch(monkeypatch: pytest.MonkeyPatch, model: Decoder) -> None:
    """Told by a clock that goes on by 3 seconds a batch, by 50 at the first ever."""
    now, calls = [0.0], []

    def turn(*_: object, **__: object) -> torch.Tensor:
        now[0] += 3.0 if calls else 50.0
        calls.append(model.training)
        return torch.zeros(())

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(model, "loss_sum", turn)
    ids = [(np.arange(5, 5 + n), n) for n in (70, 3, 30, 90)]
    shape = {"start_token": 2, "sequence_length": 16, "batch_size": 2}
    model.train()
    expected = expected_seconds(model, iter(ids), **shape)
    assert model.training and not any(calls), "as it was, and asked without dropout"
    assert len(calls) == 3
    assert expected == score_token_ids(model, iter(ids), **shape).seconds > 9
    assert expected_seconds(model, [], **shape) == 0
