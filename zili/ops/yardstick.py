"""How far a result is from the exact one, in units of its own precision, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_TIMES_THE_CPUS = 4.0
_ULPS_MORE = 4.0
_BIAS = 0.3
"""Mean signed error, ulps of each element: rounding to nearest has none, cutting has half a one."""
_ROUNDED_ONCE = 2.0
"""Ulps: what an element is off at the most that was not summed up of many."""
_ENOUGH = 1000
"""Elements from which on a mean says something."""


@dataclass(frozen=True)
class Distance:
    """Of a result from the same operation in fp64 on the CPU."""

    ulps: float
    """Largest error, in units in the last place of the largest element; inf where one is nan and the other is not."""
    expected: float
    """What it may be: a few times what the CPU's own result in that precision has."""
    bias: float = 0.0
    """Mean error toward zero, in ulps of each element."""

    @property
    def fits(self) -> bool:
        """Whether rounding explains it."""
        return self.ulps <= self.expected and abs(self.bias) <= _BIAS

    def __str__(self) -> str:
        off = f"{self.ulps:.3g} ulp off (up to {self.expected:.3g} is rounding)"
        if self.ulps > self.expected or abs(self.bias) <= _BIAS:
            return off
        return f"{off}, in the mean {abs(self.bias):.2f} ulp {'toward' if self.bias > 0 else 'away from'} zero"


def distance(found: Tensor, same: Tensor, exact: Tensor | None, unit: torch.dtype | None = None) -> Distance:
    """Of `found`, where the CPU has `same` in its precision, and `exact` in fp64 if there is one.

    `unit` is the precision whose last place is the unit, where it is not the result's: an fp32 gradient of what was
    computed in bf16 is no better than bf16.
    """
    found, same = found.detach().cpu(), same.detach()
    if not found.is_floating_point():
        wrong = 0.0 if torch.equal(found.to(same.dtype), same) else math.inf
        return Distance(wrong, 0.0)
    right = (same if exact is None else exact.detach()).double()
    if not torch.equal(found.isnan(), same.isnan()) or not torch.equal(_infinities(found), _infinities(same)):
        return Distance(math.inf, 0.0)
    finite = right.isfinite() & found.isfinite()
    if not finite.any():
        return Distance(0.0, 0.0)
    right, own, cpus = right[finite], found.double()[finite], same.double()[finite]
    ulp = torch.finfo(unit or found.dtype).eps * float(right.abs().max().clamp(min=torch.finfo(found.dtype).tiny))
    cpu_error = float((cpus - right).abs().max()) / ulp
    error = float((own - right).abs().max()) / ulp
    return Distance(error, _TIMES_THE_CPUS * cpu_error + _ULPS_MORE, _bias(own, cpus, right, unit or found.dtype))


def _infinities(x: Tensor) -> Tensor:
    """1 where `x` is infinite, -1 where it is minus infinite, else 0."""
    return x.isinf() * x.sign()


def _bias(own: Tensor, cpus: Tensor, right: Tensor, dtype: torch.dtype) -> float:
    """Mean error toward zero beyond the CPU's: of operations that round each element once, with elements enough."""
    large = right.abs() > 1e-3 * right.abs().max()
    if int(large.sum()) < _ENOUGH:
        return 0.0
    place = torch.finfo(dtype).eps * torch.exp2(right[large].abs().log2().floor())
    if float(((cpus - right)[large].abs() / place).max()) > _ROUNDED_ONCE:
        return 0.0
    sign = right[large].sign()
    return float((((cpus - own)[large] * sign) / place).clamp(-4, 4).mean())


def on_cpu(values: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies of all tensors in `values` on the CPU, floating ones as `dtype` if one is given; other values as they are,
    devices replaced."""

    def copied(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor):
            return value
        host = value.detach().to("cpu", copy=True)
        return host.to(dtype) if dtype is not None and host.is_floating_point() else host

    return tree_map(copied, values)


def examined(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of `function` and gradients of its floating arguments, which are made leaves."""
    leaves, layout = tree_flatten(arguments)
    leaves = [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    out = function(*tree_unflatten(leaves, layout))
    outputs = [out] if isinstance(out, Tensor) else [part for part in out if isinstance(part, Tensor)]
    differentiable = [output for output in outputs if output.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [_upstream(output) for output in differentiable])
    gradients = [leaf.grad for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad is not None]
    return outputs, gradients


def compared(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
    device: torch.device | str,
) -> dict[str, Distance]:
    """How far outputs and gradients of `function` on `device` are from those of `reference` on the CPU.

    `arguments` and `keywords` are on the CPU. Gradients of floating arguments are compared, keywords have none.

    Raises:
        ValueError: `function` has other outputs, or no gradient where the reference has one.
    """

    def with_keywords(called: Callable[..., Any], there: Any) -> Callable[..., Any]:
        own = {key: value.to(there) if isinstance(value, Tensor) else value for key, value in keywords.items()}
        return lambda *given: called(*given, **own)

    plain = with_keywords(reference, "cpu")
    exact = examined(plain, on_cpu(arguments, torch.float64))
    same = examined(plain, arguments)
    there = [value.detach().to(device) if isinstance(value, Tensor) else value for value in arguments]
    found = examined(with_keywords(function, device), there)
    precisions = [value.dtype for value in arguments if isinstance(value, Tensor) and value.is_floating_point()]
    if torch.is_autocast_enabled("cpu"):
        precisions.append(torch.get_autocast_dtype("cpu"))
    coarsest = max(precisions, key=lambda dtype: torch.finfo(dtype).eps)
    reached = {}
    for way, ours, cpus, right in zip(("forward", "backward"), found, same, exact, strict=True):
        if len(ours) != len(cpus):
            what = "outputs" if way == "forward" else "gradients"
            raise ValueError(f"{len(ours)} {what} where the reference has {len(cpus)}")
        for i, (one, other, best) in enumerate(zip(ours, cpus, right, strict=True)):
            reached[way if i == 0 else f"{way} {i + 1}"] = distance(one, other, best, coarsest)
    return reached


def first_line(error: BaseException) -> str:
    """Of an error's message; its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _upstream(output: Tensor) -> Tensor:
    """A gradient to begin with, the same on every device: with ones, those of norms and softmaxes all but cancel."""
    draw = torch.Generator().manual_seed(2)
    # A quarter to one and a quarter in eighths: exact in every precision.
    return torch.randint(2, 11, output.shape, generator=draw).div(8).to(output.dtype).to(output.device)
