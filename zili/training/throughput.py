"""Measures what the machine can do, and how much of it a step uses."""

from __future__ import annotations

import time

import torch

from zili import ops
from zili.chips.device import Device

_SIZE = 2048


def matmul_peak(device: Device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, the best of several within `seconds`: the denominator of `matmul_share`.

    Measured through the operation the model uses, so a faster product raises the bar as it raises the speed. A
    chip's published peak is another, larger denominator; `zili chips` has it.
    """
    # From a generator of their own: dropout goes on drawing from where it was.
    numbers = torch.Generator().manual_seed(0)
    a, b = (torch.randn(_SIZE, _SIZE, generator=numbers).to(device.type, dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    with torch.no_grad():
        ops.linear(a, b)
        while time.perf_counter() < end or best == 0.0:
            device.synchronize()
            started = time.perf_counter()
            ops.linear(a, b)
            device.synchronize()
            best = max(best, 2 * _SIZE**3 / (time.perf_counter() - started))
    return best
