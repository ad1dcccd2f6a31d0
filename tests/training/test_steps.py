"""One step, and what must not change it: how the batch is cut, recomputation, precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_run import Recipe, Recorder, assert_same_bits, final_tensors, open_trainer, train
from torch import Tensor, nn

from zili import ops
from zili.chips.cpu import compiler
from zili.config import RunConfig
from zili.errors import ZiliError
from zili.training.checkpoints import list_checkpoints
from zili.training.spikes import is_sound


def losses(config: RunConfig) -> list[float]:
    recorder = Recorder()
    train(config, recorder)
    return recorder.losses


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_cut_into_micro_batches_and_recomputation_leave_the_losses(recipe: Recipe, optimizer: str) -> None:
    found = {
        (micro, recompute): losses(
            recipe(
                f"folder={recipe().folder}-{micro}-{recompute}",
                f"training.micro_batch={micro}",
                f"training.recompute={recompute}",
                f"optimizer.name={optimizer}",
            )
        )
        for micro in (1, 2, 4)
        for recompute in ("none", "selective", "full")
    }
    whole = found[4, "none"]
    assert len(whole) == 6 and len(set(whole)) == 6
    for how, cut in found.items():
        assert cut == pytest.approx(whole, rel=1e-6, abs=0), how


def test_recomputation_repeats_dropouts_numbers(recipe: Recipe) -> None:
    dropout = ("model.hidden_dropout=0.3", "model.attention_dropout=0.2")
    plain = losses(recipe(*dropout))
    again = losses(recipe(*dropout, "training.recompute=full", f"folder={recipe().folder}-again"))
    assert again == pytest.approx(plain, rel=1e-6, abs=0)


@pytest.mark.skipif(not bool(compiler().value), reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks_follow_the_eager_losses_and_resume_to_the_same_bits(recipe: Recipe, recompute: str) -> None:
    """With the faster operations, as on a user's machine, and documents that end inside the rows."""
    ops.choose("cpu", "fp32", {"linear": "onednn", "attention": "blocked", "linear_cross_entropy": "chunked"})
    settings = [f"training.recompute={recompute}", "training.steps=4", "schedule.kind=constant"]
    eager = losses(recipe(*settings, f"folder={recipe().folder}-eager"))
    compiled = recipe(*settings, "chip.compile=true", f"folder={recipe().folder}-compiled")
    assert losses(compiled) == pytest.approx(eager, rel=1e-5)
    stopped = recipe(*settings, "chip.compile=true", f"folder={recipe().folder}-stopped")
    half = train(stopped.model_copy(update={"training": stopped.training.model_copy(update={"steps": 2})}))
    assert half.step == 2
    train(stopped)
    assert_same_bits(final_tensors(stopped), final_tensors(compiled))


