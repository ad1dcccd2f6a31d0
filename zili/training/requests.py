"""What one process asks of all, as they are to stop after the same step or save at the same one."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from zili.parallel.world import World
from zili.training.late import LateNumbers

Request = Literal["interrupt", "give_up", "over", "save", "stop"]
"""Stop, to go on later; end, since saves fail; stop, since the time is over; save, since it is time; end as if done."""
_NAMES: tuple[Request, ...] = get_args(Request)


class Requests:
    """Requests travel in the sum that a step makes anyway, and are read one step later.

    Reading the sum of the step at hand would wait for the device, which would then stand still until the next step is
    on its way. So what is asked before the sum of step k is done after step k + 1. One process alone does it at once.
    """

    def __init__(self, world: World) -> None:
        self.own: dict[Request, bool] = dict.fromkeys(_NAMES, False)
        """What this process asks for."""
        self.delay = 0 if world.size == 1 else 2
        """Steps after the one at hand until what a callback asks for is done."""
        self._alone = world.size == 1
        # Kept, as a copy to the device would wait for what the device is at.
        self._nothing = torch.zeros(len(_NAMES), device=world.device.torch)
        self._summed = LateNumbers(world.device)

    def terms(self) -> Tensor:
        """What this process asks for, on its device, to be added up over all `[5]`."""
        if not any(self.own.values()):
            return self._nothing
        return torch.tensor([float(self.own[name]) for name in _NAMES], device=self._nothing.device)

    def take(self, summed: Tensor) -> None:
        """`terms` of all processes, added up; on a device it may still be on its way."""
        if not self._alone:
            self._summed.put(summed)

    def due(self) -> set[Request]:
        """What is to be done now. All processes are told the same after the same step."""
        if self._alone:
            return {name for name, asked in self.own.items() if asked}
        if len(self._summed) < 2:
            return set()
        counts = self._summed.take()
        return {name for name, count in zip(_NAMES, counts, strict=True) if count}
