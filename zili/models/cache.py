"""Keys and values of tokens already seen, for decoding one token at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zili.config.model import ModelConfig
from zili.models.rotary import Scaling, scaling


class CacheEntry(NamedTuple):
    """One layer's part of a cache: `keys, values [B, T_max, K, d]`, and where the next tokens go."""

    keys: Tensor
    values: Tensor
    start: int

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store `key, value [B, S, K, d]` and return all up to them, `[B, start + S, K, d]`."""
        end = self.start + key.shape[1]
        self.keys[:, self.start : end] = key.detach()
        self.values[:, self.start : end] = value.detach()
        return self.keys[:, :end].to(key.dtype), self.values[:, :end].to(value.dtype)


class KeyValueCache:
    """Room for `max_length` tokens in each of `batch` rows of equal length.

    Some rotary rules change every table when the sequence grows: telechat_ntk's base at each doubling and its
    magnitude at every token past training_length, tele_flm_ntk's base at each doubling. The keys of the
    second layer on come from hidden states that change with them, so turning the cached keys again would not
    be enough: an exact cache keeps the ids and, when the tables change, is filled again from the first token:
    decoding equals the full forward pass, at the price of a full forward pass per change.

    The published code does not do this: TeleChat's cached loop leaves old keys as they were first turned, so
    its cached continuation leaves its own uncached one once the tables have moved (golden
    `generated_ids_cached` of telechat2-ntk). `exact=False` reproduces that behaviour, at a constant cost a
    token.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = True,
    ) -> None:
        heads = (config.layers, batch, max_length, config.kv_heads)
        self.config, self.exact = config, exact
        self.max_length, self.length = max_length, 0
        self.keys = torch.zeros((*heads, config.head_dim), dtype=dtype, device=device)
        self.values = torch.zeros((*heads, config.value_head_dim), dtype=dtype, device=device)
        self.input_ids = torch.zeros(batch, max_length, dtype=torch.long, device=device)
        self._filled_with: Scaling | None = None

    def extend(self, input_ids: Tensor) -> tuple[int, Tensor]:
        """Take in `input_ids [B, S]`; returns the position to compute from and the ids from there on.

        Usually `(length, input_ids)`; after a change of tables `(0, all ids so far)`.

        Raises:
            ValueError: more tokens than there is room for, or another number of rows.
        """
        start, end = self.length, self.length + input_ids.shape[1]
        if end > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} tokens, {end} are needed; make a longer one")
        if input_ids.shape[0] != self.input_ids.shape[0]:
            raise ValueError(f"the cache has {self.input_ids.shape[0]} rows, input_ids has {input_ids.shape[0]}")
        self.input_ids[:, start:end] = input_ids
        self.length = end
        now = scaling(self.config.rotary, self.config.rotary_dim, end)
        changed, self._filled_with = now != self._filled_with, now
        if changed and self.exact:
            return 0, self.input_ids[:, :end]
        return start, input_ids

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, to decode another continuation of them."""
        self.length = min(self.length, length)

    def entry(self, layer: int, start: int) -> CacheEntry:
        """Where `layer` reads and writes when computing from position `start`."""
        return CacheEntry(self.keys[layer], self.values[layer], start)
