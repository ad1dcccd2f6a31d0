"""Learning from a teacher: its loss and gradient written out, and the same curve in every layout."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from many import curve_of, on_processes, open_trainer
from tiny_models import BOUND, Kind, Layout, Row, Runs, slow

import zili
from zili.config import RunConfig
from zili.data import Tokenizer
from zili.errors import CheckpointError, ConfigError
from zili.runs.opening import _refuse_other_words
from zili.runs.running import begin

WEIGHT, TEMPERATURE = 0.7, 2.0


@pytest.fixture(scope="session")
def taught(runs: Runs) -> dict[str, tuple[str, ...]]:
    """Overrides that name a teacher, by its kind. Each teacher has learned a little."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in ("dense", "mixture"):
        config = runs.recipe(kind, "training.steps=2", "model.embedding_multiplier=2.0", "model.logit_multiplier=1.5")
        curve_of(config, 1)
        table = f"{{teacher={str(config.folder)!r}, weight={WEIGHT}, temperature={TEMPERATURE}}}"
        found[kind] = (f"objective.distill={table}",)
    return found


@pytest.mark.parametrize("teacher", ["dense", "mixture"])
def test_loss_and_gradient_are_written_out(teacher: Kind, taught: dict[str, tuple[str, ...]], runs: Runs) -> None:
    config = runs.recipe("dense", *taught[teacher], "optimizer.clip=0", "training.global_batch=4")
    ((found, expected),) = on_processes(1, _both_ways, config)
    assert found == pytest.approx(expected, rel=BOUND)


def _both_ways(config: RunConfig) -> tuple[list[float], list[float]]:
    """Loss, gradient norm, cross entropy and divergence of a batch: by the trainer, and with whole logits."""
    trainer = open_trainer(config)
    begin(trainer)
    assert config.objective.distill is not None
    teacher, batch = zili.load(config.objective.distill.teacher), trainer.loader.batch(0)
    given = teacher(batch.input_ids, document_ids=batch.document_ids).detach() / TEMPERATURE
    said = trainer.model(batch.input_ids, document_ids=batch.document_ids)
    entropy = F.cross_entropy(said.flatten(0, 1), batch.labels.flatten())
    soft = (said / TEMPERATURE).log_softmax(-1)
    apart = F.kl_div(soft, given.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean() * TEMPERATURE**2
    loss = (1 - WEIGHT) * entropy + WEIGHT * apart
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    trained = [float(value) for value in trainer.train_step(batch)]
    figures = [float(value) for value in trainer._further.values()]
    return trained + figures, [float(value) for value in (loss, norm, entropy, apart)]


@pytest.mark.parametrize(
    ("layout", "teacher"),
    [
        (Layout("tensor=2 pipeline=2"), "dense"),
        slow(Layout("shards=2"), "dense"),
        slow(Layout("shards=2"), "mixture"),
        slow(Layout("tensor=2"), "mixture"),
        slow(Layout("context=2"), "dense"),
        slow(Layout("tensor=2 context=2"), "mixture"),
        slow(Layout("pipeline=2"), "mixture"),
        slow(Layout("pipeline=2 schedule=zbv"), "dense"),
        slow(Layout("shards=2 expert=2"), "mixture"),
    ],
)
def test_a_layout_has_the_curve_of_one_process(
    layout: Layout,
    teacher: Kind,
    taught: dict[str, tuple[str, ...]],
    runs: Runs,
    request: pytest.FixtureRequest,
) -> None:
    kind: Kind = "mixture" if "expert" in layout.text else "dense"
    one, other = runs.alone(kind, *taught[teacher]), runs.on(layout, kind, *taught[teacher], steps=5)
    Row.of(f"{layout}, {teacher} teacher", layout.world, kind, one, other, 2e-4, 2e-3).check(request)
    assert one.losses[-1] < one.losses[0] - 0.1


def test_a_run_goes_on_with_the_teacher_that_it_began_with(
    taught: dict[str, tuple[str, ...]], runs: Runs, tmp_path: Path
) -> None:
    """A copy of it elsewhere is the same one; another of the same shape, names and sizes is refused."""
    begun = runs.recipe("dense", *taught["dense"], "training.steps=1")
    assert begun.objective.distill is not None
    copy, other = tmp_path / "copy", runs.recipe("dense", "training.steps=2", "seed=1")
    shutil.copytree(begun.objective.distill.teacher, copy)
    curve_of(other, 1)

    def going_on(teacher: Path) -> RunConfig:
        changes = (f"folder={begun.folder}", "training.steps=2", f"objective.distill.teacher={teacher}")
        return runs.recipe("dense", *taught["dense"], *changes)

    curve_of(begun, 1)
    (said,) = on_processes(1, _refused, going_on(other.folder))
    assert "step-00000001 learned from another teacher: the fingerprint of its weights was" in said
    assert len(curve_of(going_on(copy), 1).losses) == 1


def _refused(config: RunConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        begin(open_trainer(config))
    return str(caught.value)


def test_a_teacher_of_another_vocabulary_is_refused(taught: dict[str, tuple[str, ...]], runs: Runs) -> None:
    with pytest.raises(ConfigError, match="the teacher has 304 tokens, the model 320"):
        runs.recipe("dense", *taught["dense"], "model.vocab_size=320")
    with pytest.raises(ConfigError, match=r"objective.distill.teacher = 'nowhere' does not exist"):
        runs.recipe("dense", "objective.distill={teacher='nowhere'}")


@pytest.mark.parametrize("teacher", ["", "checkpoints/step-00000002"])
def test_a_teacher_that_the_run_itself_writes_is_refused(
    teacher: str, taught: dict[str, tuple[str, ...]], runs: Runs
) -> None:
    itself = runs.recipe("dense", *taught["dense"]).objective.distill
    assert itself is not None
    own = f"objective.distill.teacher={itself.teacher / teacher}"
    with pytest.raises(ConfigError, match="is what this run writes: its teacher would change at every start"):
        runs.recipe("dense", *taught["dense"], f"folder={itself.teacher}", own)


@pytest.mark.parametrize(("vocabulary", "refused"), [(300, False), (280, True)])
def test_a_teacher_whose_ids_mean_other_text_is_refused(
    vocabulary: int, refused: bool, taught: dict[str, tuple[str, ...]], runs: Runs, tiny_data: Path
) -> None:
    config = runs.recipe("dense", *taught["dense"])
    assert config.objective.distill is not None
    known = Tokenizer.from_folder(tiny_data / "tokenizer")
    _refuse_other_words(config, known)  # nothing is known of a teacher without a tokenizer
    place = config.objective.distill.teacher / "tokenizer"
    (known if vocabulary == known.vocab_size else Tokenizer.train(["other words"] * 9, vocabulary)).save(place)
    try:
        with pytest.raises(ConfigError, match=r"\d+ tokens of 300 have another id there") if refused else nullcontext():
            _refuse_other_words(config, known)
    finally:
        shutil.rmtree(place)
