"""The learning rate as a share of its peak, a pure function of the step."""

from __future__ import annotations

import math

from zili.config.run import ScheduleConfig


def learning_rate_share(step: int, steps: int, config: ScheduleConfig) -> float:
    """Share of the peak rate at `step` (0-based) of `steps`.

    Warm-up rises linearly and reaches the peak at `warmup_steps`. Cosine: Loshchilov and Hutter 2016, eq. 5, one
    cycle. wsd: constant, then linear to `final` over the last `decay_fraction` (Hu et al. 2024, MiniCPM).
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.kind == "constant":
        return 1.0
    start = config.warmup_steps
    if config.kind == "wsd":
        start = max(start, steps - round(config.decay_fraction * steps))
    # The last step is steps - 1; past it, as when a run is continued without more steps, the rate stays final.
    progress = min(max(0, step - start) / max(1, steps - 1 - start), 1.0)
    if config.kind == "wsd":
        return 1.0 - (1.0 - config.final) * progress
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
