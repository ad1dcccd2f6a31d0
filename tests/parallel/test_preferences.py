"""Direct preference optimisation: its loss against torch's own, the same curve in every layout, the same promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from many import curve_of, on_processes, open_trainer
from pairs import polite_pairs
from tiny_models import BOUND, Kind, Layout, Row, Runs, slow

from zili.config import RunConfig
from zili.data.packing import DialogueLoader
from zili.data.tokenizer import Tokenizer
from zili.errors import CheckpointError
from zili.models.decoder import Decoder
from zili.ops import IGNORE_INDEX
from zili.runs.running import begin
from zili.training.callbacks import Callback, StepRecord
from zili.training.reference_model import REFERENCE_FILE
from zili.training.trainer import Trainer

BETA = 0.3


@pytest.fixture(scope="session")
def pairs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An override that makes a run of the tiny models one on pairs."""
    return polite_pairs(tiny_data / "tokenizer", tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="session")
def begun(runs: Runs) -> dict[str, tuple[str, ...]]:
    """Of each kind the overrides that start from a model of it that has learned a little."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in ("dense", "mixture"):
        config = runs.recipe(kind, "training.steps=2")
        curve_of(config, 1)
        found[kind] = (
            f"training.start_from={config.folder}",
            f"preference.beta={BETA}",
            "training.sequence_length=128",
            "training.global_batch=8",
        )
    return found


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Layout("shards=2"), "dense"),
        slow(Layout("tensor=2"), "dense"),
        slow(Layout("context=2"), "dense"),
        slow(Layout("tensor=2 context=2"), "dense"),
        slow(Layout("pipeline=2"), "dense"),
        slow(Layout("pipeline=2 schedule=zbv"), "dense"),
        slow(Layout("shards=2 expert=2"), "mixture"),
        slow(Layout("tensor=2 context=2"), "mixture"),
        slow(Layout("pipeline=2"), "mixture"),
    ],
)
def test_a_layout_has_the_curve_of_one_process(
    layout: Layout,
    kind: Kind,
    pairs: str,
    begun: dict[str, tuple[str, ...]],
    runs: Runs,
    request: pytest.FixtureRequest,
) -> None:
    overrides = (pairs, *begun[kind], "preference.likelihood=0.2")
    one, other = runs.alone(kind, *overrides), runs.on(layout, kind, *overrides, steps=5)
    Row.of(f"{layout}, preferences", layout.world, kind, one, other, 2e-4, 2e-3).check(request)
    assert one.losses[-1] < one.losses[0] - 0.1


def test_adapters_learn_preferences(pairs: str, begun: dict[str, tuple[str, ...]], runs: Runs) -> None:
    lora = ("model.lora={rank=4, alpha=8.0}", "optimizer.learning_rate=0.01")
    curve = runs.alone("dense", pairs, *begun["dense"], *lora)
    assert curve.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert curve.losses[-1] < curve.losses[0] - 0.1


@pytest.mark.parametrize("likelihood", [0.0, 0.2])
def test_loss_and_gradient_are_those_of_the_paper(
    likelihood: float, pairs: str, begun: dict[str, tuple[str, ...]], runs: Runs
) -> None:
    """Computed again with torch's own log-softmax, an answer at a time, with a second model as the reference."""
    small = ("training.global_batch=4", "optimizer.clip=0", f"preference.likelihood={likelihood}")
    config = runs.recipe("dense", pairs, *begun["dense"], *small)
    ((found, expected),) = on_processes(1, _both_ways, config)
    assert found == pytest.approx(expected, rel=BOUND)


def _both_ways(config: RunConfig) -> tuple[list[float], list[float]]:
    """Loss, gradient norm and the mean rewards of a batch, by the trainer and from the definition."""
    trainer = open_trainer(config)
    begin(trainer)
    reference = Decoder(config.model)
    reference.load_state_dict(trainer.model.state_dict())
    for _ in range(3):  # away from the reference
        trainer.train_step(trainer.loader.batch(trainer.step))
    batch = trainer.loader.batch(trainer.step)
    terms, rewards = [], []
    for ids, labels, documents in zip(*batch[:3], strict=True):
        for first in range(0, int(documents.max()) + 1, 2):
            both = [(ids[documents == k], labels[documents == k]) for k in (first, first + 1)]
            if not len(both[1][0]):
                continue
            said = [_log_probability(trainer.model, *answer) for answer in both]
            chosen, rejected = (
                BETA * (now - _log_probability(reference, *answer).detach())
                for now, answer in zip(said, both, strict=True)
            )
            likely = -said[0] / int((both[0][1] != IGNORE_INDEX).sum())
            terms.append(-F.logsigmoid(chosen - rejected) + config.preference.likelihood * likely)
            rewards.append((float(chosen), float(rejected), float(chosen > rejected)))
    loss = torch.stack(terms).mean()
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    by_trainer = trainer.train_step(batch)
    figures = [float(value) for value in trainer._further.values()]
    return (
        [float(value) for value in by_trainer] + figures,
        [float(loss), float(norm)] + [sum(column) / len(column) for column in zip(*rewards, strict=True)],
    )


