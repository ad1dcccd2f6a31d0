"""What `zili doctor` finds of planted errors in bf16, in this process: the CPU is the chip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planted import Place, off_by, places, summed_in_bf16
from torch import Tensor

from zili import chips
from zili.chips.device import Device
from zili.diagnosis import operations
from zili.diagnosis.findings import Finding, Severity
from zili.ops.examples import Example, examples
from zili.ops.registry import OPERATIONS
from zili.ops.versions import Version


@pytest.fixture(scope="module")
def cpu() -> Device:
    return Device(chips.activate(chips.find_backend("cpu")))


def planted(amount: float, everywhere: bool) -> Iterator[Version]:
    """Of every operation, versions with that much more in one output or gradient: in each, or in the last."""
    for name, plain in OPERATIONS.items():
        found = places(plain, examples(name, torch.bfloat16)[0])
        for place in found if everywhere else found[-1:]:
            yield Version(name, f"{place.way} {place.index}", off_by(plain, 1.0 + amount, place), lambda *_: None)


def examined(monkeypatch: pytest.MonkeyPatch, device: Device, *versions: Version) -> dict[str, Finding]:
    monkeypatch.setattr("zili.ops.registry.VERSIONS", versions)
    found = operations._own(device, "bf16", torch.bfloat16)
    return {finding.name: finding for finding in found if "(reference)" not in finding.name}


@pytest.mark.parametrize(("everywhere", "count"), [(False, 10), pytest.param(True, 31, marks=pytest.mark.slow)])
def test_half_a_per_cent_in_any_output_or_gradient_is_found(
    everywhere: bool, count: int, monkeypatch: pytest.MonkeyPatch, cpu: Device
) -> None:
    found = examined(monkeypatch, cpu, *planted(0.005, everywhere))
    assert len(found) == count
    assert [name for name, finding in found.items() if finding.severity is Severity.GOOD] == []
    assert all("too large" in finding.seen for finding in found.values())


def late(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
    """Attention that sees each key one position too late."""
    return OPERATIONS["attention"](query, *(F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1] for x in (key, value)), **rest)


def test_an_eps_and_a_mask_that_are_wrong_are_found_and_references_are_good(
    monkeypatch: pytest.MonkeyPatch, cpu: Device
) -> None:
    def doubled(plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: plain(*given[:-1], 2 * given[-1])

    versions = [
        Version(name, "eps", doubled(OPERATIONS[name]), lambda *_: None) for name in ("rms_norm", "add_rms_norm")
    ]
    versions += [Version("attention", "late", late, lambda *_: None)]
    monkeypatch.setattr("zili.ops.registry.VERSIONS", tuple(versions))
    found = {finding.name: finding for finding in operations._own(cpu, "bf16", torch.bfloat16)}
    bad = {name for name, finding in found.items() if finding.severity is not Severity.GOOD}
    assert bad == {f"{version.operation} ({version.name}) in bf16" for version in versions}


def sum_in_bf16(x: Tensor, block: int) -> Tensor:
    total = torch.zeros(len(x), dtype=x.dtype)
    for part in x.split(block, -1):
        total = total + part.sum(-1)
    return total


ROUNDED: dict[str, Callable[[int], Callable[..., Any]]] = {
    "mm": lambda block: lambda a, b: summed_in_bf16(a, b, block),
    "bmm": lambda block: lambda a, b: torch.stack([summed_in_bf16(*pair, block) for pair in zip(a, b, strict=True)]),
    "sum": lambda block: lambda x: sum_in_bf16(x, block),
    "mean": lambda block: lambda x: sum_in_bf16(x, block) / x.shape[-1],
    "softmax": lambda block: lambda x: x.exp() / sum_in_bf16(x.exp(), block)[:, None],
}


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("operation", ROUNDED)
def test_sums_that_are_rounded_on_the_way_are_found(operation: str, block: int, cpu: Device) -> None:
    function, shapes = operations.ELEMENTARY[operation]
    inputs = [Example(tuple(x.bfloat16() for x in operations._inputs(*shapes)), {})]
    finding = operations._compared(operation, ROUNDED[operation](block), inputs, cpu, function)
    assert finding.severity is not Severity.GOOD and "forward is" in finding.seen, finding


@pytest.mark.parametrize("operation", ["exp", "silu", "mm", "mean", "amax", "softmax", "cross_entropy", "embedding"])
def test_half_a_per_cent_of_what_models_are_made_of_is_found(operation: str, cpu: Device) -> None:
    function, shapes = operations.ELEMENTARY[operation]
    inputs = [Example(tuple(x.bfloat16() for x in operations._inputs(*shapes)), {})]
    ways = [Place("output", 0), *(Place("gradient", i) for i in range(len(shapes)))]
    for place in ways:
        finding = operations._compared(operation, off_by(function, 1.005, place), inputs, cpu, function)
        assert finding.severity is not Severity.GOOD, place
