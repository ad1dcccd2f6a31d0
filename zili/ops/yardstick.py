"""How far a result is from the exact one, in units of its own precision, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zili.torch_private import tree_flatten, tree_map, tree_unflatten

_TIMES_THE_CPUS = 4.0
_ULPS_MORE = 4.0
_BIAS = 0.3
"""Mean signed error, ulps of each element: rounding to nearest has none, cutting has half a one."""
_ROUNDED_ONCE = 2.0
"""Ulps: what an element is off at the most that was not summed up of many."""
_ENOUGH = 1000
"""Elements from which on a mean says something."""
_ROUNDING = math.sqrt(math.log(2) / 18)
"""Root mean square of one rounding to nearest, in eps of the root mean square of what is rounded, where mantissas are
spread evenly over logarithms: of an element m 2^e it is 2^e eps / sqrt(12)."""
_IN_FP32 = 64 * torch.finfo(torch.float32).eps
"""What sums and functions may be off in fp32, in which chips compute what they then round."""
_ONE_SIDED = 1 / 5
"""Share of eps that all elements may be off together, as after a step whose numbers round alike; cutting in place of
rounding is more, a third."""
_DEVIATIONS = 5.0
"""Standard deviations beyond which no chance is left, among some thousands of comparisons."""
_ROUNDINGS = 4.0
"""How many more roundings an element may go through than the CPU's does; their squares add up."""
_FEW, _DRAWS = 100, 4
"""Elements below which a result does not show its own scatter, and how often its inputs are moved to see it."""


class Share(NamedTuple):
    """An error and how large it may be, as shares of a result's size."""

    found: float
    most: float


_NONE = Share(0.0, math.inf)


@dataclass(frozen=True)
class Distance:
    """How far a result is from that of the same operation in fp64 on the CPU."""

    ulps: float
    """Largest error, in units in the last place of the largest element; inf where one is nan and the other is not."""
    expected: float
    """What it may be: a few times what the CPU's own result in that precision has."""
    bias: float = 0.0
    """Mean error toward zero, in ulps of each element."""
    scale: Share = _NONE
    """The factor that the result as a whole is off by, less one, and less what the CPU's has of it."""
    scatter: Share = _NONE
    """Root mean square of the error over that of the exact result."""

    @property
    def fits(self) -> bool:
        """Whether rounding explains it."""
        return self.share <= 1.0 and abs(self.bias) <= _BIAS

    @property
    def share(self) -> float:
        """The largest error as a share of what it may be."""
        pairs = ((self.ulps, self.expected), *((abs(found), most) for found, most in (self.scale, self.scatter)))
        return max(found / most if most else found for found, most in pairs)

    def __str__(self) -> str:
        said = [f"{self.ulps:.3g} ulp off (up to {self.expected:.3g} is rounding)"]
        if abs(self.scale.found) > self.scale.most:
            way = "large" if self.scale.found > 0 else "small"
            said.append(f"as a whole {abs(self.scale.found):.2%} too {way} (up to {self.scale.most:.2%} is rounding)")
        if self.scatter.found > self.scatter.most:
            said.append(f"in the mean {self.scatter.found:.2%} off (up to {self.scatter.most:.2%} is rounding)")
        if abs(self.bias) > _BIAS:
            said.append(f"in the mean {abs(self.bias):.2f} ulp {'toward' if self.bias > 0 else 'away from'} zero")
        return ", ".join(said)


def distance(
    found: Tensor,
    same: Tensor,
    exact: Tensor | None,
    unit: torch.dtype | None = None,
    moved: Sequence[Tensor] = (),
) -> Distance:
    """How far `found` is off, where the CPU has `same` in its precision, and `exact` in fp64 if there is one.

    `unit` is the precision whose last place is the unit, where it is not the result's: an fp32 gradient of what was
    computed in bf16 is no better than bf16. `moved` are exact results of inputs that rounding could have given: how far
    a result of few elements may be off as a whole.
    """
    found, same = found.detach().cpu(), same.detach()
    if not found.is_floating_point():
        wrong = 0.0 if torch.equal(found.to(same.dtype), same) else math.inf
        return Distance(wrong, 0.0)
    right = (same if exact is None else exact.detach()).double()
    finite = right.isfinite() & found.isfinite()
    whole = bool(finite.all())  # as nearly always, and taking some elements costs more than all else here
    if not (whole and bool(same.isfinite().all())) and not _alike(found, same):
        return Distance(math.inf, 0.0)
    if not finite.any():
        return Distance(0.0, 0.0)

    def taken(x: Tensor) -> Tensor:
        return x.double() if whole else x.double()[finite]

    right, own, cpus = taken(right), taken(found), taken(same)
    unit = unit or found.dtype
    ulp = torch.finfo(unit).eps * float(right.abs().max().clamp(min=torch.finfo(found.dtype).tiny))
    cpu_error = float((cpus - right).abs().max()) / ulp
    error = float((own - right).abs().max()) / ulp
    bias = _bias(own, cpus, right, unit)
    if not right.any():
        return Distance(error, _TIMES_THE_CPUS * cpu_error + _ULPS_MORE, bias)
    rounded = found.dtype if moved else unit
    scale = _scale(own, cpus, right, torch.finfo(rounded).eps, [taken(other) for other in moved])
    scale = scale._replace(most=scale.most + _ONE_SIDED * torch.finfo(unit).eps)
    scatter = _scatter(own, cpus, right, torch.finfo(unit).eps)
    return Distance(error, _TIMES_THE_CPUS * cpu_error + _ULPS_MORE, bias, scale, scatter)