def test_a_steps_loss_is_the_mean_over_all_targets_of_the_batch(recipe: Recipe) -> None:
    trainer = open_trainer(recipe("training.micro_batch=1"))
    batch = trainer.loader.batch(0)
    batch.labels[0, 5:] = -100  # rows of unlike counts, or the mean of the rows' means would pass too
    with torch.no_grad():
        logits = trainer.model(batch.input_ids, document_ids=batch.document_ids)
        expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    loss, _ = trainer.train_step(batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


class Seen:
    """Stands for the optimizer: keeps the norm of the gradients it is given."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.param_groups: list[dict[str, float]] = []

    def step(self) -> None:
        self.norm = math.sqrt(
            sum(float(p.grad.double().square().sum()) for p in self.model.parameters() if p.grad is not None)
        )

    def zero_grad(self) -> None:
        self.model.zero_grad()


@pytest.mark.parametrize(("clip", "scale"), [(0.05, None), (0.0, 1.0), (1e6, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(recipe: Recipe, clip: float, scale: float | None) -> None:
    trainer = open_trainer(recipe(f"optimizer.clip={clip}"))
    seen = Seen(trainer.model)
    trainer.optimizers = [seen]  # type: ignore[list-item]
    _, before = trainer.train_step(trainer.loader.batch(0))
    assert float(before) > 0.05
    assert seen.norm == pytest.approx(clip if scale is None else float(before) * scale, rel=1e-4)


def test_bf16_on_the_cpu_stays_close_to_fp32_with_weights_in_fp32(recipe: Recipe) -> None:
    recorder = Recorder()
    trainer = train(recipe("chip.precision=bf16", f"folder={recipe().folder}-bf16"), recorder)
    exact = losses(recipe())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert recorder.losses != exact, "bf16 did not run"
    assert recorder.losses == pytest.approx(exact, abs=0.02)


def test_the_seed_determines_weights_data_and_dropout(recipe: Recipe) -> None:
    settings = ("model.hidden_dropout=0.3", "training.steps=2")
    torch.manual_seed(1)
    first = losses(recipe(*settings, f"folder={recipe().folder}-1"))
    torch.manual_seed(2)
    assert losses(recipe(*settings, f"folder={recipe().folder}-2")) == first
    assert losses(recipe(*settings, "seed=1", f"folder={recipe().folder}-3"))[0] != first[0]


def test_the_learning_rate_logged_is_the_one_used(recipe: Recipe) -> None:
    recorder = Recorder()
    train(recipe("schedule.kind=wsd", "schedule.warmup_steps=1", "schedule.decay_fraction=0.5"), recorder)
    rates = [record.learning_rate / 3e-3 for record in recorder.records]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.55, 0.1])


def test_records_count_steps_tokens_and_flops(recipe: Recipe) -> None:
    recorder = Recorder()
    train(recipe("logging.every=4"), recorder)
    assert [record.step for record in recorder.records] == [4, 6]  # every fourth, and the last
    last = recorder.records[-1]
    assert last.tokens == 6 * 4 * 32
    assert last.tokens_per_second == pytest.approx(4 * 32 / last.step_seconds)
    assert 0 <= last.data_seconds < last.step_seconds
    # 6 FLOPs a matrix weight and token, and 6 L S H d for attention, worked out by hand for the tiny shape.
    weights = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48) + 304 * 32
    flops = 6 * weights + 6 * 2 * 32 * 2 * 16
    assert last.matmul_share == pytest.approx(flops * last.tokens_per_second / 1e11)


@pytest.mark.parametrize("every", [1, 100])
def test_a_loss_that_is_no_number_stops_the_run_and_is_never_saved(recipe: Recipe, every: int) -> None:
    trainer = open_trainer(recipe("training.steps=8", f"logging.every={every}"))

    def poison(batch: object, train_step=trainer.train_step) -> tuple[Tensor, Tensor]:
        if trainer.step == 4:
            with torch.no_grad():
                trainer.model.norm.weight.fill_(float("nan"))
        return train_step(batch)

    trainer.train_step = poison  # type: ignore[method-assign]
    with pytest.raises(ZiliError, match=r"loss nan.*step-00000004.*optimizer\.learning_rate"):
        trainer.fit()
    assert [path.name for path in list_checkpoints(trainer.checkpoint_folder)] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    ("loss", "norm", "sound", "sound_where_overflow_saturates"),
    [
        (2.5, 0.7, True, True),
        (math.nan, 0.7, False, False),
        (2.5, math.inf, False, False),
        (2.5, torch.finfo(torch.float32).max ** 0.5 / 4096, True, False),  # a sum of squares that could not grow
        (0.0, 0.7, True, False),  # nan, that became zero
        (2.5, 0.0, True, False),
    ],
)
def test_a_step_that_overflowed_is_known_by_its_numbers(
    loss: float, norm: float, sound: bool, sound_where_overflow_saturates: bool
) -> None:
    assert is_sound(loss, norm, saturates=False) is sound
    assert is_sound(loss, norm, saturates=True) is sound_where_overflow_saturates
