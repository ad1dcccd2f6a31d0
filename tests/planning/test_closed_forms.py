"""The planner's FLOPs and messages are those of the real trainer, rehearsed: exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from many import on_processes
from tiny_models import Kind, Layout, slow, taught_by, tiny_recipe
from torch.utils.flop_counter import FlopCounterMode

from zili import chips
from zili.config import RunConfig
from zili.data.loader import Batch
from zili.parallel.layout import lay_out
from zili.planning.exact.job import Job
from zili.planning.exact.messages import Message, messages
from zili.planning.exact.work import flops

PAIRS = ("preference.beta=0.1", "training.start_from=model")
CASES: list[Any] = [
    ("dense", 1, "", ()),
    slow("dense", 1, "", ("training.recompute=full",)),
    ("dense", 1, "", ("training.recompute=selective",)),
    ("dense", 4, "tensor=2 context=2", ("chip.precision=bf16",)),
    slow("dense", 8, "context=4 shards=2", ("training.recompute=full",)),
    ("dense", 16, "pipeline=4 shards=2 tensor=2", ()),
    slow("dense", 8, "pipeline=2 shards=4 schedule=interleaved", ("training.recompute=full",)),
    ("mixture", 1, "", ()),
    slow("mixture", 4, "context=2 tensor=2", ("training.recompute=selective",)),
    slow("mixture", 8, "shards=4 tensor=2 expert=8", ("chip.precision=bf16",)),
    ("mixture", 8, "pipeline=2 shards=2 context=2 expert=4", ("training.recompute=full",)),
    slow("dense", 16, "replicas=2 shards=2 tensor=2 context=2", ("training.micro_batch=1", "chip.precision=bf16")),
    slow("mixture", 8, "replicas=2 shards=2 tensor=2 expert=4", ("training.micro_batch=1",)),
    slow("dense", 8, "pipeline=2 shards=2 tensor=2 schedule=zero_bubble", ()),
    ("dense", 4, "pipeline=2 context=2 schedule=zbv", ()),
    ("dense", 8, "pipeline=2 tensor=2 context=2", ("preference.beta=0.1", "training.start_from=model")),
    ("mixture", 16, "pipeline=2 replicas=2 shards=2 tensor=2 expert=2", ("chip.precision=bf16",)),
    ("dense", 4, "shards=4", ("chip.precision=bf16", "model.tied_embeddings=true")),
    slow("mixture", 4, "pipeline=2 shards=2", ("training.recompute=selective",)),
    ("dense", 8, "shards=2 replicas=2 tensor=2 reduce=micro_batch", ("chip.precision=bf16",)),
    ("mixture", 8, "pipeline=2 shards=4 expert=2 schedule=interleaved reduce=micro_batch", ()),
    ("mixture", 4, "shards=4 expert=2", ("preference.beta=0.1", "training.start_from=model")),
    ("dense", 1, "", ("model.lora.rank=4", "training.recompute=full", "model.layers=2")),
    ("mixture", 8, "pipeline=2 shards=2 tensor=2", ("model.lora={rank=4, matrices=['query_up', 'gate', 'down']}",)),
    slow("mixture", 2, "shards=2", ("model.lora={rank=4, matrices=['down']}", "training.recompute=full")),
    slow(
        "dense",
        4,
        "tensor=2 shards=2",
        ("model.lora={rank=4, matrices=['value', 'down']}", "training.recompute=full", *PAIRS),
    ),
    slow("tele-flm-1t", 4, "shards=2 tensor=2", ()),
    ("dense", 4, "shards=2 tensor=2", ("chip.precision=bf16", taught_by("mixture"))),
    slow("mixture", 4, "shards=2 context=2 expert=2", (taught_by("mixture", hidden_size=128),)),
    ("dense", 8, "pipeline=2 shards=2 tensor=2", ("training.recompute=full", taught_by("mixture", layers=5))),
    slow("dense", 4, "pipeline=2 shards=2 schedule=zbv", ("chip.precision=bf16", taught_by("dense"))),
    ("zili-1t-a32b", 8, "pipeline=2 shards=2 tensor=2 expert=4", ("training.recompute=full",)),
]


def executed(config: RunConfig, world: int, rank: int) -> tuple[dict[str, int], dict[Message, int]]:
    from zili.rehearsal import rehearse

    found = rehearse(config, world, rank, backend=chips.find_backend("ascend"), micro_batches=64)
    return found.flops, found.messages


def placed(cases: list[Any]) -> Iterator[Any]:
    """Each with an end of its pipeline: by turns with one, and slow with the other."""
    for number, case in enumerate(cases):
        values, marks = getattr(case, "values", case), getattr(case, "marks", ())
        for end in ("first", "last") if "pipeline" in values[2] else ("only",):
            other = end == ("first", "last")[number % 2]
            yield pytest.param(*values, end, marks=pytest.mark.slow if other else marks)


@pytest.mark.parametrize(("kind", "world", "layout", "more", "end"), list(placed(CASES)))
def test_they_are_those_that_are_executed(
    kind: Kind, world: int, layout: str, more: tuple[str, ...], end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    # As few layers as there are kinds of them, and stages.
    stages = 4 if "pipeline=4" in layout or "schedule" in layout else 2
    sizes = (f"model.layers={stages}", "training.global_batch=64")
    wide = tiny_recipe(kind, folder, folder / "run", *Layout(layout).overrides, *sizes, *more)
    laid_out = lay_out(wide, world)
    batch = 2 * laid_out.data * laid_out.pipeline  # as few micro-batches of two as the pipeline takes
    config = wide.model_copy(
        update={
            "training": wide.training.model_copy(update={"global_batch": batch}),
            "chip": wide.chip.model_copy(update={"operations": {}}),  # attention by one kernel, as chips have it
        }
    )
    place = 0 if end == "first" else laid_out.pipeline - 1
    ((work, sent),) = on_processes(1, executed, config, world, place * (world // laid_out.pipeline))
    job = Job(config, laid_out, place)
    assert flops(job) == work
    assert dict(messages(job)) == {message: n for message, n in sent.items() if message.processes > 1}


def counted(config: RunConfig) -> int:
    """FLOPs of a real step, by torch's own counter."""
    import zili.rehearsal.recorder  # noqa: F401 - has the formula of the host's attention, which torch's counter lacks
    from zili.training.setup import set_up
    from zili.training.trainer import Trainer

    setup = set_up(config)
    trainer = Trainer(setup.config, mock.Mock(learned_share=1.0), setup.device, world=setup.world)
    ids = torch.zeros(config.training.global_batch, config.training.sequence_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(Batch(ids, ids.clone(), ids.int()))
    return counter.get_total_flops()


def test_a_frozen_matrix_has_no_gradient_in_a_real_step(tmp_path: Path) -> None:
    """Forward 2 and backward 2 FLOPs a parameter and token, not 6; an adapter has its own 6."""
    config = tiny_recipe("dense", tmp_path, tmp_path / "run", "model.lora.rank=4", "training.global_batch=4")
    (real,) = on_processes(1, counted, config)
    job = Job(config, lay_out(config, 1))
    assert sum(flops(job).values()) == real
    plain = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    assert real < 0.85 * sum(flops(Job(plain, job.layout)).values())
