"""Ascend's versions of the operations on the emulated device: their numbers against the references', under each reading
of what Huawei publishes (npu_readings.py), and what becomes of calls that it does not publish."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import npu_readings
import pytest
import torch
from many import on_processes, train
from plugins import ASCEND, Environment
from tiny_models import Kind, Layout, Row, Runs, slow
from torch import Tensor

from zili.errors import ChipError, ConfigError

VENDOR = "zili.ops.ascend"
BF16 = 5e-3
"""Of losses; each rounds to 8 bits in other places."""


@pytest.fixture(params=npu_readings.READINGS, ids=lambda reading: "-".join(reading.values()))
def reading(request: pytest.FixtureRequest) -> dict[str, str]:
    """Variables of a process in which one of the vendor's sources is followed."""
    return request.param


def wrong() -> tuple[int, dict[str, str]]:
    """How many versions there are, and those that are not the reference but for rounding, gradients too."""
    import torch_npu  # noqa: F401 - the emulated one

    from zili.ops import ascend, registry

    found = {}
    for version in ascend.VERSIONS:
        for precision in ("bf16", "fp32"):
            if version.lacks("npu", precision) is None:
                plain = registry.OPERATIONS[version.operation]
                found[f"{version.operation} {precision}"] = registry._differs(plain, version, "npu", precision)
    return len(found), {name: problem for name, problem in found.items() if problem}


def test_every_version_is_the_reference_but_for_rounding(with_plugins: Environment, reading: dict[str, str]) -> None:
    ((count, found),) = on_processes(1, wrong, environment=with_plugins(ASCEND, **reading))
    assert count == 9 + 5 and found == {}


class Parts:
    """Parts of one vocabulary, computed in turns until each has heard what it asks of the others."""

    def __init__(self, count: int) -> None:
        self.asked: list[list[Tensor]] = [[] for _ in range(count)]

    def part(self, index: int, first: int) -> Any:
        told = 0

        def over_all(own: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
            nonlocal told
            others = [asked[told].detach() for i, asked in enumerate(self.asked) if i != index and len(asked) > told]
            self.asked[index] = [*self.asked[index][:told], own.detach(), *self.asked[index][told + 1 :]]
            told += 1
            return combine(torch.stack((own, *others)))

        class Part:
            def sum(self, x: Tensor) -> Tensor:
                return over_all(x, lambda all_of_them: all_of_them.sum(0))

            def max(self, x: Tensor) -> Tensor:
                return over_all(x, lambda all_of_them: all_of_them.amax(0))

        part = Part()
        part.first = first  # type: ignore[attr-defined]
        return part


def losses_by_parts() -> tuple[float, float, float]:
    """Largest errors of losses, and of the gradients of rows and weights, by three parts against torch's own."""
    import torch_npu  # noqa: F401

    from zili.ops import ascend

    draw = torch.Generator().manual_seed(0)
    starts = [0, 128, 384, 640]
    hidden, weight = torch.randn(96, 64, generator=draw).bfloat16(), torch.randn(640, 64, generator=draw).bfloat16()
    labels = torch.randint(0, 640, (96,), generator=draw)
    labels[:9] = torch.tensor([0, 127, 128, 129, 383, 384, 639, -100, 500])
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    exact = torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), labels, reduction="none")
    exact.sum().backward()
    parts = Parts(3)
    for _ in range(3):  # a maximum, then two sums that build on it
        losses, by_hidden, by_weight = [], torch.zeros(96, 64), []
        for i, (first, end) in enumerate(pairwise(starts)):
            rows, matrix = (x.to("npu").requires_grad_() for x in (hidden, weight[first:end]))
            loss = ascend.linear_cross_entropy(
                rows, matrix, labels.to("npu"), part=parts.part(i, first), reduction="none"
            )
            loss.sum().backward()
            losses.append(loss.detach().cpu())
            by_hidden += rows.grad.cpu().float()
            by_weight.append(matrix.grad.cpu())

    def error(found: Tensor, right: Tensor) -> float:
        return float((found.double() - right).norm() / right.norm())

    return (
        max(error(loss, exact.detach()) for loss in losses),
        error(by_hidden, wide[0].grad),
        error(torch.cat(by_weight), wide[1].grad),
    )


