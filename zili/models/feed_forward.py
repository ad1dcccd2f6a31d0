"""The SwiGLU feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from zili import ops
from zili.config.model import ModelConfig
from zili.models.layers import Entrance, Linear
from zili.models.outputs import Routing


class FeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))`, `x [B, S, D]` -> `[B, S, D]` (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        self.enter = Entrance()
        self.gate = Linear(hidden, ffn, bias=config.gate_up_bias)
        self.up = Linear(hidden, ffn, bias=config.gate_up_bias)
        self.down = Linear(ffn, hidden, bias=config.ffn_down_bias)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """`routing` is for layers of experts."""
        x = self.enter(x)
        return self.down(ops.swiglu(self.gate(x), self.up(x)))
