"""What a run learns, where it is not the next token alone."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveFloat

from zili.config.model import ModelConfig
from zili.config.section import Section


class DistillConfig(Section):
    """Learning from a teacher's probabilities beside the labels (Hinton et al. 2015).

    The teacher is laid out over the processes as the model is, and asked about every batch.
    """

    teacher: Path
    """Model folder: Hugging Face's, Zili's, or a run. Its vocabulary is the model's own."""
    weight: float = Field(0.5, gt=0.0, le=1.0)
    """Share of the divergence from the teacher in the loss; the labels' cross entropy has the rest."""
    temperature: PositiveFloat = 1.0
    """Logits of both are divided by it before they are compared."""
    model: ModelConfig | None = None
    """The teacher's shape. It is filled in from its folder."""


class ObjectiveConfig(Section):
    """What is learned. Without any of these it is the next token, and what `[preference]` says."""

    distill: DistillConfig | None = None
    """`[objective.distill]`: a teacher."""