def test_every_label_of_a_shared_vocabulary_belongs_to_one_part(
    with_plugins: Environment, reading: dict[str, str]
) -> None:
    (errors,) = on_processes(1, losses_by_parts, environment=with_plugins(ASCEND, **reading))
    assert all(error < 1.5e-2 for error in errors), errors  # logits to 30 in bf16; a label without a part gives 0.1


def beyond_the_limits() -> dict[str, tuple[float, list[str]]]:
    """Of calls that are not published: largest difference from the reference, and what is said, in two calls each."""
    import torch_npu  # noqa: F401

    from zili.ops import ascend, registry

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16().to("npu")

    def integers(shape: tuple[int, ...], below: int) -> Tensor:
        return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(0)).to("npu")

    table = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).to("npu")
    ends = torch.arange(1, 1026, dtype=torch.int32).to("npu")
    calls: dict[str, tuple[Any, ...]] = {
        "rms_norm without rows": (drawn(0, 64), drawn(64), 1e-6),
        "add_rms_norm without rows": (drawn(0, 64), drawn(0, 64), drawn(64), 1e-6),
        "rotate of 1000 rows": (drawn(1000, 2, 1, 8), table, table),
        "swiglu without rows": (drawn(0, 64), drawn(0, 64)),
        "swiglu of rows of 48 bytes": (drawn(3, 12), drawn(3, 12)),
        "attention of 257 heads": (drawn(1, 2, 257, 16), drawn(1, 2, 257, 16), drawn(1, 2, 257, 16)),
        "attention of 528 elements": (drawn(1, 2, 1, 528), drawn(1, 2, 1, 528), drawn(1, 2, 1, 528)),
        "attention of more keys than fit": (drawn(1, 2, 1, 16), drawn(1, 97, 1, 16), drawn(1, 97, 1, 16)),
        "grouped_matmul of 1025 groups": (drawn(1025, 8), drawn(1025, 8, 8), ends),
        "grouped_matmul of one group": (drawn(4, 8), drawn(1, 8, 8), torch.tensor([4], dtype=torch.int32).to("npu")),
        "grouped_matmul of wide rows": (drawn(4, 65_536), drawn(2, 1, 65_536), ends[1:5:2]),
        "permute of 513 experts a token": (drawn(2, 8), integers((2, 513), 600)),
        "permute without rows": (drawn(0, 8), integers((0, 2), 4)),
        "unpermute of 513 experts a token": (drawn(1026, 8), integers((1026,), 1026), drawn(2, 513)),
        "unpermute without rows": (drawn(0, 8), integers((0,), 1), drawn(0, 2)),
        "linear_cross_entropy of 127 tokens": (drawn(4, 64), drawn(127, 64), integers((4,), 127)),
        "linear_cross_entropy of wide rows": (drawn(2, 65_535), drawn(128, 65_535), integers((2,), 128)),
        "linear_cross_entropy in fp32": (drawn(4, 64).float(), drawn(128, 64).float(), integers((4,), 128)),
        "linear_cross_entropy without rows": (drawn(0, 64), drawn(128, 64), integers((0,), 128)),
    }
    ascend._MOST_KEYS = 96
    found = {}
    for name, arguments in calls.items():
        operation = name.split()[0]
        function, results = getattr(ascend, operation), []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            for called in (function, function, registry.OPERATIONS[operation]):
                leaves = [
                    x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
                    for x in arguments
                ]
                out = called(*leaves)
                out = out if isinstance(out, Tensor) else out[0]
                out.float().square().sum().backward()
                grads = [x.grad for x in leaves if isinstance(x, Tensor) and x.grad is not None]
                results.append([x.float().cpu() for x in (out, *grads)])
        pairs = [pair for pair in zip(results[0], results[2], strict=True) if pair[0].numel()]
        differences = [float((one - other).detach().abs().max()) for one, other in pairs]
        found[name] = max(differences, default=0.0), [str(one.message) for one in said]
    return found


