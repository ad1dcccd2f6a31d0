"""Rotary position tables: every length-extension rule of the family, as frequencies and a magnitude.

All rules turn pairs (i, i + d/2) of a head by `position * frequency_i` (Su et al. 2021, rotate-half as in GPT-NeoX) and
multiply cos and sin by one magnitude. Two rules look at the length of the whole sequence: their tables at 70 tokens are
not a prefix of those at 60. So a key/value cache asks `scaling` before it trusts its keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zili.config.model import RotaryConfig


class Scaling(NamedTuple):
    """What of a table may depend on the sequence length."""

    base: float
    magnitude: float


def ntk_alpha(length: int, original_length: int) -> float:
    """`max(2^ceil(log2(length / original) + 1) - 1, 1)`: 1 to the original length, 3 to twice, 7 to 4 times.

    Source: Tele-AI/TeleChat2 model/115B/modeling_telechat.py; golden telechat2-ntk agrees at 7 and 15.
    """
    return max(2.0 ** math.ceil(math.log2(length / original_length) + 1) - 1, 1.0)


def scaling(rotary: RotaryConfig, head_dim: int, length: int) -> Scaling:
    """Base and magnitude for a sequence of `length` tokens in all, cached ones included."""
    base, magnitude = rotary.base, 1.0
    if rotary.rule == "telechat_ntk":
        assert rotary.original_length and rotary.training_length
        length = max(length, rotary.training_length)
        base *= ntk_alpha(length, rotary.original_length) ** (head_dim / (head_dim - 2))
        magnitude = 0.1 * math.log(length / rotary.training_length) + 1.0
    elif rotary.rule == "tele_flm_ntk":
        # No d/(d-2) exponent and no magnitude: Tele-AI/TeleChat-52B modeling_telechat.py.
        assert rotary.original_length
        base *= ntk_alpha(length, rotary.original_length)
    elif rotary.rule == "yarn":
        magnitude = 0.1 * math.log(max(rotary.factor, 1.0)) + 1.0  # Peng et al. 2023, section 3.4
    elif rotary.rule == "telechat3_yarn":
        # 0.07 where YaRN has 0.1: wenet-e2e/west modeling_telechat3.py and vLLM telechat3_scaling_rope.py.
        magnitude = 0.07 * math.log(max(rotary.factor, 1.0)) + 1.0
    if rotary.attention_factor is not None:
        magnitude = rotary.attention_factor
    return Scaling(base, magnitude)


def frequencies(rotary: RotaryConfig, head_dim: int, base: float) -> Tensor:
    """Radians a position for each pair, `[d/2]` fp32, on the CPU.

    Always on the CPU: powers differ by an ulp between chips, and 8,000 positions make a visible angle of it.
    """
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if rotary.rule == "linear":
        return plain / rotary.factor
    if rotary.rule == "llama3":
        return _llama3(plain, rotary)
    if rotary.rule in ("yarn", "telechat3_yarn"):
        return _yarn(plain, rotary, head_dim, base)
    return plain


def _llama3(plain: Tensor, rotary: RotaryConfig) -> Tensor:
    """Long waves slowed by `factor`, short ones kept, a ramp between (Llama 3.1; transformers' formula)."""
    assert rotary.original_length
    turns = rotary.original_length * plain / (2 * math.pi)
    low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * plain / rotary.factor + kept * plain


def _yarn(plain: Tensor, rotary: RotaryConfig, head_dim: int, base: float) -> Tensor:
    """YaRN's ramp between slowed and kept pairs (Peng et al. 2023, section 3.2; bounds are whole numbers)."""
    original = rotary.original_length
    assert original

    def pair_turning(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_turning(rotary.beta_fast)), 0)
    high = min(math.ceil(pair_turning(rotary.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (max(high - low, 0.001))
    interpolated = ramp.clamp(0.0, 1.0)
    return interpolated * plain / rotary.factor + (1 - interpolated) * plain


Kept = dict[tuple[float, torch.device], Tensor]
"""Frequencies by base and the device they were sent to."""


def rotary_tables(
    rotary: RotaryConfig, head_dim: int, positions: Tensor, length: int, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin for `positions [S]` of a sequence of `length` tokens: two `[S, d]` fp32 tables.

    `kept` is where a model keeps what its earlier calls sent to a device.

    Computed once a forward pass and shared by the layers. telechat_ntk's are rounded to fp16 if `half_tables`, and the
    magnitude is multiplied in fp16. The published code does both whatever the model's dtype (the rounding moves logits
    by about 1e-3 relative).
    """
    base, magnitude = scaling(rotary, head_dim, length)
    kept, key = ({} if kept is None else kept), (base, positions.device)
    if key not in kept:
        kept.clear()  # a rule whose base follows the length has another with each: only the last is asked for again
        kept[key] = frequencies(rotary, head_dim, base).to(positions.device)
    angles = torch.outer(positions.float(), kept[key])
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if rotary.rule == "telechat_ntk" and rotary.half_tables:
        cos, sin = cos.half(), sin.half()
    return (cos * magnitude).float(), (sin * magnitude).float()
