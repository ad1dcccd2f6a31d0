"""Generation against full forward passes, and the sampling rules against closed forms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator
from itertools import islice

import pytest
import torch

from zili.config.model import ModelConfig, RotaryConfig
from zili.errors import CheckpointError, ConfigError
from zili.models.cache import served_length
from zili.models.decoder import Decoder
from zili.serving.generate import generation
from zili.serving.generate.generation import Sampling, draw, generate

PROMPT = [2, 50, 61, 17, 9, 120, 33]
GREEDY = Sampling(temperature=0)


def drained(tokens: Generator[int, None, str]) -> tuple[list[int], str]:
    found = []
    while True:
        try:
            found.append(next(tokens))
        except StopIteration as end:
            return found, end.value


@torch.no_grad()
def slow_greedy(model: Decoder, ids: list[int], count: int) -> list[int]:
    line = list(ids)
    for _ in range(count):
        line.append(int(model(torch.tensor([line]))[0, -1].argmax()))
    return line[len(ids) :]


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_greedy_equals_full_forward_passes(model: Decoder, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    found, reason = drained(generate(model, PROMPT, max_new_tokens=20, sampling=GREEDY))
    assert found == slow_greedy(model, PROMPT, 20)
    assert reason == "length"


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("rule", ["telechat_ntk", "tele_flm_ntk"])
def test_tables_that_stretch_are_those_of_a_full_pass(
    shape: ModelConfig, rule: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the length that it was trained for each token is computed with all before it; the engine stops there."""
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    stretching = RotaryConfig(rule=rule, original_length=4, training_length=8 if rule == "telechat_ntk" else None)
    model = Decoder(shape.model_copy(update={"rotary": stretching})).eval()
    found, _ = drained(generate(model, PROMPT, max_new_tokens=30, sampling=GREEDY))
    assert found == slow_greedy(model, PROMPT, 30)
    assert served_length(model.config, 64) < len(PROMPT) + 30


def test_the_seed_decides(model: Decoder) -> None:
    def drawn(seed: int) -> list[int]:
        return drained(generate(model, PROMPT, max_new_tokens=20, sampling=Sampling(1.0, seed=seed)))[0]

    torch.manual_seed(1)
    first = drawn(5)
    torch.manual_seed(2)  # the global generator plays no part, and is left alone
    before = torch.get_rng_state()
    assert drawn(5) == first and drawn(6) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_stop_tokens_end_it_and_are_not_given(model: Decoder) -> None:
    whole = slow_greedy(model, PROMPT, 20)
    stop = whole[7]
    found, reason = drained(generate(model, PROMPT, max_new_tokens=20, sampling=GREEDY, stop_ids={stop}))
    assert found == whole[: whole.index(stop)]
    assert reason == "stop"


def test_the_context_is_the_limit(model: Decoder) -> None:
    found, reason = drained(generate(model, PROMPT, max_new_tokens=1000, sampling=GREEDY))
    assert len(PROMPT) + len(found) == model.config.max_length
    assert reason == "context"
    assert found == slow_greedy(model, PROMPT, len(found))


@pytest.mark.parametrize(("length", "says"), [(64, "shorten the prompt by 1 "), (70, "70 tokens"), (0, "at least one")])
def test_a_prompt_that_leaves_no_room(model: Decoder, length: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        generate(model, [5] * length, max_new_tokens=4)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -0.1), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1),
     ("repetition_penalty", 0.0)],
)  # fmt: skip
def test_unusable_settings(model: Decoder, setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        generate(model, PROMPT, max_new_tokens=4, sampling=Sampling(**{setting: value}))


def test_rows_beyond_the_tokenizer_are_never_drawn(model: Decoder) -> None:
    hot = Sampling(temperature=50.0)
    drawn = drained(generate(model, PROMPT, max_new_tokens=50, sampling=hot, vocabulary=40))[0]
    assert max(drawn) < 40


def test_a_diverged_model_is_named(shape) -> None:
    broken = Decoder(shape).eval()
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="NaN"):
        next(generate(broken, PROMPT, max_new_tokens=4, sampling=GREEDY))
    overflowed = torch.tensor([0.0, math.inf, 1.0])
    for sampling in (Sampling(), Sampling(top_p=0.5), Sampling(top_k=2)):
        with pytest.raises(CheckpointError, match="infinite"):
            draw(overflowed, [], sampling, torch.Generator())


def shares(logits: torch.Tensor, sampling: Sampling, draws: int = 4000) -> dict[int, float]:
    random = torch.Generator().manual_seed(0)
    counts = Counter(draw(logits, [], sampling, random) for _ in range(draws))
    return {token: count / draws for token, count in sorted(counts.items())}


LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()


def test_temperature_one_draws_the_models_distribution() -> None:
    assert shares(LOGITS, Sampling(1.0)) == pytest.approx({0: 0.5, 1: 0.25, 2: 0.15, 3: 0.07, 4: 0.03}, abs=0.03)


def test_temperature_sharpens() -> None:
    total = 0.5**2 + 0.25**2 + 0.15**2 + 0.07**2 + 0.03**2
    found = shares(LOGITS, Sampling(0.5))
    assert found[0] == pytest.approx(0.25 / total, abs=0.03)
    assert found[1] == pytest.approx(0.0625 / total, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_k=2), {0, 1}),
        (Sampling(1.0, top_k=9), {0, 1, 2, 3, 4}),
        (Sampling(1.0, top_p=0.45), {0}),
        (Sampling(1.0, top_p=0.7), {0, 1}),
        (Sampling(1.0, top_p=0.8), {0, 1, 2}),
        (Sampling(1.0, top_p=0.8, top_k=2), {0, 1}),
        (Sampling(1.0, top_p=1e-9), {0}),
        (Sampling(1.0, min_p=0.4), {0, 1}),
        (Sampling(2.0, min_p=0.6), {0, 1}),
    ],
)
def test_what_is_kept(sampling: Sampling, kept: set[int]) -> None:
    assert set(shares(LOGITS, sampling, 1000)) == kept


def test_repetition_penalty_moves_seen_tokens_down_whatever_their_sign() -> None:
    random = torch.Generator()
    strong = Sampling(0, repetition_penalty=1.5)
    assert draw(torch.tensor([2.0, 1.5, -1.0]), [0], strong, random) == 1
    assert draw(torch.tensor([-1.0, -1.4, -9.0]), [0, 0, 7], strong, random) == 1
    assert draw(torch.tensor([2.0, 1.5, -1.0]), [], strong, random) == 0


def test_tokens_come_one_by_one(model: Decoder) -> None:
    """A consumer that stops early costs only what it took."""
    tokens = generate(model, PROMPT, max_new_tokens=40, sampling=GREEDY)
    assert list(islice(tokens, 3)) == slow_greedy(model, PROMPT, 3)