def test_what_is_not_published_the_reference_does_and_that_is_said_once(with_plugins: Environment) -> None:
    (found,) = on_processes(1, beyond_the_limits, environment=with_plugins(ASCEND))
    assert {name: difference for name, (difference, _) in found.items() if difference} == {}
    silent = {name for name, (_, said) in found.items() if not said}
    assert silent == {name for name in found if "without rows" in name}, "what computes nothing"
    assert all(len(said) <= 1 for _, said in found.values()), found
    assert all("the reference runs instead" in line for _, said in found.values() for line in said)
    assert "npu_fusion_attention takes at most 256 heads, not 257" in found["attention of 257 heads"][1][0]


def published_for() -> dict[str, str | None]:
    import torch_npu  # noqa: F401

    from zili.ops import ascend

    return {version.operation: version.lacks("npu", "bf16") for version in ascend.VERSIONS}


@pytest.mark.parametrize(
    ("chip", "refused"),
    [
        ("Ascend910B3", 0),
        ("Ascend910_9392", 0),
        ("Ascend950PR", 1),
        ("Ascend910A", 9),
        ("Ascend910ProB", 9),
        ("New", 0),
    ],
)
def test_the_chips_that_an_operation_is_published_for(chip: str, refused: int, with_plugins: Environment) -> None:
    (found,) = on_processes(1, published_for, environment=with_plugins(replace(ASCEND, chip=chip)))
    missing = {operation: problem for operation, problem in found.items() if problem}
    assert len(missing) == refused
    if chip == "Ascend950PR":
        assert missing["linear_cross_entropy"] == "npu_fused_linear_online_max_sum is for the A2, A3, and this is a 950"


def upstream_of_a_view() -> float:
    """Difference of gradients of SwiGLU from the reference's where what comes from above is not laid out whole."""
    import torch_npu  # noqa: F401

    from zili.ops import ascend, reference

    gradients = []
    for function in (ascend.swiglu, reference.swiglu):
        gate, up = (torch.linspace(-2, 2, 64).view(4, 16).to("npu").requires_grad_() for _ in range(2))
        function(gate, up).t().contiguous().square().sum().backward()
        gradients.append(gate.grad.cpu())
    return float((gradients[0] - gradients[1]).abs().max())


def test_a_gradient_that_is_a_view_is_laid_out(with_plugins: Environment) -> None:
    (difference,) = on_processes(1, upstream_of_a_view, environment=with_plugins(ASCEND))
    assert difference < 1e-5


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
        ("longer documents than one call takes", 96, [[10, 20, 60, 96], [96]]),
    ):
        ascend._MOST_DOCUMENTS = 4 if name.startswith("more") else 1000
        ascend._MOST_KEYS = 100 if name.startswith("longer") else 1_000_000
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
    base = [*chosen.overrides, "chip.precision=bf16", "chip.name=ascend", "training.global_batch=8"]
    wanted, found = (
        on_processes(chosen.world, train, runs.recipe(kind, *base, *how), 4, environment=with_plugins(ASCEND))[0]
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


def refusals() -> list[str]:
    """Refusals of an operation that does not run in fp32, and of one 0.5 % off in bf16, each asked for by name."""
    import emulated
    import torch_npu  # noqa: F401

    from zili import ops

    emulated.plant(emulated.Fault("aten::silu", "scale", 5e-3))
    said = []
    for precision, operation in (("fp32", "attention"), ("bf16", "swiglu")):
        with pytest.raises((ConfigError, ChipError)) as error:
            ops.choose("npu", precision, {operation: "npu"}, vendor=VENDOR)
        said.append(str(error.value))
    return said


def test_one_asked_for_by_name_must_run_and_agree(with_plugins: Environment) -> None:
    ((fp32, off),) = on_processes(1, refusals, environment=with_plugins(ASCEND))
    assert "npu_fusion_attention takes bf16, not fp32" in fp32
    assert "chip.operations.swiglu: 'npu' differs from the reference: forward is" in off
    assert "too large" in off and 'set it to "reference"' in off
