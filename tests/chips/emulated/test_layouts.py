"""Every kind of layout trains on devices of three vendors as on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from many import Curve, on_processes, train
from plugins import VENDORS, Environment, Vendor
from tiny_models import BOUND, Kind, Layout, Row, Runs, slow

from zili.config import RunConfig
from zili.ops.registry import OPERATIONS

# Few steps: an emulated device takes its time, and what differs does so from the first one on.
PLAIN = (
    *("training.steps=3", "training.global_batch=8"),
    *(f"chip.operations.{operation}=reference" for operation in OPERATIONS),
)
CORE: dict[int, list[tuple[Kind, str]]] = {
    1: [("dense", ""), ("mixture", "")],
    2: [
        *(("dense", "shards=2"), ("dense", "tensor=2"), ("dense", "context=2"), ("dense", "pipeline=2")),
        ("mixture", "shards=2 expert=2"),
    ],
    4: [
        *(("dense", "replicas=2 shards=2"), ("dense", "shards=2 tensor=2"), ("dense", "context=2 pipeline=2")),
        *(("mixture", "tensor=2 expert=2 shards=2"), ("mixture", "shards=2 pipeline=2 expert=2")),
    ],
}


def train_all(configs: Sequence[RunConfig]) -> list[Curve]:
    """One run after the other in the same processes."""
    return [train(config) for config in configs]


@pytest.mark.parametrize(
    ("vendor", "world"),
    [
        *((vendor, 1) for vendor in VENDORS),
        *(slow(vendor, world) for world in (2, 4) for vendor in VENDORS),
    ],
    ids=str,
)
def test_a_device_has_the_cpus_curve(
    vendor: Vendor, world: int, runs: Runs, with_plugins: Environment, request: pytest.FixtureRequest
) -> None:
    layouts = [(kind, Layout(text)) for kind, text in CORE[world]]
    configs = [runs.recipe(kind, *layout.overrides, *PLAIN, f"chip.name={vendor.backend}") for kind, layout in layouts]
    curves, *others = on_processes(world, train_all, configs, environment=with_plugins(vendor))
    assert all(other == curves for other in others), "all processes report the same"
    for (kind, layout), curve in zip(layouts, curves, strict=True):
        # Not the same bits: attention is torch's formula there, a kernel of its own on the CPU.
        Row.of(f"{layout} on {vendor}", world, kind, runs.alone(kind, *PLAIN), curve, BOUND).check(request)
