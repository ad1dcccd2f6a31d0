"""Inside a training step everything runs on the device, and the host waits for it as often as is stated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from many import on_processes, open_trainer
from pairs import polite_pairs
from plugins import ASCEND, Environment
from tiny_models import Kind, Layout, Runs, slow
from watch import Watch

from zili.config import RunConfig
from zili.data.prefetch import Prefetcher
from zili.ops import ascend
from zili.ops.registry import OPERATIONS

ON_THE_HOST = (
    "objectives/next_token.py prepare",
    *("parallel/context.py take", "ops/ascend.py _ends"),
)
"""Work on the batch before it is sent, since it comes from the stores, on the host; and on where documents end."""
MICRO_BATCHES = 4


def watched_step(config: RunConfig) -> tuple[Counter[str], Counter[str], int, int]:
    """Of the second step: waits, operations elsewhere, how many operations, and waits as the device counts them."""
    from emulated import counts, reset

    trainer = open_trainer(config)
    trainer.parallel.train()
    if config.preference is not None:
        trainer.loader.reference = {
            store.identity(): np.zeros(len(store), np.float32) for store, _ in trainer.loader.sources
        }
    rows = trainer.world.rows(config.training.global_batch)
    with Prefetcher(trainer.loader, 0, rows, 2) as batches:
        trainer.train_step(next(batches)[1])
        batch = next(batches)[1]
        reset()
        with Watch(trainer.device.type) as watch:
            trainer.train_step(batch)
    return watch.waits, watch.elsewhere, watch.operations, counts().waits


def products(layers: int, micro_batches: int) -> dict[str, int]:
    """Waits of a device without a kernel for grouped products: three of them a layer of experts, each differentiated
    to two."""
    return {"ops/product.py grouped": 3 * layers * micro_batches, BACKWARD: 6 * layers * micro_batches}


BACKWARD = "torch's backward pass"
EXPERTS = 4
"""Layers of experts, that of multi-token prediction among them."""
SENDING = {"parallel/expert.py rows_by_process": EXPERTS * MICRO_BATCHES // 2}
"""How much to send where: once a layer and micro-batch."""


@pytest.mark.parametrize(
    ("kind", "layout", "waits", "fused"),
    [
        ("dense", "", {}, False),
        slow("dense", "", {"ops/ascend.py _ends": MICRO_BATCHES}, True),
        ("mixture", "", {"ops/ascend.py _ends": MICRO_BATCHES}, True),
        ("mixture", "", products(EXPERTS, MICRO_BATCHES), False),
        ("mixture", "shards=2 expert=2", SENDING | products(EXPERTS, MICRO_BATCHES // 2), False),
        slow("dense", "shards=2", {}, False),
        slow("dense", "tensor=2", {}, False),
        slow("dense", "context=2", {}, False),
        slow("dense", "pipeline=2", {}, False),
        slow("mixture", "shards=2 pipeline=2 stage_layers=[3,1]", products(2, MICRO_BATCHES // 2), False),
    ],
)
def test_a_step_stays_on_the_device(
    kind: Kind, layout: str, waits: dict[str, int], fused: bool, runs: Runs, with_plugins: Environment
) -> None:
    _stays_on_the_device(kind, layout, waits, fused, runs, with_plugins)


def _stays_on_the_device(
    kind: Kind,
    layout: str,
    waits: dict[str, int],
    fused: bool,
    runs: Runs,
    with_plugins: Environment,
    *overrides: str,
) -> None:
    chosen = Layout(layout)
    plain = dict.fromkeys(OPERATIONS, "reference") | {"grouped_matmul": "grouped"}
    plain["linear_cross_entropy"] = "chunked"
    versions = {version.operation: version.name for version in ascend.VERSIONS} if fused else {}
    named = [f"chip.operations.{operation}={name}" for operation, name in (plain | versions).items()]
    precision = "bf16" if fused else "fp32"
    overrides = (*overrides, f"training.global_batch={2 * MICRO_BATCHES}", *chosen.overrides)
    config = runs.recipe(kind, *overrides, f"chip.name={ASCEND.backend}", f"chip.precision={precision}", *named)
    for found, elsewhere, operations, counted in on_processes(
        chosen.world, watched_step, config, environment=with_plugins(ASCEND)
    ):
        assert operations > 500
        assert by_place(found) == waits
        # Stand-ins for a vendor's operations look at their arguments, which the watch overlooks.
        assert fused or counted == sum(waits.values()), "none escaped the watch"
        assert [place for place in by_place(elsewhere) if place not in ON_THE_HOST] == []


@pytest.mark.parametrize(("layout", "fused"), [("", False), ("", True), slow("context=2", False)])
def test_so_does_one_of_preferences(
    layout: str, fused: bool, tiny_data: Path, runs: Runs, with_plugins: Environment, tmp_path: Path
) -> None:
    pairs = polite_pairs(tiny_data / "tokenizer", tmp_path / "pairs")
    longer = ("training.sequence_length=128", "training.start_from=model", "preference.likelihood=0.2")
    waits = {"ops/ascend.py _ends": MICRO_BATCHES} if fused else {}
    _stays_on_the_device("dense", layout, waits, fused, runs, with_plugins, pairs, *longer)


LEAVES_OUT = ("watch.spike=skip", "watch.non_finite=skip", "watch.fewest=2")


def test_so_does_one_whose_update_may_be_left_out(runs: Runs, with_plugins: Environment) -> None:
    """AdamW's kernel looks by itself; what was decided is read a step late."""
    _stays_on_the_device("dense", "", {}, False, runs, with_plugins, *LEAVES_OUT)


def by_place(found: Counter[str]) -> dict[str, int]:
    """Counts by file and function; a failing test shows the lines."""
    counts: Counter[str] = Counter()
    for line, count in found.items():
        source = line.partition(" at ")[2]
        place, _, function = source.partition(" ")
        inside = f"{place.partition(':')[0].removeprefix('training/')} {function}"
        counts[BACKWARD if " < " in source else inside] += count
    return dict(counts)


def test_the_watch_sees_what_it_is_for(with_plugins: Environment) -> None:
    ((waits, elsewhere),) = on_processes(1, careless, environment=with_plugins(ASCEND))
    assert sorted(line.split(" at ")[0] for line in waits.elements()) == [
        *("aten._local_scalar_dense.default", "aten._local_scalar_dense.default", "aten._to_copy.default"),
        *("aten.bincount.default", "aten.index.Tensor", "aten.nonzero.default"),
    ]
    assert [line.split(" at ")[0] for line in elsewhere.elements()] == ["aten.ones.default"]


def careless() -> tuple[Counter[str], Counter[str]]:
    """What a step must not do."""
    import torch_npu  # noqa: F401 - the emulated one

    numbers = torch.arange(4, device="npu")
    with Watch("npu") as watch:
        numbers[0].item()
        if numbers.any():
            numbers.nonzero()
        numbers.bincount()
        numbers[numbers > 2]
        numbers.cpu()
        torch.ones(4).sum()
    return watch.waits, watch.elsewhere
