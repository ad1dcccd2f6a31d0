"""The learning rate as a share of its peak, a pure function of the step."""

from __future__ import annotations

import math

from zili.config.run import ScheduleConfig


def decay_start(steps: int, config: ScheduleConfig) -> int:
    """Steps done when the rate begins to depend on how many there will be; of a constant rate, all of them.

    Up to then a run of `steps` and a longer one are the same.
    """
    if config.kind == "constant":
        return steps
    if config.kind == "cosine":
        return config.warmup_steps
    if config.decay_start is not None:
        return max(config.warmup_steps, config.decay_start)
    return max(config.warmup_steps, steps - round(config.decay_fraction * steps))


def learning_rate_share(step: int, steps: int, config: ScheduleConfig) -> float:
    """Share of the peak rate at `step` (0-based) of `steps`.

    Warm-up rises linearly and reaches the peak at `warmup_steps`. Cosine: Loshchilov and Hutter 2016, eq. 5, one
    cycle. wsd: constant, then linear to `final` from `decay_start` on, or over the last `decay_fraction` (Hu et al.
    2024, MiniCPM).
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    start = decay_start(steps, config)
    if config.kind == "constant" or step < start:
        return 1.0
    # The last step is steps - 1; past it, as when a run is continued without more steps, the rate stays final.
    progress = min(max(0, step - start) / max(1, steps - 1 - start), 1.0)
    if config.kind == "wsd":
        return 1.0 - (1.0 - config.final) * progress
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
