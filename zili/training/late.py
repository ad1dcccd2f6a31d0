"""Numbers that a device is still at: read later, without waiting for what follows them."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from zili.chips.device import Device


class LateNumbers:
    """A queue of small tensors. Reading the newest would wait for the device, which would then stand still until the
    next step is on its way; one from a step before is there."""

    def __init__(self, device: Device) -> None:
        self._device = device.torch
        # Copies on a stream of their own wait for the numbers alone, not for the step that follows them.
        self._aside = None if device.type == "cpu" else torch.Stream(device.torch)
        self._waiting: deque[tuple[Tensor, torch.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, numbers: Tensor) -> None:
        """`numbers [N]`, which nobody changes afterwards; on a device they may still be on their way."""
        there = None if self._aside is None else torch.Event(self._device)
        if there is not None:
            there.record()
        self._waiting.append((numbers, there))

    def take(self) -> list[float]:
        """The oldest."""
        numbers, there = self._waiting.popleft()
        if self._aside is None or there is None:
            return numbers.tolist()
        self._aside.wait_event(there)
        with self._aside:
            return numbers.tolist()

    def clear(self) -> None:
        self._waiting.clear()
