"""Settings that go with the size of a run, for a recipe that leaves them open: rate, batch, warm-up, checkpoints.

Rate and batch follow DeepSeek LLM (2401.02954, section 3.1). With C the FLOPs of a run, embeddings left out:

    peak rate = 0.3118 C^-0.1250          tokens a step = 0.2920 C^0.3271

Both were fitted to AdamW with betas 0.9 and 0.95 from 1e17 to 2e19 FLOPs, and used for 7 B and 67 B parameters on 2 T
tokens. The rates of TeleChat's published recipes (1.5e-4 to 3e-4) are lower, the most by a factor of 1.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isinf
from typing import NamedTuple

from zili.config import RunConfig
from zili.config.model import ModelConfig
from zili.models.arithmetic import count_parameters

_MOST_RATE = 3e-3
"""Below the sizes that the rule was fitted to it would go on rising."""
_WARM_UP, _WARM_UP_SHARE = 2_000, 0.02
"""Steps of warm-up, as DeepSeek LLM and TeleChat3 had, and the most of a short run."""
_SELDOM = 3600.0
"""Seconds between checkpoints where nothing interrupts a run."""


class Filled(NamedTuple):
    """A setting that was left open, and why it has this value."""

    table: str
    key: str
    value: float | int
    reason: str


def flops(model: ModelConfig, sequence: int, tokens: float) -> float:
    """C: FLOPs of training on D `tokens`, as the rule counts them: `(6 N + 12 L H d S) D`. N are the parameters that a
    token goes through, without the embedding and the head."""
    count = count_parameters(model)
    attention = 12 * model.layers * model.heads * model.head_dim * sequence
    return (6 * (count.active - count.embedding - count.head) + attention) * tokens


def learning_rate(compute: float) -> float:
    """Peak rate for a run of `compute` FLOPs, to two digits."""
    return float(f"{min(_MOST_RATE, 0.3118 * compute**-0.1250):.1e}")


def batch_tokens(compute: float) -> float:
    """Tokens a step for a run of `compute` FLOPs."""
    return 0.2920 * compute**0.3271


def warm_up(steps: int) -> int:
    """Steps over which the rate rises."""
    return min(_WARM_UP, int(_WARM_UP_SHARE * steps))


def left_open(config: RunConfig, tokens: float, step_seconds: float, interval: float) -> Iterator[Filled]:
    """What `config` does not set itself, for a run on `tokens` whose steps take `step_seconds` and whose best time
    between checkpoints is `interval` seconds.

    A model that goes on from weights gets no rate: the rule is for one from nothing.
    """
    training = config.training
    if training.start_from is None and config.model.lora is None:
        if "learning_rate" not in config.optimizer.model_fields_set:
            compute = flops(config.model, training.sequence_length, tokens)
            why = f"0.3118 C^-0.125 of C = {compute:.2g} FLOPs (DeepSeek LLM, 2401.02954)"
            yield Filled("optimizer", "learning_rate", learning_rate(compute), why)
        if "warmup_steps" not in config.schedule.model_fields_set and (steps := warm_up(training.steps)):
            why = "as DeepSeek LLM and TeleChat3" if steps == _WARM_UP else f"{_WARM_UP_SHARE:.0%} of the steps"
            yield Filled("schedule", "warmup_steps", steps, why)
    if "every" not in config.checkpoint.model_fields_set:
        often = _SELDOM if isinf(interval) else interval
        every = min(training.steps, max(1, round(often / step_seconds)))
        why = f"every {every * step_seconds / 60:.3g} min, where failures cost least (Daly 2006)"
        yield Filled("checkpoint", "every", every, "once an hour" if isinf(interval) else why)


def filled(config: RunConfig, found: list[Filled]) -> RunConfig:
    """`config` with these settings."""
    for one in found:
        config = config.changed(**{one.table: {one.key: one.value}})
    return config