def _log_probability(model: Decoder, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    said = labels != IGNORE_INDEX
    return model(ids[None])[0][said].log_softmax(-1).gather(1, labels[said][:, None]).sum()


class _Steps(Callback):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.records.append(record)


def test_a_run_goes_on_where_it_was_stopped(
    pairs: str, begun: dict[str, tuple[str, ...]], runs: Runs, tmp_path: Path
) -> None:
    folder = f"folder={tmp_path / 'stopped'}"
    (whole,) = on_processes(1, _weights, runs.recipe("dense", pairs, *begun["dense"]), None)
    on_processes(1, _weights, runs.recipe("dense", pairs, *begun["dense"], folder), 7)
    (resumed,) = on_processes(1, _weights, runs.recipe("dense", pairs, *begun["dense"], folder), None)
    assert whole == resumed
    # What the run began as is nowhere else by now.
    reference = tmp_path / "stopped" / REFERENCE_FILE
    reference.write_bytes(reference.read_bytes()[:100])
    on_processes(1, _refused, runs.recipe("dense", pairs, *begun["dense"], folder), "cannot be read")
    reference.unlink()
    on_processes(1, _refused, runs.recipe("dense", pairs, *begun["dense"], folder), "cannot be read")


def _refused(config: RunConfig, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        begin(open_trainer(config))


def _weights(config: RunConfig, steps: int | None) -> dict[str, bytes]:
    watch = _Steps()
    trainer = open_trainer(config, [watch])
    begin(trainer)
    if steps is None:
        trainer.fit()
        assert watch.records[-1].further["reward_accuracy"] > 0.9
    else:
        while trainer.step < steps:
            trainer.train_step(trainer.loader.batch(trainer.step))
        trainer.save()
        trainer.saver.wait()
    return {name: tensor.detach().numpy().tobytes() for name, tensor in trainer.model.named_parameters()}


@pytest.mark.parametrize("text", ["", pytest.param("context=2", marks=pytest.mark.slow)])
def test_held_out_pairs_score_as_training_ones(
    text: str, pairs: str, begun: dict[str, tuple[str, ...]], runs: Runs
) -> None:
    layout = Layout(text)
    config = runs.recipe("dense", pairs, *begun["dense"], *layout.overrides)
    for found in on_processes(layout.world, _held_out, config):
        assert found["loss"] == pytest.approx(found["by steps"], rel=BOUND)
        assert found["reward_accuracy"] == pytest.approx(found["accuracy by steps"], rel=BOUND)
        assert found["documents"] == 2 * found["pairs by steps"] > 300


def _held_out(config: RunConfig) -> dict[str, float]:
    from zili.evaluation.during_training import measure_of

    trainer = open_trainer(config)
    held_out = DialogueLoader([trainer.loader.sources[0]], sequence_length=128, global_batch=1, seed=3)
    begin(trainer, held_out)
    for _ in range(3):
        trainer.train_step(trainer.loader.batch(trainer.step, trainer.world.rows(config.training.global_batch)))
    tokenizer = Tokenizer.from_folder(config.data.tokenizer)
    values = measure_of(held_out, tokenizer)(trainer)
    # The same from batches, without a step.
    losses, right, count = 0.0, 0.0, 0
    trainer.parallel.eval()
    for number in range(held_out._lines[0].count):
        batch = held_out.batch(number)
        terms = trainer.parallel.evaluate(batch)
        losses, right = losses + float(terms.loss), right + float(terms.figures["reward_accuracy"])
        count += len(held_out._lines[0].documents(number)) // 2
    return {**values, "by steps": losses / count, "accuracy by steps": right / count, "pairs by steps": count}
