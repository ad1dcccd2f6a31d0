"""The decoder: one class for every dense model of the family, told apart by its `ModelConfig`."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zili import ops
from zili.config.model import ModelConfig
from zili.models.attention import Attention
from zili.models.cache import CacheEntry, KeyValueCache
from zili.models.feed_forward import FeedForward
from zili.models.initialization import initial_value
from zili.models.layers import Embedding, Linear, RMSNorm
from zili.models.rotary import rotary_tables


class Block(nn.Module):
    """One pre-norm layer: `h = x + attention(norm(x))`, `y = h + feed_forward(norm(h))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_ids: Tensor | None = None,
        cache_entry: CacheEntry | None = None,
    ) -> Tensor:
        """`x [B, S, D]`, `cos, sin [S, d]`, `document_ids [B, T]` -> `[B, S, D]`."""
        x = x + self._drop(self.attention(self.attention_norm(x), cos, sin, document_ids, cache_entry))
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x)))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout) if self.training and self.dropout else branch


class Decoder(nn.Module):
    """Token ids to logits.

    Built on the `meta` device it has shapes only; built elsewhere its weights are those of seed 0 until
    `init_weights` or a checkpoint sets others. `recompute` is the trainer's switch: "full" keeps only each
    block's input for the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Literal["none", "full"] = "none"
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tied_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            self.init_weights(0)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter with `initial_value(name, shape, config, seed)`.

        For whole parameters: one that is sharded takes its part of `initial_value` where it is sharded.
        """
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), self.config, seed))

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`: the output matrix, which is the embedding's when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self, input_ids: Tensor, *, document_ids: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Logits `[B, S, V]` in fp32 for `input_ids [B, S]`; arguments as for `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, document_ids=document_ids, cache=cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden [..., D]`, as `hidden_states` returns it, to fp32 logits `[..., V]`."""
        return self._scaled(ops.linear(hidden, self.head_weight).float(), self.config.logit_multiplier)

    @staticmethod
    def _scaled(x: Tensor, multiplier: float) -> Tensor:
        return x if multiplier == 1.0 else x * multiplier  # most models: no pass over [B, S, V] for nothing

    def hidden_states(
        self, input_ids: Tensor, *, document_ids: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """`[B, S, D]` after the final norm.

        Args:
            input_ids: `[B, S]`.
            document_ids: `[B, S]`, or with a cache `[B, T]` for cached and new tokens together; a token sees
                only its own document. None: one document a row.
            cache: tokens seen before; the new ones are added to it. Equals the pass without a cache over all
                tokens, whatever the rotary rule; see `KeyValueCache` for the price and for the published
                code's different behaviour.
        """
        new = input_ids.shape[1]
        start, input_ids = (0, input_ids) if cache is None else cache.extend(input_ids)
        length = start + input_ids.shape[1]
        positions = torch.arange(start, length, device=input_ids.device)
        cos, sin = rotary_tables(self.config.rotary, self.config.head_dim, positions, length)
        x = self._scaled(self.embedding(input_ids), self.config.embedding_multiplier)
        for i, block in enumerate(self.layers):
            entry = None if cache is None else cache.entry(i, start)
            x = self._run(block, x, cos, sin, document_ids, entry)
        return self.norm(x[:, -new:])

    def _run(self, block: nn.Module, *arguments: Tensor | CacheEntry | None) -> Tensor:
        if self.recompute == "full" and self.training and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def loss_sum(self, input_ids: Tensor, labels: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """Sum of cross entropies over `labels [B, S]` that are not `IGNORE_INDEX`: a 0-d fp32 tensor.

        Labels are aligned with `input_ids [B, S]`: `labels[:, i]` is the token after `input_ids[:, i]`.
        """
        hidden = self.hidden_states(input_ids, document_ids=document_ids)
        multiplier = self.config.logit_multiplier
        return ops.linear_cross_entropy(hidden.flatten(0, 1), self.head_weight, labels.flatten(), multiplier)

    def new_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        exact: bool = True,
    ) -> KeyValueCache:
        """An empty cache; dtype and device default to the weights', `exact` is `KeyValueCache`'s."""
        weight = self.embedding.weight
        place = weight.device if device is None else torch.device(device)
        return KeyValueCache(self.config, batch, max_length, dtype=dtype or weight.dtype, device=place, exact=exact)
