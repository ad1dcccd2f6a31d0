"""Ascend's versions of the operations on the emulated device: their numbers against the references'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from many import on_processes, train
from plugins import ASCEND, Environment
from tiny_models import Kind, Layout, Row, Runs, slow

from zili.errors import ConfigError

VENDOR = "zili.ops.ascend"
BF16 = 5e-3
"""Of losses; each rounds to 8 bits in other places."""


def wrong() -> tuple[int, dict[str, str]]:
    """How many versions there are, and those that are not the reference but for rounding, gradients too, in bf16."""
    import torch_npu  # noqa: F401 - the emulated one

    from zili.ops import ascend, registry
    from zili.ops.examples import example
    from zili.ops.yardstick import compared

    found = {}
    for version in ascend.VERSIONS:
        assert version.lacks("npu", "bf16") is None
        inputs = example(version.operation, "cpu", torch.bfloat16)
        reached = compared(version.function, registry.OPERATIONS[version.operation], *inputs, "npu:0")
        found |= {f"{version.operation} {way}": str(seen) for way, seen in reached.items() if not seen.fits}
    return len(ascend.VERSIONS), found


def test_every_version_is_the_reference_but_for_rounding(with_plugins: Environment) -> None:
    ((count, found),) = on_processes(1, wrong, environment=with_plugins(ASCEND))
    assert count == 9 and found == {}


def attention_errors() -> dict[str, float]:
    """Of queries that are the end of longer rows, as with context parallelism, and of documents among them."""
    import torch_npu  # noqa: F401

    from zili.ops import ascend, reference

    found = {}
    draw = torch.Generator().manual_seed(0)
    for name, queries, ends in (
        ("whole rows", 96, [[96], [96]]),
        ("documents", 96, [[30, 96], [1, 2, 96]]),
        ("the end of rows", 32, [[96], [96]]),
        ("the end of documents", 32, [[30, 50, 80, 96], [64, 65, 96]]),
        ("more documents than one call takes", 96, [[10, 20, 60, 96], [30, 31, 32, 33, 96]]),
    ):
        ascend._MOST_DOCUMENTS = 4 if name.startswith("more") else 1000
        ids = torch.zeros(2, 96, dtype=torch.int32)
        for row, stops in zip(ids, ends, strict=True):
            for stop in stops[:-1]:
                row[stop:] += 1
        shapes = ((queries, 6), (96, 2), (96, 2))
        heads = [
            torch.randn(2, length, count, 16, generator=draw).bfloat16().to("npu").requires_grad_()
            for length, count in shapes
        ]
        results: list[Any] = []
        for function in (ascend.attention, reference.attention):
            out = function(*heads, document_ids=ids.to("npu"))
            gradients = torch.autograd.grad(out.float().square().sum(), heads)
            results.append([out, *gradients])
        pairs = zip(*results, strict=True)
        found[name] = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
    return found


def test_attention_by_lengths_is_attention_by_masks(with_plugins: Environment) -> None:
    (found,) = on_processes(1, attention_errors, environment=with_plugins(ASCEND))
    assert {name: error for name, error in found.items() if not error < 0.02} == {}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("dense", ""), slow("mixture", ""), slow("mixture", "shards=2 tensor=2 expert=2"), slow("dense", "context=2")],
)
def test_training_with_all_of_them(
    kind: Kind, layout: str, runs: Runs, with_plugins: Environment, request: pytest.FixtureRequest
) -> None:
    from zili.ops import ascend

    chosen = Layout(layout)
    fused = [f"chip.operations.{version.operation}={version.name}" for version in ascend.VERSIONS]
    base = [*chosen.overrides, "chip.precision=bf16", "chip.name=ascend"]
    wanted, found = (
        on_processes(chosen.world, train, runs.recipe(kind, *base, *how), environment=with_plugins(ASCEND))[0]
        for how in ([f"chip.operations.{version.operation}=reference" for version in ascend.VERSIONS], fused)
    )
    assert wanted.losses != found.losses, "they ran"
    Row.of(f"{chosen}, npu operations", chosen.world, kind, wanted, found, BF16, 20 * BF16).check(request)


def choices(faults: list[tuple[Any, ...]]) -> dict[str, tuple[str, str]]:
    import emulated
    import torch_npu  # noqa: F401

    from zili import ops

    emulated.plant(*(emulated.Fault(*fault) for fault in faults))
    found = ops.choose("npu", "bf16", {}, vendor=VENDOR)
    return {operation: (name, reason) for operation, name, reason in found}


def test_a_version_that_differs_or_fails_on_the_chip_is_not_taken(with_plugins: Environment) -> None:
    # silu is what the fused operation is made of here, attention of batched products.
    faults = [("aten::silu", "scale", 0.03), ("aten::bmm", "raise")]
    (found,) = on_processes(1, choices, faults, environment=with_plugins(ASCEND))
    name, reason = found["swiglu"]
    assert name == "reference" and "differs from the reference: forward is" in reason, reason
    name, reason = found["attention"]
    assert name == "reference" and "failed (the emulated device has no kernel" in reason, reason


def test_one_asked_for_by_name_must_run(with_plugins: Environment) -> None:
    (message,) = on_processes(1, refusal, environment=with_plugins(ASCEND))
    assert "npu_fusion_attention takes bf16, not fp32" in message


def refusal() -> str:
    import torch_npu  # noqa: F401

    from zili import ops

    try:
        ops.choose("npu", "fp32", {"attention": "npu"}, vendor=VENDOR)
    except ConfigError as error:
        return str(error)
    return ""
