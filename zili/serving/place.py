"""The device a model is used on. No torch at the top: the environment must be set before torch loads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from zili import chips

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def open_device(name: str = "auto") -> torch.device:
    """Choose and activate a chip, and the operations on it; on any but the CPU a line on standard error says which.

    Raises: ChipError when it is unknown or not here.
    """
    chosen = chips.choose(name)
    activation = chips.activate(chosen.backend)

    from zili import ops
    from zili.chips.device import Device
    from zili.ops.timings import Timings

    device = Device(activation)
    vendor, lacking, timings = chosen.backend.operations, device.lacking(), Timings.of(device, "fp32")
    ops.choose(activation.device.type, "fp32", {}, vendor=vendor, lacking=lacking, timings=timings)
    if activation.device.type != "cpu":
        print(f"running on {chosen.backend.name}: {chosen.reason}", file=sys.stderr)
    return activation.device


def prepared(prepare: Callable[[], T]) -> T:
    """What `prepare` returns, run in a thread that ends with it: for what is to be used by another thread.

    Whichever thread asks for a product has OpenMP start helpers for it, which stay with it. Once the process has more
    of them than CPUs, none waits busily for the next product any more. Then an engine's small products take up to half
    as long again.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(prepare).result()
