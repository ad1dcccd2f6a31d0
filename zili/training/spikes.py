"""Steps whose loss or gradient is no number, or far above those before: their update is left out, or the run goes back.

Whether an update is applied is decided on the device, where the optimizer's kernel can leave one out: nobody waits. The
limits come from steps that were read late, so the last step before the one at hand is not among them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from zili.chips.device import Device
from zili.config.watch import WatchConfig
from zili.errors import TrainingError
from zili.training.late import LateNumbers
from zili.training.left_out import LeftOut, Window, position_of, windows

LAG = 1
"""Steps before the one at hand that are not read yet."""
_OVERFLOWN = 1e9
"""A norm is the root of a sum of squares, over the targets of a batch: a sum stuck at fp32's largest number, 3.4e38,
gives more than this for any batch of less than 18 billion targets."""
_OF_NORMAL = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation (Rousseeuw and Croux 1993)."""


class GoodStep(NamedTuple):
    """What counts of a step whose update was applied."""

    step: int
    loss: float
    norm: float


class StepLimits(NamedTuple):
    """What a loss and a gradient norm have to be below."""

    loss: float
    norm: float


_LEAST_DEVIATIONS = StepLimits(0.01, 0.1)
"""Of the medians: steps that hardly differ would make spikes of rounding, and norms wander more than losses."""


class StepWatch:
    """Judges every step of a run, on all processes alike: its figures are sums over the world."""

    def __init__(self, config: WatchConfig, device: Device) -> None:
        self.config = config
        self.decisions: tuple[LeftOut, ...] = ()
        """What the run leaves out, as far as it has decided."""
        self.history: deque[GoodStep] = deque(maxlen=config.window + LAG)
        """The newest good steps, for the limits of those that follow; a checkpoint has them."""
        self._saturates = not device.capability("inf_nan").value
        self._late = LateNumbers(device)
        self._judged: deque[tuple[int, StepLimits]] = deque()
        self._left_out: list[Window] = []
        self._skipped: set[int] = set()

    def take_up(self, decisions: Iterable[LeftOut], history: Iterable[Iterable[float]] = ()) -> None:
        """Go on as a checkpoint and the run's folder say."""
        self._late.clear()
        self._judged.clear()
        self.history.clear()
        self.history.extend(GoodStep(int(step), loss, norm) for step, loss, norm in history)
        self.decide(decisions)

    def decide(self, decisions: Iterable[LeftOut]) -> None:
        """From now on these are all decisions."""
        self.decisions = tuple(decisions)
        self._left_out = windows(self.decisions)
        self._skipped = {one.first for one in self.decisions if one.action == "skip"}

    def position(self, step: int) -> int:
        """Of the batch of step `step` (from 0)."""
        return position_of(step, self._left_out)

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor | None:
        """0-d fp32 on the device: 1 where the update of step `step` (from 0) is to be left out; None: nobody looks."""
        if self.position(step) in self._skipped:
            return torch.ones((), device=loss.device)
        if not self.config.judges:
            return None
        limits = self.limits(step)
        lowest = 0.0 if self._saturates else -math.inf
        sound = (loss > lowest) & (loss < limits.loss) & (norm < limits.norm)
        if self._saturates:
            sound &= norm > 0
        left_out = (~sound).float()
        self._late.put(torch.stack((loss, norm, left_out)))
        self._judged.append((step, limits))
        return left_out

    def limits(self, step: int) -> StepLimits:
        """Those of step `step` (from 0), as fp32 has them: a number that is given to a device's kernel is no copy."""
        most = _OVERFLOWN if self._saturates else math.inf
        good = [one for one in self.history if one.step < step - LAG][-self.config.window :]
        if self.config.spike == "ignore" or len(good) < self.config.fewest:
            return StepLimits(most, most)
        loss = limit([one.loss for one in good], self.config.threshold, _LEAST_DEVIATIONS.loss)
        norm = limit([one.norm for one in good], self.config.threshold, _LEAST_DEVIATIONS.norm)
        return StepLimits(min(most, loss), min(most, norm))

    def look(self, step: int | None = None) -> LeftOut | None:
        """What is to be done about a step before step `step` (from 0) that is there to be read; None for all steps: the
        device is waited for.

        Raises:
            TrainingError: the recipe says to stop.
        """
        while self._judged and (step is None or self._judged[0][0] < step - LAG):
            number, limits = self._judged.popleft()
            loss, norm, left_out = self._late.take()
            if not left_out:
                self.history.append(GoodStep(number, loss, norm))
            else:
                return self._answer(number, loss, norm, limits)
        return None

    def _answer(self, step: int, loss: float, norm: float, limits: StepLimits) -> LeftOut:
        unsound = not is_sound(loss, norm, saturates=self._saturates)
        answer = self.config.non_finite if unsound else self.config.spike
        why = f"loss {loss:.6g}, gradient norm {norm:.6g}"
        if not unsound:
            why += f", limits {limits.loss:.4g} and {limits.norm:.4g} (watch.threshold = {self.config.threshold:g})"
        position = self.position(step)
        if answer in ("stop", "ignore"):
            error = TrainingError(
                f"step {step + 1}: {why}; its batch is number {position}. Lower optimizer.learning_rate, lengthen "
                "schedule.warmup_steps, or have it left out (watch.spike, watch.non_finite)"
            )
            error.agreed = True  # both numbers are sums over all processes
            raise error
        return LeftOut(position, position, "skip" if answer == "skip" else "roll_back", step, why)


def limit(values: list[float], threshold: float, least: float) -> float:
    """What is `threshold` robust deviations above the median of `values`, rounded to fp32; `least`: share of the median
    that a deviation is at least."""
    middle = median(values)
    deviation = _OF_NORMAL * median(abs(value - middle) for value in values)
    return float(np.float32(middle + threshold * max(deviation, least * abs(middle))))


def is_sound(loss: float, norm: float, *, saturates: bool) -> bool:
    """Whether a mean loss and a gradient norm are those of a step that computed, not of one that overflowed.

    Where a chip `saturates`, inf became its largest number and nan became zero.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return False
    return not saturates or (0 < loss < _OVERFLOWN and 0 < norm < _OVERFLOWN)


def update_unless(optimizers: list[Optimizer], left_out: Tensor | None) -> None:
    """One update by each of the optimizers; none where `left_out` (0-d) is 1.

    A fused kernel looks itself, as under torch's GradScaler. For the others the device is waited for.
    """
    if left_out is not None and not leave_out_by_themselves(optimizers):
        if float(left_out):
            return
        left_out = None
    for optimizer in optimizers:
        if left_out is not None:
            optimizer.found_inf = left_out  # type: ignore[attr-defined]  # the name that torch's kernels take it by
        optimizer.step()
        if left_out is not None:
            del optimizer.found_inf  # type: ignore[attr-defined]


def leave_out_by_themselves(optimizers: Iterable[Optimizer]) -> bool:
    """Whether the kernels of all of them can leave an update out."""
    return all(optimizer.defaults.get("fused") for optimizer in optimizers)
