"""What a run learns, if it is more than the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, PositiveFloat, model_validator

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
    """What is learned, one table at most: `[objective.distill]`, or `[objective.NAME]` with the settings of an
    objective that an installed package brings (docs/objectives.md). Without any it is the next token, or what
    `[preference]` says.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)

    distill: DistillConfig | None = None
    """`[objective.distill]`: a teacher."""

    @property
    def brought(self) -> dict[str, dict[str, Any]]:
        """Settings by name, of an objective that a package brings."""
        return self.__pydantic_extra__

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [*(["distill"] if self.distill is not None else []), *self.brought]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; a run learns one of them")
        return self
