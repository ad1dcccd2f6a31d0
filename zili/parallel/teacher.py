"""A model beside the one that learns: laid out alike, asked about the same rows, and never changed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from zili.config import RunConfig
from zili.config.model import ModelConfig
from zili.data.loader import Batch
from zili.models.decoder import Decoder
from zili.models.layers import lowered
from zili.models.outputs import Outputs, Routing
from zili.parallel.apply import Materialize, build_parts
from zili.parallel.pipeline import Pipeline
from zili.parallel.world import World


class Teacher:
    """This process's part of it. Its weights are whatever `materialize` gives, until they are read from a folder."""

    def __init__(
        self, config: RunConfig, model: ModelConfig, world: World, dtype: torch.dtype, materialize: Materialize
    ) -> None:
        config = config.of_teacher(model)
        self.parts = build_parts(
            config, world, dtype, lambda layers: Decoder(config.model, layers).requires_grad_(False), materialize
        )
        self._pipeline = Pipeline(self.parts, config, world) if world.layout.pipeline > 1 else None
        for part in self.parts:
            part.eval()

    def outputs(self, batch: Batch) -> Outputs:
        """What `hidden_states` kept of these rows in `batch`, and the head, on the process with the last layer."""
        assert batch.teacher is not None
        last = self.parts[-1]
        if isinstance(last, FSDPModule):
            last.unshard()  # its head is used outside of its forward pass; a pipeline's pass has given it back
        return Outputs(last, batch.teacher, (), lambda block, x: block(x))

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> Tensor | None:
        """After the final norm, of this process's rows and positions, `[B, S, D]` as products take them; None without
        the last layer."""
        kept: list[Tensor] = []

        def keep(outputs: Outputs) -> Tensor:
            kept.append(lowered(outputs.hidden))
            return outputs.hidden.new_zeros(())

        def forward(part: Decoder, inputs: Tensor, some: Batch) -> Tensor:
            routing = Routing(some.padding)
            hidden: Tensor = part(inputs, document_ids=some.document_ids, routing=routing, then=keep)
            return hidden

        if self._pipeline is not None:
            self._pipeline.step(batch, forward, backward=False)
        else:
            forward(self.parts[0], batch.input_ids, batch)
        return torch.cat(kept) if kept else None
