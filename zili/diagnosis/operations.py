"""Checks that the operations of a training step give the right numbers on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zili import ops
from zili.chips.device import Device
from zili.diagnosis.findings import Finding, Severity
from zili.ops.examples import Example, examples
from zili.ops.registry import OPERATIONS
from zili.ops.yardstick import Distance, compared, first_line, on_cpu

AREA = "numbers"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS, _COLUMNS = 256, 192


def _inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    with torch.device("cpu"):
        return [torch.randn(*shape, generator=draw) for shape in shapes]


_ONE = ((_ROWS, _COLUMNS),)
_TWO = ((_ROWS, _COLUMNS), (_ROWS, _COLUMNS))
_LONG = ((64, 4096),)
"""Sums whose parts are rounded show it by their length."""
_CHOSEN = [(7 * i) % _ROWS for i in range(_ROWS)]

ELEMENTARY: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "add": (torch.add, _TWO),
    "mul": (torch.mul, _TWO),
    "div": (lambda x, y: x / (y.abs() + 0.5), _TWO),
    "exp": (torch.exp, _ONE),
    "log": (lambda x: (x.abs() + 0.1).log(), _ONE),
    "rsqrt": (lambda x: (x.abs() + 0.1).rsqrt(), _ONE),
    "sin": (torch.sin, _ONE),
    "cos": (torch.cos, _ONE),
    "tanh": (torch.tanh, _ONE),
    "sigmoid": (torch.sigmoid, _ONE),
    "silu": (F.silu, _ONE),
    "sum": (lambda x: x.sum(-1), _LONG),
    "mean": (lambda x: x.mean(-1), _LONG),
    "amax": (lambda x: x.amax(-1), _ONE),
    "cumsum": (lambda x: x.cumsum(-1), _ONE),
    "softmax": (lambda x: x.softmax(-1), _LONG),
    "logsumexp": (lambda x: x.logsumexp(-1), _LONG),
    "mm": (torch.mm, ((128, 4096), (4096, 96))),
    "mm of many rows": (torch.mm, ((4096, 48), (48, 64))),
    "bmm": (torch.bmm, ((4, 64, 1024), (4, 1024, 80))),
    "where": (lambda x, y: torch.where(x > 0, x, y), _TWO),
    "cat": (lambda x, y: torch.cat((x, y), -1), _TWO),
    "sort": (lambda x: x.sort(-1).values, _ONE),
    "topk": (lambda x: x.topk(8, -1).values, _ONE),
    "index_select": (lambda x: x.index_select(0, torch.tensor(_CHOSEN, device=x.device)), _ONE),
    "embedding": (lambda x: F.embedding(torch.tensor(_CHOSEN, device=x.device), x), _ONE),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, torch.tensor(_CHOSEN[: len(x)], device=x.device), reduction="none"),
        _LONG,
    ),
}
"""What the family's models are made of, each with shapes of its inputs."""


def examine(device: Device) -> Iterator[Finding]:
    """One finding a precision and operation: forward, and backward where it has a gradient."""
    for name, dtype in DTYPES.items():
        problem = _missing(device, dtype)
        if problem is not None:
            severity = Severity.BROKEN if name == "fp32" else Severity.FALLBACK
            yield Finding(AREA, name, severity, problem, "" if name == "fp32" else "train in another precision")
            continue
        needed = name == "fp32"
        if name == "bf16" and (said := device.capability("bf16")).value:
            needed = True
        elif name == "bf16":
            yield Finding(AREA, name, Severity.FALLBACK, f"computes, but {said.reason}", 'set chip.precision = "fp32"')
        for operation, (function, shapes) in ELEMENTARY.items():
            inputs = [Example(tuple(on_cpu(_inputs(*shapes), dtype)), {})]
            found = _compared(f"{operation} in {name}", function, inputs, device, needed=needed)
            yield _known(found, f"aten::{operation}", dtype, device)
        if name != "fp16":  # runs are in fp32 or bf16
            yield from _own(device, name, dtype)


def _missing(device: Device, dtype: torch.dtype) -> str | None:
    try:
        (torch.ones(8, 8, dtype=dtype, device=device.torch) @ torch.ones(8, 8, dtype=dtype, device=device.torch)).cpu()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"cannot be computed in: {first_line(error)}"
    return None


def _own(device: Device, precision: str, dtype: torch.dtype) -> Iterator[Finding]:
    """This house's operations, every version that runs here."""
    for operation, reference in OPERATIONS.items():
        inputs = examples(operation, dtype)
        yield _compared(f"{operation} (reference) in {precision}", reference, inputs, device)
        for version in ops.versions(device.backend.operations):
            if version.operation == operation and version.lacks(device.type, precision) is None:
                label = f"{operation} ({version.name}) in {precision}"
                yield _compared(label, version.function, inputs, device, reference)


def _known(found: Finding, operation: str, dtype: torch.dtype, device: Device) -> Finding:
    """`found`, or that it is no news: what the vendor's software is known to turn down, no run asks for."""
    if found.severity is Severity.GOOD or found.figures:
        return found
    named = str(dtype).removeprefix("torch.")
    for refusal in device.backend.refusals:
        if refusal.capability is None and refusal.turns_down(operation, {}, named):
            seen = f"{found.seen}; known ({refusal.source})"
            return replace(found, severity=Severity.FALLBACK, seen=seen, fix="no run asks for it")
    return found


def _compared(
    label: str,
    function: Callable[..., Any],
    inputs: Sequence[Example],
    device: Device,
    reference: Callable[..., Any] | None = None,
    needed: bool = True,
) -> Finding:
    """`function` on the device against `reference` on the CPU, if another, in the precision of `inputs` and in fp64.

    A wrong version of an operation is not taken, by this same rule (`zili.ops.registry`); nor is a precision that runs
    do not use.
    """
    replaceable = reference is not None or not needed
    wrong = Severity.FALLBACK if replaceable else Severity.BROKEN
    fix = "not used: another way is taken" if replaceable else "do not train on it; update the plugin or driver"
    reached: list[tuple[str, Distance]] = []
    try:
        for given in inputs:
            reached += compared(function, reference or function, *given, device.torch).items()
    except Exception as error:  # a vendor's kernel may raise anything
        return Finding(AREA, label, wrong, f"fails: {first_line(error)}", fix)
    figures: dict[str, float] = {}
    for way, measured in reached:
        figures[f"{way} ulp"] = max(measured.ulps, figures.get(f"{way} ulp", 0.0))
    for way, measured in reached:
        if not measured.fits:
            return Finding(AREA, label, wrong, f"{way} is {measured}", fix, figures)
    return Finding(AREA, label, Severity.GOOD, f"{max(figures.values(), default=0.0):.2g} ulp", figures=figures)
