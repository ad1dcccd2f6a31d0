"""Many sequences at once say what each says alone; what comes and goes between them leaves no trace."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from waiting import until

from zili.config.model import ModelConfig
from zili.errors import CheckpointError, ConfigError
from zili.models.cache import served_length
from zili.models.decoder import Decoder
from zili.serving.generate import engine as engine_module
from zili.serving.generate.engine import Answer, Engine
from zili.serving.generate.generation import Ask, Sampling, generate

SIZES = {"vocab_size": 96, "hidden_size": 32, "layers": 2, "heads": 4, "ffn_hidden_size": 48, "max_length": 128}
MIXTURE = {"experts": 4, "top_k": 2, "ffn_hidden_size": 16, "shared_experts": 1, "dense_layers": 1}
LATENT = {"query_rank": 16, "key_value_rank": 12, "rope_head_dim": 8, "value_head_dim": 12}
MODELS = {
    "grouped": {**SIZES, "kv_heads": 2, "head_dim": 8, "qkv_bias": True},
    "one key head": {**SIZES, "kv_heads": 1, "head_dim": 8},
    "experts": {**SIZES, "kv_heads": 2, "head_dim": 8, "mixture": MIXTURE},
    "latent, experts": {**SIZES, "kv_heads": 4, "head_dim": 16, "mixture": MIXTURE, "latent": LATENT},
}
GREEDY = Sampling(temperature=0)


def made(kind: str) -> Decoder:
    config = ModelConfig.model_validate({**MODELS[kind], "init_std": 0.3})
    model = Decoder(config)
    model.init_weights(1)
    return model.eval()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(made("grouped"), slots=3, tokens_a_step=16) as engine:
        yield engine


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    draw = random.Random(count)
    return [[draw.randrange(96) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def alone(model: Decoder, prompt: list[int], count: int) -> list[int]:
    return list(generate(model, prompt, max_new_tokens=count, sampling=GREEDY))


@pytest.mark.parametrize(("kind", "compiler"), [*((kind, "") for kind in MODELS), ("grouped", "no-such-compiler")])
def test_greedy_ids_are_those_of_each_alone(kind: str, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    asked = prompts(24)
    expected = [alone(made(kind), prompt, 20) for prompt in asked]
    with Engine(made(kind), slots=5, tokens_a_step=32) as engine:
        answers = [engine.submit(Ask(prompt, 20, GREEDY)) for prompt in asked]
        found = [[token.id for token in answer.wait(60)] for answer in answers]
    assert found == expected
    assert all(answer.finished == "length" for answer in answers)


def test_log_probabilities_are_those_of_a_full_pass(engine: Engine) -> None:
    model, prompt = made("grouped"), prompts(5)[2]
    answer = engine.submit(Ask(prompt, 10, GREEDY, log_probabilities=3, of_prompt=True))
    said = answer.wait(60)
    whole = [*prompt, *(token.id for token in said)]
    with torch.no_grad():
        expected = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
    assert [token.id for token in answer.prompt] == prompt and answer.prompt[0].log_probability is None
    for token, row in zip([*answer.prompt[1:], *said], expected, strict=True):
        assert token.log_probability == pytest.approx(float(row[token.id]), abs=1e-4)
        assert list(token.likeliest.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    # Nothing new, the prompt alone.
    answer = engine.submit(Ask(prompt, 0, GREEDY, log_probabilities=0, of_prompt=True))
    assert answer.wait(60) == [] and answer.finished == "length" and len(answer.prompt) == len(prompt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODELS)
def test_half_precision_says_nearly_the_same(kind: str, dtype: torch.dtype) -> None:
    prompt = prompts(5)[2]
    plain = made(kind)
    with torch.no_grad():
        exact = plain(torch.tensor([prompt[:-1]]))[0].log_softmax(-1)
        for parameter in plain.parameters():
            parameter.data = parameter.data.to(dtype)
        unpacked = plain(torch.tensor([prompt[:-1]]))[0].log_softmax(-1)
    with Engine(plain, slots=2, tokens_a_step=16) as engine:
        answer = engine.submit(Ask(prompt, 0, GREEDY, log_probabilities=0, of_prompt=True))
        answer.wait(60)
    following = torch.tensor(prompt[1:])[:, None]
    found = torch.tensor([token.log_probability for token in answer.prompt[1:]])
    off = (found - exact.gather(1, following)[:, 0]).square().mean().sqrt()
    allowed = (unpacked - exact).gather(1, following)[:, 0].square().mean().sqrt()
    assert 0 < off < 1.5 * allowed


def test_bfloat16_answers_with_its_own_likeliest_tokens() -> None:
    plain, packed = made("grouped").bfloat16(), made("grouped").bfloat16()
    prompt = prompts(5)[2]
    with Engine(packed, slots=2, tokens_a_step=16) as engine:
        answer = engine.submit(Ask(prompt, 12, GREEDY))
        said = [token.id for token in answer.wait(60)]
    with torch.no_grad():
        logits = plain(torch.tensor([[*prompt, *said[:-1]]]))[0, len(prompt) - 1 :].float()
    chosen = logits.gather(1, torch.tensor(said)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen < 0.05 * logits.std()).all()  # where two are as likely, rounding decides


def test_what_is_packed_is_in_memory_once() -> None:
    model = made("grouped")
    before = [weakref.ref(parameter) for parameter in model.layers.parameters()]
    with Engine(model, slots=2):
        gc.collect()
        kept = [reference for reference in before if reference() is not None]
        assert len(kept) == 0


def test_the_same_beginning_is_not_computed_again(engine: Engine) -> None:
    prompt = prompts(9, 60)[1]
    assert len(prompt) > 20
    first = engine.submit(Ask(prompt, 8, GREEDY))
    said = [token.id for token in first.wait(60)]
    again = engine.submit(Ask(prompt, 8, GREEDY))
    assert [token.id for token in again.wait(60)] == said
    # A next turn begins with the answer before; its last token was said and never computed.
    following = engine.submit(Ask([*prompt, *said, 5, 6], 8, GREEDY))
    assert [token.id for token in following.wait(60)] == alone(made("grouped"), [*prompt, *said, 5, 6], 8)
    assert (first.reused, again.reused, following.reused) == (0, len(prompt) - 1, len(prompt) + len(said) - 1)
    # While another still runs, its keys are copied.
    long, beside = engine.submit(Ask(prompt, 60, GREEDY)), None
    while beside is None:
        if long.take():
            beside = engine.submit(Ask([*prompt[:-1], 7], 8, GREEDY))
    assert [token.id for token in beside.wait(60)] == alone(made("grouped"), [*prompt[:-1], 7], 8)
    assert beside.reused == len(prompt) - 1


def test_who_is_cancelled_leaves_its_slot(engine: Engine) -> None:
    endless = [engine.submit(Ask(prompt, 100, GREEDY)) for prompt in prompts(5, 20)]
    for answer in endless:
        answer.cancel()
    asked = prompts(4)
    answers = [engine.submit(Ask(prompt, 5, GREEDY)) for prompt in asked]
    assert [[token.id for token in answer.wait(60)] for answer in answers] == [
        alone(made("grouped"), prompt, 5) for prompt in asked
    ]
    for answer in endless:
        answer.wait(60)
        assert answer.finished in ("cancelled", "length")
    assert engine.load == (0, 0) and len(engine._kept) == 3


def test_a_seed_gives_the_same_answer_beside_others(engine: Engine) -> None:
    ask = Ask(prompts(3)[0], 20, Sampling(temperature=1.0, top_p=0.9, seed=7))
    first = [token.id for token in engine.submit(ask).wait(60)]
    others = [engine.submit(Ask(prompt, 30, Sampling(seed=1))) for prompt in prompts(4)]
    assert [token.id for token in engine.submit(ask).wait(60)] == first
    assert first == list(generate(made("grouped"), ask.prompt, max_new_tokens=20, sampling=ask.sampling))
    for other in others:
        other.wait(60)


def test_stops_biases_and_ends(engine: Engine) -> None:
    prompt = prompts(3)[1]
    said = alone(made("grouped"), prompt, 12)
    stopped = engine.submit(Ask(prompt, 12, GREEDY, stop_ids={said[3]}))
    assert [token.id for token in stopped.wait(60)] == said[: said.index(said[3])] and stopped.finished == "stop"
    pushed = engine.submit(Ask(prompt, 3, GREEDY, bias={11: 100.0}))
    assert [token.id for token in pushed.wait(60)] == [11, 11, 11]
    full = engine.submit(Ask(prompt, 1000, GREEDY))
    assert len(full.wait(60)) == 128 - len(prompt) and full.finished == "context"


def test_what_cannot_be_asked(engine: Engine) -> None:
    for ask, said in (
        (Ask([], 5), "at least one token"),
        (Ask([1] * 128, 5), "the prompt has 128 tokens and the context holds 128"),
        (Ask([1], 5, Sampling(top_p=2)), "top_p is 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            engine.submit(ask)


def test_damaged_weights_end_the_answer_and_not_the_engine(engine: Engine) -> None:
    bias = engine.model.get_parameter("norm.weight")
    good = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not numbers"):
        engine.submit(Ask([1, 2, 3], 5, GREEDY)).wait(60)
    with torch.no_grad():
        bias.copy_(good)
    assert len(engine.submit(Ask([1, 2, 3], 5, GREEDY)).wait(60)) == 5


def test_closing_finishes_what_was_begun_or_not() -> None:
    engine = Engine(made("grouped"), slots=2)
    answers = [engine.submit(Ask(prompt, 20, GREEDY)) for prompt in prompts(6)]
    engine.close(finish=True)
    assert all(answer.finished == "length" for answer in answers)
    engine = Engine(made("grouped"), slots=2)
    answers = [engine.submit(Ask(prompt, 120, GREEDY)) for prompt in prompts(6, 5)]
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 5 and all(answer.finished for answer in answers)
    with pytest.raises(ConfigError, match="closed"):
        engine.submit(Ask([1], 1))


def test_the_context_ends_where_positions_would_be_turned_otherwise() -> None:
    still = ModelConfig.model_validate(MODELS["grouped"])
    assert served_length(still, 1000) == 128
    stretching = {"rule": "telechat_ntk", "original_length": 32, "training_length": 64}
    assert served_length(ModelConfig.model_validate({**MODELS["grouped"], "rotary": stretching}), 1000) == 64


class Slow:
    """A guide that lets everything pass, when it is let."""

    def __init__(self) -> None:
        self.ready, self.closed, self.fails = False, False, False

    def allowed(self, scores: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise ZeroDivisionError("of a guide")
        assert self.ready
        return scores

    def accept(self, token: int) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_others_go_on_while_a_guide_takes_its_time(engine: Engine) -> None:
    guide, prompt = Slow(), prompts(1)[0]
    expected = alone(made("grouped"), prompt, 20)
    held = engine.submit(Ask(prompt, 20, GREEDY, guide=lambda: guide))
    other = engine.submit(Ask(prompt, 20, GREEDY))
    assert [token.id for token in other.wait(60)] == expected and held.finished is None
    guide.ready = True
    assert [token.id for token in held.wait(60)] == expected and guide.closed
    cancelled = engine.submit(Ask(prompt, 20, GREEDY, guide=Slow))
    cancelled.cancel()
    assert not cancelled.wait(60) and cancelled.finished == "cancelled"


def test_another_asks_while_the_queue_is_looked_through(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may come at any moment; in that one it failed all answers that ran."""
    guide, asking = Slow(), threading.Thread(target=lambda: engine.submit(Ask([1], 1, GREEDY)))

    class Watched(Answer):
        def __getattribute__(self, name: str) -> Any:
            if name == "cancelled" and not asking.ident:
                asking.start()
                asking.join(0.2)  # longer where it waits for the engine's thread, and that for us
            return super().__getattribute__(name)

    running = [engine.submit(Ask([1, 2], 5, GREEDY, guide=lambda: guide)) for _ in range(3)]
    until(lambda: engine.load == (3, 0))
    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "Answer", Watched)
        waiting = engine.submit(Ask([3], 5, GREEDY))
    until(lambda: asking.ident is not None)
    asking.join(60)
    guide.ready = True
    assert [len(answer.wait(60)) for answer in (*running, waiting)] == [5] * 4


def broken() -> Slow:
    raise ZeroDivisionError("of a guide")


def failing() -> Slow:
    guide = Slow()
    guide.ready = guide.fails = True
    return guide


@pytest.mark.parametrize("guide", [broken, failing])
def test_what_a_guide_fails_with_ends_its_own_answer_alone(engine: Engine, guide: Callable[[], Slow]) -> None:
    prompt = prompts(1)[0]
    expected = alone(made("grouped"), prompt, 40)
    others = [engine.submit(Ask(prompt, 40, GREEDY)) for _ in range(2)]
    with pytest.raises(ZeroDivisionError):
        engine.submit(Ask(prompt, 20, GREEDY, guide=guide)).wait(60)
    assert all([token.id for token in other.wait(60)] == expected for other in others)
    assert engine.load == (0, 0)
