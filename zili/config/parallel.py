"""How a run is laid over many processes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from zili.config.section import Section

Schedule = Literal["1f1b", "interleaved", "zero_bubble", "zbv"]
VIRTUAL: tuple[Schedule, ...] = ("interleaved", "zero_bubble", "zbv")
"""Schedules that give each process several stages."""


class ParallelConfig(Section):
    """How many processes share what. The product of all but `expert` is the number of processes."""

    replicas: PositiveInt = 1
    """Copies of the sharded model; each reads samples of its own."""
    shards: PositiveInt | Literal["auto"] = "auto"
    """Processes that share weights, gradients and optimizer state, each reading samples of its own (FSDP). Auto: as
    many as the other dimensions leave."""
    context: PositiveInt = 1
    """Processes that share a sequence. They share weights too, as `shards` do."""
    tensor: PositiveInt = 1
    """Processes that share each matrix, and the tokens between matrices (sequence parallel)."""
    pipeline: PositiveInt = 1
    """Processes that share the layers."""
    expert: PositiveInt = 1
    """Processes that share the experts of a mixture: neighbours among shards x context x tensor, so it adds none."""
    schedule: Schedule = "1f1b"
    """Order of a pipeline's work: one forward, one backward; interleaved; interleaved with weight gradients put into
    the bubbles (zero_bubble); the same in the shape of a V (zbv)."""
    stages_per_process: PositiveInt | Literal["auto"] = "auto"
    """Pieces of the model on each process of the pipeline. Auto: 1 with 1f1b, 2 with the others."""
    reduce: Literal["step", "micro_batch", "auto"] = "auto"
    """When gradients are summed over processes: once a step, until when a process has whole ones in fp32; or
    after each micro-batch, which sends more and keeps a part only. Auto: once a step where that fits."""
    elastic: Literal["replicas", "shards", "none"] = "replicas"
    """Which of them `zili launch` makes smaller when machines are missing, to the largest that divides the batch; with
    replicas 1, shards that are auto shrink."""
    stage_layers: tuple[PositiveInt, ...] | None = None
    """Layers of each stage, in order; none: as even as they go, the first and last stages the shorter ones."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        stages = self.stages_each
        if (stages > 1) != (self.schedule in VIRTUAL) or (self.schedule == "zbv" and stages != 2):
            wanted = {"1f1b": "1", "zbv": "2"}.get(self.schedule, "2 or more")
            raise ValueError(f"schedule {self.schedule} takes stages_per_process {wanted}, not {stages}")
        if self.stage_layers is not None and len(self.stage_layers) != self.stages:
            raise ValueError(
                f"stage_layers has {len(self.stage_layers)} entries, the pipeline {self.stages} stages "
                f"({self.pipeline} processes x {stages})"
            )
        return self

    @property
    def stages_each(self) -> int:
        """Stages on one process."""
        if self.stages_per_process != "auto":
            return self.stages_per_process
        return 2 if self.schedule in VIRTUAL else 1

    @property
    def stages(self) -> int:
        """Stages in all."""
        return self.pipeline * self.stages_each
