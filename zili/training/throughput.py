"""Measures what the machine can do, and how much of it a step uses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from zili import ops
from zili.chips.device import Device

_SIZE = 2048
_SECONDS = 0.3


def fastest_call(work: Callable[[], object], device: Device) -> float:
    """Seconds of the fastest call of `work()` within a third of a second, after one to warm up."""
    work()
    best, end = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < end or best == math.inf:
        device.synchronize()
        started = time.perf_counter()
        work()
        device.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def matmul_peak(device: Device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of several: the denominator of `matmul_share`.

    Measured through the operation the model uses, so a faster product raises the bar as it raises the speed. A
    chip's published peak is another, larger denominator; `zili chips` has it.
    """
    # From a generator of their own: dropout goes on drawing from where it was.
    numbers = torch.Generator().manual_seed(0)
    a, b = (torch.randn(_SIZE, _SIZE, generator=numbers).to(device.type, dtype) for _ in range(2))
    with torch.no_grad():
        return 2 * _SIZE**3 / fastest_call(lambda: ops.linear(a, b), device)
