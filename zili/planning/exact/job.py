"""A step of a model on many chips, with every setting decided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from zili.config import RunConfig
from zili.config.model import ModelConfig
from zili.models.arithmetic import Shape, layer_shapes
from zili.parallel.layout import Layout, stage_ranges, stages_of
from zili.planning.run import Run, Software


@dataclass(frozen=True)
class Job:
    """A recipe on a layout, seen from one process's place in the pipeline."""

    config: RunConfig
    """Resolved: micro-batch and precision are chosen."""
    layout: Layout
    place: int = 0
    """Which process of its pipeline."""
    sharded: bool = True
    """Whether the chip has FSDP2: without it every process has its weights whole."""
    grouped_heads: bool = True
    """Whether its attention takes fewer heads of keys and values than of queries: else they are repeated."""
    on_host: bool = False
    """Whether the chip is the host itself, whose memory is a checkpoint's too."""
    learns: bool = True
    """Whether its weights have gradients: a teacher's have none."""

    @cached_property
    def teacher(self) -> Job | None:
        """The same step of the model that is asked beside this one, if there is one."""
        distill = self.config.objective.distill
        if distill is None or distill.model is None:
            return None
        return replace(self, config=self.config.of_teacher(distill.model), learns=False)

    @cached_property
    def run(self) -> Run:
        """It by its sizes alone, in this house's software: what the model of time takes. Multi-token prediction that is
        not learned takes no time, and is left out."""
        layout, parallel, training = self.layout, self.config.parallel, self.config.training
        idle = self.model.mtp_layers and not self.learns_further
        return Run(
            model=self.model.changed(mtp_layers=0) if idle else self.model,
            sequence=self.sequence,
            global_batch=training.global_batch,
            micro_batch=self.micro_batch,
            data=layout.data,
            tensor=layout.tensor,
            context=layout.context,
            pipeline=layout.pipeline,
            virtual=parallel.stages_each,
            expert=layout.expert,
            weight_shards=layout.weight_shards,
            state_shards=layout.weight_shards,
            kept_gathered=layout.pipeline > 1,
            recompute=training.recompute,
            logits_twice=self.config.preference is not None,
            schedule=parallel.schedule,
            software=Software(sums_each=parallel.reduce == "micro_batch"),
        )

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def micro_batch(self) -> int:
        micro = self.config.training.micro_batch
        assert isinstance(micro, int), "the configuration is resolved"
        return micro

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one process in a step."""
        return self.config.training.global_batch // self.layout.data // self.micro_batch

    @property
    def sequence(self) -> int:
        return self.config.training.sequence_length

    @property
    def attended_heads(self) -> int:
        """Heads of keys and values as attention takes them, on all tensor-parallel processes together."""
        return self.model.kv_heads if self.grouped_heads else self.model.heads

    @property
    def lowered(self) -> bool:
        """Whether matrix products are in bf16."""
        return self.config.chip.precision == "bf16"

    @property
    def product_bytes(self) -> int:
        """Size of an element of what matrix products take and give."""
        return 2 if self.lowered else 4

    @property
    def whole(self) -> bool:
        """Whether weights are whole: there are no others to gather them from."""
        return self.layout.world == 1 or not self.sharded

    @property
    def sums_each(self) -> bool:
        """Whether gradients are summed over processes after each micro-batch, not after the last."""
        return self.config.parallel.reduce == "micro_batch" and not self.whole

    @property
    def adds_up(self) -> bool:
        """Whether gradients of several micro-batches are added up whole before they are summed."""
        return self.micro_batches > 1 and not self.sums_each

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch between a gather and a sum: a context's share of each row."""
        return self.micro_batch * self.sequence // self.layout.context

    @property
    def own_tokens(self) -> int:
        """Tokens of a micro-batch outside of them: a tensor-parallel process's share."""
        return self.tokens // self.layout.tensor

    @property
    def stage_numbers(self) -> list[int]:
        """Numbers of the pipeline's stages that this process has."""
        return stages_of(self.config.parallel, self.place)

    @cached_property
    def stages(self) -> tuple[range, ...]:
        """Layers of each stage that this process has."""
        ranges = stage_ranges(self.config.parallel, self.model.layers)
        return tuple(ranges[number] for number in self.stage_numbers)

    @property
    def layers(self) -> tuple[int, ...]:
        """All of them; multi-token prediction's block counts as one more, behind the last."""
        more = (self.model.layers,) if self.predicts_further else ()
        return (*(layer for stage in self.stages for layer in stage), *more)

    @property
    def has_first(self) -> bool:
        """Whether it has the embedding that ids go through."""
        return any(stage.start == 0 for stage in self.stages)

    @property
    def has_last(self) -> bool:
        """Whether it has the loss."""
        return any(stage.stop == self.model.layers for stage in self.stages)

    @property
    def learns_further(self) -> bool:
        """Whether multi-token prediction, if the model has it, is among what is learned: only of plain text."""
        other = self.config.preference is not None or self.teacher is not None or self.config.objective.brought
        return bool(self.model.mtp_layers) and not other

    @property
    def predicts_further(self) -> bool:
        """Whether it has multi-token prediction, and learns it."""
        return self.has_last and self.learns_further

    def shapes(self, layer: int) -> dict[str, Shape]:
        """Tensors of a layer, whole."""
        return layer_shapes(self.model, layer)
