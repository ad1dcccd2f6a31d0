"""The device a model is used on. No torch at the top: the environment must be set before torch loads."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from zili import chips

if TYPE_CHECKING:
    import torch


def open_device(name: str = "auto") -> torch.device:
    """Choose and activate a chip, and the operations on it; on any but the CPU a line on standard error says which.

    Raises: ChipError when it is unknown or not here.
    """
    chosen = chips.choose(name)
    activation = chips.activate(chosen.backend)

    from zili import ops

    ops.choose(activation.device.type, "fp32", {}, vendor=chosen.backend.operations)
    if activation.device.type != "cpu":
        print(f"running on {chosen.backend.name}: {chosen.reason}", file=sys.stderr)
    return activation.device
