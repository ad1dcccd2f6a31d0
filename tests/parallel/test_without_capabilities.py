"""What a run does on a chip that lacks something gives the same curve, and is said at start."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from many import on_processes, open_trainer, train
from tiny_models import BOUND, STEPS, Kind, Layout, Row, Runs, slow

from zili.chips import find_backend
from zili.config import RunConfig
from zili.parallel import layout
from zili.parallel.collectives import Communicator, gather, scatter_sum
from zili.runs.opening import open_run
from zili.training.setup import _fallbacks

WHOLE = "chip.capabilities.fsdp2=false"


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Layout("shards=2"), "dense"),
        slow(Layout("replicas=2 shards=2"), "dense"),
        slow(Layout("shards=2 context=2"), "dense"),
        slow(Layout("shards=2 tensor=2"), "dense"),
        slow(Layout("shards=2 pipeline=2 schedule=zero_bubble"), "dense"),
        slow(Layout("shards=2 expert=2"), "mixture"),
        slow(Layout("replicas=2 tensor=2"), "mixture"),
        slow(Layout("tensor=2 expert=2"), "mixture"),
        slow(Layout("shards=2 pipeline=2 expert=2"), "mixture"),
        slow(Layout("replicas=2 shards=2 tensor=2 expert=2"), "mixture"),
    ],
)
def test_without_fsdp2_weights_stay_whole(
    layout: Layout, kind: Kind, runs: Runs, request: pytest.FixtureRequest
) -> None:
    curve = runs.on(layout, kind, WHOLE)
    Row.of(f"{layout}, whole weights", layout.world, kind, runs.alone(kind), curve, BOUND).check(request)


def parts_and_lines(config: RunConfig) -> tuple[list[str], list[str]]:
    """Kinds of parameters that this process holds, and what is said about capabilities."""
    trainer = open_trainer(config)
    held = sorted({type(parameter).__name__ for parameter in trainer.parallel.parameters()})
    opened = open_run(config)
    return held, [str(choice) for choice in opened.setup.choices if "capabilities" in choice.name]


def test_it_is_said_at_start(runs: Runs) -> None:
    held, lines = on_processes(2, parts_and_lines, runs.recipe("dense", "parallel.shards=2", WHOLE))[0]
    assert held == ["Parameter"], "nothing is cut"
    (line,) = lines
    assert line.startswith("chip.capabilities.fsdp2 = false: as the recipe says") and "stay whole" in line
    held, lines = on_processes(2, parts_and_lines, runs.recipe("dense", "parallel.shards=2"))[0]
    assert held == ["DTensor"] and lines == []


REPEATED = "chip.capabilities.grouped_heads_attention=false"


def test_that_heads_are_repeated_is_said(runs: Runs) -> None:
    """Where there is something to repeat. That the curve is the same, every emulated run on `mlu` shows."""
    device = mock.Mock(lacking=lambda: {"grouped_heads_attention": "a test"})
    grouped, one_each = (
        _fallbacks(runs.recipe(kind).model, layout.Layout(), device, "fp32") for kind in ("dense", "mixture")
    )
    assert str(grouped[0]).startswith(
        "chip.capabilities.grouped_heads_attention = false: a test; keys and values are repeated"
    )
    assert len(grouped) == 1 and one_each == []


def rehearsed_bytes(config: RunConfig) -> int:
    from zili.rehearsal import rehearse

    return rehearse(config, 1, backend=find_backend("ascend")).peak.bytes


def test_a_rehearsal_counts_the_repeated_heads(runs: Runs) -> None:
    more = ("chip.precision=fp32", "training.recompute=none")
    config = runs.recipe("dense", *more)
    plain, repeated = (
        on_processes(
            1, rehearsed_bytes, one.model_copy(update={"chip": one.chip.model_copy(update={"operations": {}})})
        )[0]
        for one in (config, runs.recipe("dense", *more, REPEATED))
    )
    model, training = config.model, config.training
    assert isinstance(training.micro_batch, int)
    # Keys and values of four heads more, in fp32, kept by each layer; gradients of one layer's at most beside them.
    heads = 4 * training.micro_batch * training.sequence_length * 4 * 2 * model.head_dim
    assert model.layers * heads <= repeated - plain <= (model.layers + 2) * heads


@pytest.mark.slow
def test_a_sharded_run_goes_on_without_fsdp2_and_back(runs: Runs, request: pytest.FixtureRequest) -> None:
    config = runs.recipe("mixture", "parallel.shards=2", "parallel.expert=2")
    whole = runs.recipe("mixture", "parallel.shards=1", "parallel.tensor=2", "parallel.expert=2", WHOLE)
    whole = whole.model_copy(update={"folder": config.folder})
    curve = on_processes(2, train, config, 6)[0]
    for part in (on_processes(2, train, whole, 12)[0], on_processes(2, train, config)[0]):
        curve.losses += part.losses
        curve.norms += part.norms
    assert len(curve.losses) == STEPS
    Row.of("sharded, whole, sharded", 2, "mixture", runs.alone("mixture"), curve, BOUND).check(request)


def sums_that_travel(sums_bf16: bool) -> list[torch.dtype]:
    """In what the sums of a bf16 `gather` and `scatter_sum`, forward and backward, go from process to process."""
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    communicator, seen = Communicator(dist.group.WORLD, sums_bf16), []
    real = funcol.reduce_scatter_single

    def watched(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(x.dtype)
        return real(x, *rest)

    with mock.patch.object(funcol, "reduce_scatter_single", watched):
        for collective in (gather, scatter_sum):
            x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
            y = collective(x, 1, communicator)
            y.sum().backward()
            assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    return seen


@pytest.mark.parametrize(("can", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_is_summed_in_fp32_where_collectives_cannot(can: bool, dtype: torch.dtype) -> None:
    assert on_processes(2, sums_that_travel, can) == [[dtype, dtype]] * 2
