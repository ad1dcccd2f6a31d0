"""What the comparison of results finds in bf16, and that sound ways to compute are never called wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from planted import off_by, places, summed_in_bf16
from torch import Tensor

from zili.ops import product, reference
from zili.ops.chunked_cross_entropy import chunked_linear_cross_entropy
from zili.ops.examples import Example, examples
from zili.ops.registry import OPERATIONS
from zili.ops.yardstick import Distance, compared, distance

BF16 = torch.bfloat16
Operation = Callable[..., Any]


def wrong(function: Operation, operation: str, cases: list[Example]) -> dict[str, Distance]:
    """Ways in which `function` is called wrong."""
    found = [way for case in cases for way in compared(function, OPERATIONS[operation], *case, "cpu").items()]
    return {way: measured for way, measured in found if not measured.fits}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("amount", [0.005, -0.005])
def test_half_a_per_cent_is_found_in_each_output_and_each_gradient(operation: str, amount: float) -> None:
    cases = examples(operation, BF16)[:1]
    for place in places(OPERATIONS[operation], cases[0]):
        found = wrong(off_by(OPERATIONS[operation], 1.0 + amount, place), operation, cases)
        way = "forward" if place.way == "output" else "backward"
        assert found and all(name.startswith(way) for name in found), (place, found)
        assert ("large" if amount > 0 else "small") in str(next(iter(found.values())))


def rounded_once(function: Operation) -> Operation:
    """`function` computed in fp32 and rounded at its end: what a fused kernel does."""

    def called(*arguments: Any, **keywords: Any) -> Any:
        dtype = arguments[0].dtype
        out = function(*(x.float() if is_floating(x) else x for x in arguments), **keywords)
        if function is reference.linear_cross_entropy:
            return out
        return out.to(dtype) if isinstance(out, Tensor) else tuple(x.to(dtype) if is_floating(x) else x for x in out)

    return called


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


SOUND: dict[str, tuple[Operation, ...]] = {name: (rounded_once(plain),) for name, plain in OPERATIONS.items()}
SOUND["grouped_matmul"] += (product.grouped,)
SOUND["linear_cross_entropy"] += (chunked_linear_cross_entropy, partial(chunked_linear_cross_entropy, like="chip"))


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("seeds", [range(1, 3), pytest.param(range(3, 60), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_another_sound_way_to_compute_is_never_called_wrong(operation: str, dtype: torch.dtype, seeds: range) -> None:
    for seed in seeds:
        for function in SOUND[operation]:
            found = wrong(function, operation, examples(operation, dtype, seed))
            assert found == {}, (seed, function)


@pytest.mark.parametrize("block", [8, 64])
def test_products_whose_sums_are_rounded_on_the_way_are_found(block: int) -> None:
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return summed_in_bf16(x, weight.t(), block)

    assert "forward" in wrong(linear, "linear", examples("linear", BF16))


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        *(("rms_norm", lambda x, w, eps, f=f: reference.rms_norm(x, w, eps * f)) for f in (0.0, 0.9, 1.1, 1000.0)),
        *(
            ("add_rms_norm", lambda x, b, w, eps, f=f: reference.add_rms_norm(x, b, w, eps * f))
            for f in (0.0, 0.9, 1.1, 1000.0)
        ),
        *(("attention", lambda q, k, v, f=f, **rest: reference.attention(q * f, k, v, **rest)) for f in (0.98, 1.02)),
        ("rotate", lambda x, cos, sin: reference.rotate(x, cos.clamp(-1, 1), sin.clamp(-1, 1))),
        ("swiglu", lambda gate, up: reference.swiglu(gate.clamp(max=7), up.clamp(-7, 7))),
        (
            "linear_cross_entropy",
            lambda h, w, y, m=1.0, part=None, reduction="sum": reference.linear_cross_entropy(
                h, w, y, m * 0.99, part, reduction
            ),
        ),
    ],
)
def test_what_shows_at_another_scale_is_found(operation: str, function: Operation) -> None:
    assert wrong(function, operation, examples(operation, BF16))


def test_a_loss_of_few_rows_is_judged_by_what_rounding_does_to_it() -> None:
    """One number has no scatter: how far rounding moves it is seen by moving the inputs."""
    draw = torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(256, 64, generator=draw), torch.randint(0, 128, (256,), generator=draw)
    for scale in (0.05, 0.5, 5.0):
        weight = scale * torch.randn(128, 64, generator=draw)
        case = Example((hidden.bfloat16(), weight.bfloat16(), labels), {})
        assert wrong(rounded_once(reference.linear_cross_entropy), "linear_cross_entropy", [case]) == {}
        off = off_by(reference.linear_cross_entropy, 1.005, places(reference.linear_cross_entropy, case)[0])
        assert "forward" in wrong(off, "linear_cross_entropy", [case])


@pytest.mark.parametrize("size", [32, 64, 1000, 100_000])
def test_the_chance_of_a_factor_is_that_of_rounding(size: int) -> None:
    """Against what normal numbers rounded to bf16 do, two hundred times: none is called wrong, all that are cut are."""
    draw = torch.Generator().manual_seed(size)
    for _ in range(200 if size < 10_000 else 10):
        exact = torch.randn(size, generator=draw).double()
        near = exact.bfloat16()
        again = (exact * (1 + 2**-9 * torch.randn(size, generator=draw))).bfloat16()  # rounded once before
        assert distance(near, near, exact).fits and distance(again, near, exact).fits
        if size >= 64:
            assert not distance((exact * 1.005).bfloat16(), near, exact).fits
