"""Attention with rotary positions: grouped-query, and latent."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from zili import ops
from zili.config.model import ModelConfig
from zili.models.cache import CacheEntry
from zili.models.layers import Entrance, Linear, RMSNorm


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
        self.enter = Entrance()
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
        dropout = self.dropout if self.training else 0.0
        attend = self.core if cache_entry is None else partial(cache_entry.attend, self.core)
        return self.output(attend(query, key, value, document_ids, dropout).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        # The number of heads is what is left: a tensor-parallel rank holds only some of them.
        return x.unflatten(-1, (-1, self.head_dim))


class LatentAttention(nn.Module):
    """Causal self-attention whose queries, keys and values are made from short vectors (DeepSeek-V2, section 2.1).

    The short vectors belong to their token alone, so each process makes those of its own tokens, and only they cross
    processes. All heads' keys share the part that positions turn.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        latent, hidden, bias = config.latent, config.hidden_size, config.qkv_bias
        assert latent is not None
        self.plain_dim, self.rope_dim = config.head_dim - latent.rope_head_dim, latent.rope_head_dim
        self.value_dim, self.dropout = latent.value_head_dim, config.attention_dropout
        self.ranks = (latent.query_rank, latent.key_value_rank, latent.rope_head_dim)
        self.query_down = Linear(hidden, latent.query_rank, bias=bias)
        self.query_norm = RMSNorm(latent.query_rank, config.norm_eps)
        self.key_value_down = Linear(hidden, latent.key_value_rank + latent.rope_head_dim, bias=bias)
        self.key_value_norm = RMSNorm(latent.key_value_rank, config.norm_eps)
        self.enter = Entrance()
        self.query_up = Linear(latent.query_rank, config.heads * config.head_dim, bias=False)
        self.key_value_up = Linear(
            latent.key_value_rank, config.heads * (self.plain_dim + latent.value_head_dim), bias=False
        )
        self.core = CausalAttention()
        self.output = Linear(config.heads * latent.value_head_dim, hidden, bias=config.attention_output_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_ids: Tensor | None = None,
        cache_entry: CacheEntry | None = None,
    ) -> Tensor:
        """As `Attention.forward`; `cos, sin [S, d_rope]`."""
        latent, shared = self.key_value_down(x).split(self.ranks[1:], -1)
        short = (self.query_norm(self.query_down(x)), self.key_value_norm(latent), shared)
        query_latent, latent, shared = self.enter(torch.cat(short, -1)).split(self.ranks, -1)
        query = self.query_up(query_latent).unflatten(-1, (-1, self.plain_dim + self.rope_dim))
        plain, turned = query.split((self.plain_dim, self.rope_dim), -1)
        query = torch.cat((plain, ops.rotate(turned, cos, sin)), -1)
        key_value = self.key_value_up(latent).unflatten(-1, (-1, self.plain_dim + self.value_dim))
        plain, value = key_value.split((self.plain_dim, self.value_dim), -1)
        turned = ops.rotate(shared[:, :, None], cos, sin).expand(-1, -1, plain.shape[2], -1)
        key = torch.cat((plain, turned), -1)
        dropout = self.dropout if self.training else 0.0
        attend = self.core if cache_entry is None else partial(cache_entry.attend, self.core)
        return self.output(attend(query, key, value, document_ids, dropout).flatten(-2))


def attention_of(config: ModelConfig) -> nn.Module:
    """The attention that `config` describes."""
    return Attention(config) if config.latent is None else LatentAttention(config)
