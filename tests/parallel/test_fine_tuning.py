"""Fine-tuning on conversations: the same trainer, the same curve in every layout, the same promise to resume."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from many import on_processes, open_trainer
from tiny_models import BOUND, Kind, Layout, Row, Runs, slow

from zili.config import RunConfig
from zili.data.dialect import Dialect
from zili.data.dialogue_store import build_dialogue_store
from zili.data.dialogues import Dialogue
from zili.data.sources import Census
from zili.data.tokenizer import Tokenizer
from zili.ops import IGNORE_INDEX

FEW = "training.global_batch=8"


@pytest.fixture(scope="session")
def conversations(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An override that makes a run of the tiny models one on conversations."""
    draw, words = random.Random(0), ["the", "model", "trains", "on", "what", "it", "said", "and", "asks", "for", "more"]

    def line() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 5)))

    talks = []
    for number in range(300):
        turns = [{"role": role, "content": line()} for _ in range(draw.randint(1, 2)) for role in ("user", "assistant")]
        talks.append(Dialogue(turns, None, f"talk {number}"))
    prefix = tmp_path_factory.mktemp("conversations") / "talk"
    tokenizer = Tokenizer.from_folder(tiny_data / "tokenizer")
    build_dialogue_store(talks, Dialect.named("telechat2", tokenizer), prefix, census=Census())
    return f"data.sources=[{{store='{prefix}'}}]"


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Layout("shards=2"), "dense"),
        slow(Layout("tensor=2"), "dense"),
        slow(Layout("context=2"), "dense"),
        slow(Layout("pipeline=2"), "dense"),
        slow(Layout("shards=2 expert=2"), "mixture"),
        slow(Layout("pipeline=2"), "mixture"),
        slow(Layout("shards=2 context=2 tensor=2 expert=4"), "mixture"),
    ],
)
def test_a_layout_has_the_curve_of_one_process(
    layout: Layout, kind: Kind, conversations: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    one, other = runs.alone(kind, conversations, FEW), runs.on(layout, kind, conversations, FEW, steps=5)
    Row.of(f"{layout}, conversations", layout.world, kind, one, other, 2e-4, 2e-3).check(request)
    assert one.losses[-1] < one.losses[0]


@pytest.mark.parametrize(
    "layout",
    [Layout("context=2 tensor=2"), slow(Layout("")), slow(Layout("shards=2 expert=2")), slow(Layout("pipeline=2"))],
)
def test_what_fills_rows_up_is_no_load_of_experts(layout: Layout, conversations: str, runs: Runs) -> None:
    smaller = ("training.sequence_length=128", "model.layers=2")
    config = runs.recipe("mixture", conversations, *smaller, *layout.overrides)
    for loads, tokens in on_processes(layout.world, _loads, config):
        assert 0 < tokens < 0.99 * 16 * 128, "some of the batch is padding"
        assert [sum(layer) for layer in loads] == [config.model.mixture.top_k * tokens] * len(loads)


def _loads(config: RunConfig) -> tuple[list[list[float]], int]:
    """Tokens that each expert was given in the first step, and those of conversations in its batch."""
    trainer = open_trainer(config)
    trainer.parallel.train()
    whole = trainer.loader.batch(0)
    tokens = 0
    for labels, documents in zip(whole.labels, whole.document_ids, strict=True):
        # Something of every conversation is learned.
        of_some = {int(document) for document, label in zip(documents, labels, strict=True) if label != IGNORE_INDEX}
        tokens += sum(int(document) in of_some for document in documents)
    trainer.train_step(trainer.loader.batch(0, trainer.world.rows(trainer.config.training.global_batch)))
    assert trainer._loads is not None
    return trainer._loads.tolist(), tokens


LORA = "model.lora={rank=4, alpha=8.0, matrices=['query', 'value', 'output', 'gate', 'down']}"


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Layout("shards=2"), "dense"),
        slow(Layout("replicas=2"), "dense"),
        slow(Layout("tensor=2"), "dense"),
        slow(Layout("shards=2 tensor=2"), "dense"),
        slow(Layout("context=2"), "dense"),
        slow(Layout("pipeline=2"), "dense"),
        slow(Layout("pipeline=2 schedule=zero_bubble"), "dense"),
    ],
)
def test_adapters_have_the_curve_of_one_process(
    layout: Layout, kind: Kind, conversations: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    more = (conversations, LORA, FEW, "optimizer.learning_rate=0.01")
    one, other = runs.alone(kind, *more), runs.on(layout, kind, *more, steps=10)
    Row.of(f"{layout}, adapters", layout.world, kind, one, other, 2e-4, 2e-3).check(request)
    assert one.losses[-1] < one.losses[0] - 0.1


def test_the_loss_is_the_mean_over_what_the_assistant_says(conversations: str, runs: Runs) -> None:
    """Computed again with torch's own cross entropy, a conversation at a time and without any packing."""
    config = runs.recipe("dense", conversations)
    ((found, expected),) = on_processes(1, _both_ways, config)
    assert found == pytest.approx(expected, rel=BOUND)


def _both_ways(config: RunConfig) -> tuple[float, float]:
    trainer = open_trainer(config)
    trainer.model.eval()
    batch = trainer.loader.batch(0)
    total = count = 0.0
    with torch.no_grad():
        for ids, labels, documents in zip(*batch[:3], strict=True):
            for document in range(int(documents.max()) + 1):
                of = documents == document
                wanted = labels[of]
                if (wanted == IGNORE_INDEX).all():
                    continue
                logits = trainer.model(ids[of][None])[0]
                said = wanted != IGNORE_INDEX
                total += float(torch.nn.functional.cross_entropy(logits[said], wanted[said], reduction="sum"))
                count += int(said.sum())
    trainer.model.train()
    loss, _ = trainer.train_step(batch)
    return float(loss), total / count


def test_a_run_goes_on_where_it_was_stopped(conversations: str, runs: Runs, tmp_path: Path) -> None:
    folder = f"folder={tmp_path / 'stopped'}"
    (whole,) = on_processes(1, _weights, runs.recipe("dense", conversations, FEW), None)
    on_processes(1, _weights, runs.recipe("dense", conversations, FEW, folder), 7)
    (resumed,) = on_processes(1, _weights, runs.recipe("dense", conversations, FEW, folder), None)
    assert whole == resumed


def _weights(config: RunConfig, steps: int | None) -> dict[str, bytes]:
    trainer = open_trainer(config)
    trainer.resume()
    if steps is None:
        trainer.fit()
    else:
        while trainer.step < steps:
            trainer.train_step(trainer.loader.batch(trainer.step))
        trainer.save()
        trainer.saver.wait()
    return {name: tensor.detach().numpy().tobytes() for name, tensor in trainer.model.named_parameters()}