def _scale(own: Tensor, cpus: Tensor, right: Tensor, eps: float, moved: Sequence[Tensor]) -> Share:
    """The factor between `own` and `right` less one, <own, right> / <right, right> - 1, and its chance.

    The slope of a line through nought and its standard error where each element errs by its own measure (White 1980);
    independent errors leave it, however large they are, a shared factor moves it. No error is taken to be less than
    one rounding of each element gives, nor than `moved` show.
    """
    squares = right.square()
    size = squares.sum()

    def factor(x: Tensor) -> float:
        return float((x * right).sum() / size) - 1.0

    def deviation(x: Tensor, slope: float) -> float:
        return float(((x - (1.0 + slope) * right).square() * squares).sum().sqrt() / size)

    found, cpu = factor(own), factor(cpus)
    least = _ROUNDING * eps * float(squares.square().sum().sqrt() / size)
    least = max((least, *(abs(factor(other)) for other in moved)))
    # What the CPU is off beyond chance may be in what is found too, or not, or more of it.
    shared = 1.5 * cpu if abs(cpu) > _DEVIATIONS * max(least, deviation(cpus, cpu)) else 0.0
    low, high = sorted((shared, -shared / 3.0))
    beyond = found - min(max(found, low), high)
    return Share(beyond, _DEVIATIONS * max(least, deviation(own, found)) + _IN_FP32)


def _scatter(own: Tensor, cpus: Tensor, right: Tensor, eps: float) -> Share:
    """How far elements are off in the mean: sums whose parts are rounded add up errors that no single one shows."""
    squares = right.square()
    size = squares.sum()
    error, cpu = (float(((x - right).square().sum() / size).sqrt()) for x in (own, cpus))
    elements = float(size.square() / squares.square().sum())  # as many of one size would count for as much
    most = math.sqrt(_ROUNDINGS) * max(cpu, _ROUNDING * eps) * (1.0 + 3.0 / math.sqrt(elements))
    return Share(error, most + _IN_FP32)


def _alike(found: Tensor, same: Tensor) -> bool:
    """Whether both are nan, infinite and minus infinite in the same places."""
    kinds = (Tensor.isnan, Tensor.isposinf, Tensor.isneginf)
    return all(torch.equal(kind(found), kind(same)) for kind in kinds)


def _bias(own: Tensor, cpus: Tensor, right: Tensor, dtype: torch.dtype) -> float:
    """Mean error toward zero beyond the CPU's: of operations that round each element once, with elements enough."""
    sizes = right.abs()
    large = sizes > 1e-3 * sizes.max()
    if int(large.sum()) < _ENOUGH:
        return 0.0
    place = torch.finfo(dtype).eps * torch.exp2(sizes.log2().floor())
    if float(((cpus - right).abs() / place)[large].max()) > _ROUNDED_ONCE:
        return 0.0
    return float(((cpus - own) * right.sign() / place)[large].clamp(-4, 4).mean())


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
            few = way == "forward" and other.dtype.is_floating_point and other.dtype != coarsest and best.numel() < _FEW
            moved = [_moved(plain, arguments, coarsest, draw)[i] for draw in range(_DRAWS)] if few else ()
            reached[way if i == 0 else f"{way} {i + 1}"] = distance(one, other, best, coarsest, moved)
    return reached


def _moved(function: Callable[..., Any], arguments: Sequence[Any], precision: torch.dtype, draw: int) -> list[Tensor]:
    """Outputs of `function` in fp64 of arguments that would round to these in `precision`, or nearly."""
    generator, eps = torch.Generator().manual_seed(draw), torch.finfo(precision).eps

    def near(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value * (1.0 + eps * (torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5))

    with torch.no_grad():
        return examined(function, [near(value) for value in on_cpu(arguments, torch.float64)])[0]


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _upstream(output: Tensor) -> Tensor:
    """A gradient to begin with, the same on every device: with ones, those of norms and softmaxes all but cancel."""
    draw = torch.Generator().manual_seed(2)
    # A quarter to one and a quarter in eighths: exact in every precision.
    return torch.randint(2, 11, output.shape, generator=draw).div(8).to(output.dtype).to(output.device)
