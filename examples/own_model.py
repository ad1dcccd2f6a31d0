"""A model of your own: attention and feed-forward layer of a block see the same input, as in GPT-J.

    python examples/own_model.py RECIPE

The block is made of Zili's layers, so it is cut, sharded and recomputed as they are, in every layout.
"""

import sys

from torch import Tensor, nn

import zili
from zili.config.model import ModelConfig
from zili.models.attention import attention_of
from zili.models.cache import CacheEntry
from zili.models.decoder import Decoder
from zili.models.layers import RMSNorm
from zili.models.mixture import feed_forward_of
from zili.models.outputs import Routing


class ParallelBlock(nn.Module):
    """`x + attention(norm(x)) + feed_forward(norm(x))`, `x [B, S, D]`."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = attention_of(config)
        self.feed_forward = feed_forward_of(config, number)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_ids: Tensor | None = None,
        cache_entry: CacheEntry | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        normed = self.norm(x)
        attended: Tensor = self.attention(normed, cos, sin, document_ids, cache_entry)
        fed: Tensor = self.feed_forward(normed, routing)
        return x + attended + fed


class OwnDecoder(Decoder):
    def make_block(self, number: int) -> nn.Module:
        return ParallelBlock(self.config, number)


if __name__ == "__main__":
    zili.train(sys.argv[1], model=OwnDecoder)
