"""How many answers there is memory for: each has room for its keys and values, up to the whole context."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zili.chips.host_memory import available_bytes
from zili.config.model import ModelConfig
from zili.errors import ConfigError
from zili.models.cache import bytes_a_token, served_length

_SHARE = 0.8
"""Share of free memory; the rest is for products, prompts and other programs."""


@dataclass(frozen=True)
class Room:
    """For `slots` answers of `context` tokens."""

    slots: int
    context: int
    all_bytes: int
    free_bytes: int | None

    def said(self, wanted: int) -> str:
        """A line about it, where `wanted` answers at once were asked for."""
        fewer = f" (of {wanted}: more have no room)" if self.slots < wanted else ""
        free = "" if self.free_bytes is None else f"; {self.free_bytes / 1e9:,.1f} GB are free"
        most = f"{self.all_bytes / 1e9:,.2f} GB at most, taken as they are used{free}"
        return f"{self.slots} answers at once{fewer}: their keys and values take {most}"


def room_for(config: ModelConfig, slots: int, context: int | None, dtype: torch.dtype, device: torch.device) -> Room:
    """As many of `slots` as fit into free memory, each with the whole context.

    Raises:
        ConfigError: there is no room for one.
    """
    length = served_length(config, context or config.max_length)
    each, free = bytes_a_token(config, dtype) * length, _free(device)
    fitting = slots if free is None else min(slots, int(_SHARE * free) // each)
    if fitting < 1:
        tokens = int(_SHARE * (free or 0)) // bytes_a_token(config, dtype)
        needed = f"{each / 1e9:,.2f} GB for keys and values, and {(free or 0) / 1e9:,.2f} GB are free"
        raise ConfigError(
            f"an answer of {length:,} tokens needs {needed}: give --context {tokens} or less, or --dtype bfloat16"
        )
    return Room(fitting, length, fitting * each, free)


def _free(device: torch.device) -> int | None:
    if device.type == "cpu":
        return available_bytes()
    try:
        return int(torch.accelerator.get_memory_info(device)[0])
    except (RuntimeError, AttributeError):  # a plugin that does not tell
        return None
