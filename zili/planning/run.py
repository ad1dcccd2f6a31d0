"""A training run by its sizes alone, for any framework: what the model of time needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from zili.config.model import ModelConfig
from zili.config.parallel import Schedule
from zili.models.arithmetic import training_flops_per_token

Precision = Literal["bf16", "int8", "fp8", "fp4"]
Recompute = Literal["none", "selective", "half", "full"]
"""selective: all but products and attention is computed again; half: every other product too; full: everything."""


@dataclass(frozen=True)
class Software:
    """What the code does where sizes do not say. As it stands: PyTorch's FSDP2 and this house."""

    fused_attention: bool = True
    """Scores stay inside a kernel, and half of a causal square is not computed."""
    sequence_parallel: bool = True
    """What is between products is cut among tensor-parallel processes too (Korthikanti et al. 2022)."""
    hides_gradients: bool = True
    """Gradients and weights travel beside the arithmetic."""
    sums_each: bool = False
    """Gradients are summed over processes after each micro-batch, not once a step."""
    hides_tensor: bool = False
    """Tokens travel between tensor-parallel processes beside the products that need them."""
    early: bool = False
    """From before bf16: gradients stay in 16 bits."""
    sums_in_16_bits: bool = False
    """Gradients are summed over replicas as they were made, not in fp32."""
    repeats_whole: bool = False
    """Of a block that is computed again, the last product too, which no gradient needs: torch 2.1 stops before it."""
    tuned: bool = False
    """The chip's vendor wrote the recipe, with fused kernels for it."""


@dataclass(frozen=True)
class Run:
    """A model, a batch and how both are spread over chips."""

    model: ModelConfig
    sequence: int
    """Tokens of one."""
    global_batch: int
    """Sequences of a step, on all chips."""
    micro_batch: int = 1
    """Sequences that one process takes at a time."""
    data: int = 1
    """Replicas times shards: processes that see different sequences."""
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Stages on one process of a pipeline."""
    expert: int = 1
    """Processes that share experts; they are among those above."""
    weight_shards: int = 1
    """Processes over which weights are cut for storage, to be gathered for use (ZeRO-3, FSDP)."""
    state_shards: int = 1
    """Processes over which the optimizer's state is cut (ZeRO-1 and beyond)."""
    kept_gathered: bool = False
    """Weights are gathered and gradients scattered once a step, not for each micro-batch."""
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    """Precision of the inputs of matrix products."""
    logits_twice: bool = False
    """Logits are made once more for their gradients."""
    schedule: Schedule = "1f1b"
    software: Software = Software()

    @property
    def chips(self) -> int:
        """Processes in all, one a chip."""
        return self.data * self.tensor * self.context * self.pipeline

    @property
    def micro_batches(self) -> float:
        """Micro-batches of one process in a step; at least one."""
        return max(1.0, self.global_batch / self.data / self.micro_batch)

    @property
    def tokens(self) -> int:
        """Tokens of a step, on all chips."""
        return self.global_batch * self.sequence

    @property
    def rows(self) -> float:
        """Tokens of a micro-batch in a product: what tensor-parallel processes see together."""
        return self.micro_batch * self.sequence / self.context

    @property
    def own_rows(self) -> float:
        """Tokens of a micro-batch outside of those products: a tensor-parallel process's share."""
        return self.rows / self.tensor

    @cached_property
    def model_flops(self) -> float:
        """FLOPs of a step on all chips: the numerator of model FLOP utilisation, by `zili.models.arithmetic`."""
        return self.tokens * training_flops_per_token(self.model, self.sequence)
