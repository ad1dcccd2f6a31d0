"""Whether bf16 on a CPU is what its flags promise: compared with fp32 and timed, before a run is given to it."""

from __future__ import annotations

import torch
from torch import Tensor

from zili.ops import product, reference
from zili.ops.examples import Example, example, examples, run
from zili.ops.timings import Timings, fastest_in_turns

_OFF = 2.0**-6
"""Largest distance from fp32, as a share of its norm: some times what rounding to bf16 once or twice makes."""
_FASTER = 1.2
"""Products must be so much faster than the fastest in fp32, or the rounding buys nothing."""
_COMPARED = ("linear", "attention", "linear_cross_entropy")


def bf16_pays(timings: Timings) -> tuple[bool, str]:
    """Whether products in bf16 on this CPU agree with those in fp32, forward and backward, and are faster; and why."""
    for operation in _COMPARED:
        for number, inputs in enumerate(examples(operation, torch.float32)):
            off = _distance(operation, inputs)
            if not off <= _OFF:  # nan is not
                return (
                    False,
                    f"bf16 is {off:.1%} off fp32 in {operation} (example {number}), up to {_OFF:.1%} is rounding",
                )
    ratio = timings.measured("bf16 linear over fp32", _speed_ratio)
    told = f"products run at {ratio:.1f} times their speed in fp32 and agree with it"
    return ratio >= _FASTER, told if ratio >= _FASTER else f"{told}: not enough to round for"


def _lowered(inputs: Example, operation: str) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return run(getattr(reference, operation), inputs)


def _distance(operation: str, inputs: Example) -> float:
    """The largest of the outputs and gradients."""
    lowered = [tensor.detach().float() for tensor in _lowered(inputs, operation)]
    exact = [tensor.detach() for tensor in run(getattr(reference, operation), inputs)]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(lowered, exact, strict=True))


def _speed_ratio() -> float:
    """How much faster than the fastest in fp32 `linear` is, forward and backward.

    It is timed on the sizes that versions are timed on: those that they are compared on say little about a step's."""
    inputs = example("linear", "cpu", torch.float32)
    ways = [lambda: _lowered(inputs, "linear"), lambda: run(reference.linear, inputs)]
    if torch.backends.mkldnn.is_available():
        ways.append(lambda: run(product.linear, inputs))
    lowered, *others = fastest_in_turns(ways, on_host=True)
    return min(others) / lowered
