"""Keys and values of several sequences of different lengths at once, and attention over them.

A step of the engine is one row of tokens, whoever they are of: products see all of them together, which is what makes
many streams cheap, and only attention looks where each lies. So a `Decoder` runs as it is; what is different is its
cache and the core of its attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zili import ops
from zili.config.model import ModelConfig
from zili.models.attention import CausalAttention
from zili.models.decoder import Decoder
from zili.models.rotary import scaling


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence: `ids` at positions from `start` on, in slot `slot`."""

    slot: int
    start: int
    ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


class _Plan(NamedTuple):
    """Where the tokens of a step go, `[N]` each: single tokens first, then longer pieces."""

    slots: Tensor
    positions: Tensor
    singles: int
    lengths: Tensor
    """Of the single tokens' sequences, `[singles]`."""
    pieces: tuple[Piece, ...]
    """Those that are longer."""


class SlotCache:
    """Room for `context` tokens in each of `slots` sequences; a `Decoder`'s cache while a step runs."""

    def __init__(
        self, config: ModelConfig, slots: int, context: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        heads = (config.layers, slots, context, config.kv_heads)
        self.context = context
        self.keys = torch.zeros((*heads, config.head_dim), dtype=dtype, device=device)
        self.values = torch.zeros((*heads, config.value_head_dim), dtype=dtype, device=device)
        self.plan: _Plan | None = None

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` tokens of `source`."""
        for kept in (self.keys, self.values):
            kept[:, target, :length] = kept[:, source, :length]

    def lay(self, pieces: Sequence[Piece]) -> tuple[Tensor, list[int]]:
        """Plan a step: its ids `[1, N]`, and for each piece in the order given the place of its last token."""
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i].ids) > 1)
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        last = [0] * len(pieces)
        for number in order:
            piece = pieces[number]
            ids += piece.ids
            slots += [piece.slot] * len(piece.ids)
            positions += range(piece.start, piece.end)
            last[number] = len(ids) - 1
        singles = [pieces[number] for number in order if len(pieces[number].ids) == 1]
        device = self.keys.device
        self.plan = _Plan(
            torch.tensor(slots, device=device),
            torch.tensor(positions, device=device),
            len(singles),
            torch.tensor([piece.end for piece in singles], dtype=torch.int64, device=device),
            tuple(pieces[number] for number in order if len(pieces[number].ids) > 1),
        )
        return torch.tensor([ids], device=device), last

    # ---- what a `Decoder` asks of a cache

    def extend(self, input_ids: Tensor) -> tuple[int, Tensor]:
        """As `KeyValueCache.extend`: rotary tables are those of a full context, whatever is in it."""
        return self.context - input_ids.shape[1], input_ids

    def entry(self, layer: int, start: int) -> _SlotEntry:
        return _SlotEntry(self, layer)


@dataclass(frozen=True)
class _SlotEntry:
    cache: SlotCache
    layer: int

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store `key, value [1, N, K, d]`; returns those of all slots, `[slots, T, K, d]`."""
        cache = self.cache
        assert cache.plan is not None
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        keys[cache.plan.slots, cache.plan.positions] = key[0].to(keys.dtype)
        values[cache.plan.slots, cache.plan.positions] = value[0].to(values.dtype)
        return keys, values


class SlotAttention(CausalAttention):
    """Attention of a step's tokens, each to its own sequence."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def forward(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None, dropout: float) -> Tensor:
        """`query [1, N, H, d]`, `key, value [slots, T, K, d]` -> `[1, N, H, d_v]`."""
        plan = self._cache.plan
        assert plan is not None
        out = []
        if plan.singles:
            out.append(self._single(query[0, : plan.singles], key, value, plan))
        start = plan.singles
        for piece in plan.pieces:
            own = query[:, start : start + len(piece.ids)]
            here = slice(piece.slot, piece.slot + 1)
            seen = [kept[here, : piece.end].to(query.dtype) for kept in (key, value)]
            out.append(ops.attention(own, *seen)[0])
            start += len(piece.ids)
        return torch.cat(out)[None]

    @staticmethod
    def _single(query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
        """`query [n, H, d]`, one of each sequence. Heads that share a key are its queries, so that no key is copied."""
        longest = int(plan.lengths.max())
        slots = plan.slots[: plan.singles]
        keys, values = (kept[slots, :longest].to(query.dtype).transpose(1, 2) for kept in (key, value))
        grouped = query.unflatten(1, (key.shape[2], -1))
        visible = torch.arange(longest, device=query.device) < plan.lengths[:, None]
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None])
        return attended.flatten(1, 2)


def served_length(config: ModelConfig, wanted: int) -> int:
    """The longest context up to `wanted` in which positions are turned alike, however long a sequence is.

    Rules that stretch with a sequence (`telechat_ntk`, `tele_flm_ntk`) would have every cached key made anew.
    """
    longest = min(wanted, config.max_length)
    first = scaling(config.rotary, config.rotary_dim, 1)
    low, high = 1, longest
    while low < high:  # they change once and for all
        middle = (low + high + 1) // 2
        low, high = (middle, high) if scaling(config.rotary, config.rotary_dim, middle) == first else (low, middle - 1)
    return low


def serve_from(model: Decoder, cache: SlotCache) -> None:
    """Let `model` attend to `cache`, from now on and to nothing else."""
    model.positions = lambda length, device: _planned(cache)
    for module in model.modules():
        if isinstance(getattr(module, "core", None), CausalAttention):
            assert isinstance(module, nn.Module)
            module.core = SlotAttention(cache)


def _planned(cache: SlotCache) -> Tensor:
    assert cache.plan is not None
    return cache.plan.positions
