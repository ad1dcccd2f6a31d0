"""The two muP multipliers as TeleChat-52B and Tele-FLM publish them.

Sources: Tele-AI/TeleChat-52B modeling_telechat.py; vLLM teleflm.py (embeddings * input_mult, logits *
output_mult / mup_scale_factor).
"""

from __future__ import annotations

from typing import Any

from zili.config.model import ModelConfig
from zili.release.layouts.layout import PublishedConfig

PUBLISHED_LENGTH = 4096
"""Tokens: the original length of their rotary rule, a constant of the published code."""


def read_mup(config: PublishedConfig) -> dict[str, float]:
    """The ModelConfig fields; empty without use_mup."""
    if not config.get("use_mup", False):
        return {}
    return {
        "embedding_multiplier": config.need("input_mult"),
        "logit_multiplier": config.need("output_mult") / config.need("mup_scale_factor"),
    }


def write_mup(config: ModelConfig) -> dict[str, Any]:
    """The published keys of the same two numbers."""
    return {
        "use_mup": True,
        "input_mult": config.embedding_multiplier,
        "output_mult": 1.0,
        "mup_scale_factor": 1.0 / config.logit_multiplier,
    }
