"""Grouped-query attention with rotary positions."""

from __future__ import annotations

from torch import Tensor, nn

from zili import ops
from zili.config.model import ModelConfig
from zili.models.cache import CacheEntry
from zili.models.layers import Linear, Seam


class CausalAttention(nn.Module):
    """`ops.attention` as a module without weights: where the keys of a row lie on several processes, `zili.parallel`
    puts another in its place."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None, dropout: float) -> Tensor:
        """`query [B, S, H, d]`, `key, value [B, T, K, d]`, `document_ids [B, T]` -> `[B, S, H, d]`."""
        return ops.attention(query, key, value, document_ids=document_ids, dropout=dropout)


class Attention(nn.Module):
    """Causal self-attention, H query heads on K key/value heads of size d.

    Query, key and value are separate matrices: an optimizer that orthogonalises, a tensor-parallel split and
    a checkpoint layout each want to see the true matrix.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.enter = Seam()
        self.query = Linear(config.hidden_size, query, bias=config.qkv_bias)
        self.key = Linear(config.hidden_size, kv, bias=config.qkv_bias)
        self.value = Linear(config.hidden_size, kv, bias=config.qkv_bias)
        self.core = CausalAttention()
        self.output = Linear(query, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_ids: Tensor | None = None,
        cache_entry: CacheEntry | None = None,
    ) -> Tensor:
        """`x [B, S, D]`, `cos, sin [S, d]`, `document_ids [B, T]` -> `[B, S, D]`; T counts cached tokens."""
        x = self.enter(x)
        query = ops.rotate(self._heads(self.query(x)), cos, sin)
        key = ops.rotate(self._heads(self.key(x)), cos, sin)
        value = self._heads(self.value(x))
        if cache_entry is not None:
            key, value = cache_entry.append(key, value)
        dropout = self.dropout if self.training else 0.0
        attended = self.core(query, key, value, document_ids, dropout)
        return self.output(attended.flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        # The number of heads is what is left: a tensor-parallel rank holds only some of them.
        return x.unflatten(-1, (-1, self.head_dim))
