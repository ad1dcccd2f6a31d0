"""Keys and values of several sequences of different lengths at once, and attention over them.

A step of the engine is one row of tokens, whoever they are of: products see all of them together, which is what makes
many streams cheap, and only attention looks where each lies. So a `Decoder` runs as it is; what is different is its
cache and the core of its attention.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zili.config.model import ModelConfig
from zili.models.attention import CausalAttention
from zili.models.decoder import Decoder
from zili.models.rotary import scaling
from zili.ops.grouped_heads import scaled_dot_product_attention
from zili.serving.cpu.kernels import Kernels


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence: `ids` at positions from `start` on, in slot `slot`."""

    slot: int
    start: int
    ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


class _Run(NamedTuple):
    """Single tokens whose slots lie beside each other, so that their keys are one view."""

    tokens: int
    slots: slice
    longest: int
    visible: Tensor
    """`[tokens, 1, 1, longest]`, added to scores: 0 where a key is of a token's sequence, else minus infinity."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`query [tokens, H, d]`, `key, value [slots, K, T, d]` -> `[tokens, H, d_v]`."""
        keys, values = (kept[self.slots, :, : self.longest].to(query.dtype) for kept in (key, value))
        # Heads that share a key are its queries, so that no key is copied.
        grouped = query.unflatten(1, (key.shape[1], -1))
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.visible).flatten(1, 2)


class _Singles(NamedTuple):
    """Single tokens, wherever their slots are."""

    kernels: Kernels
    positions: Tensor
    rows: Tensor

    @property
    def tokens(self) -> int:
        return len(self.positions)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `_Run.attend`."""
        return self.kernels.attend(query.to(key.dtype), self.positions, self.rows, key, value).to(query.dtype)


class _Longer(NamedTuple):
    """Consecutive tokens of one sequence."""

    tokens: int
    slot: int
    end: int
    visible: Tensor | None
    """`[tokens, end]`, as `_Run`'s; None: it is the sequence's beginning, and plainly causal."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `_Run.attend`."""
        keys, values = (kept[self.slot, None, :, : self.end].to(query.dtype) for kept in (key, value))
        mask, causal = self.visible, self.visible is None
        queries = query.transpose(0, 1)[None]
        attended = scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal)
        return attended[0].transpose(0, 1)


class _Plan(NamedTuple):
    """Where the tokens of a step go: single tokens first, by slot, then longer pieces."""

    rows: Tensor
    """Of `[slots * K * T]`, `[N * K]`: where each token's keys go."""
    positions: Tensor
    """`[N]`."""
    parts: tuple[_Singles | _Run | _Longer, ...]


class SlotCache:
    """Room for `context` tokens in each of `slots` sequences; a `Decoder`'s cache while a step runs."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        context: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> None:
        self.context, self._heads, self._kernels = context, config.kv_heads, kernels
        # Keys of a head lie together, as attention reads them.
        shape = (config.layers, slots, config.kv_heads, context)
        self.keys = _zeros((*shape, config.head_dim), dtype, device)
        self.values = _zeros((*shape, config.value_head_dim), dtype, device)
        self.plan: _Plan | None = None

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` tokens of `source`."""
        for kept in (self.keys, self.values):
            kept[:, target, :, :length] = kept[:, source, :, :length]

    def lay(self, pieces: Sequence[Piece]) -> tuple[Tensor, list[int]]:
        """Plan a step: its ids `[1, N]`, and for each piece in the order given the place of its last token."""
        order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i].ids) > 1, pieces[i].slot))
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
        ordered = [pieces[number] for number in order]
        device = self.keys.device
        where = torch.tensor(positions, device=device)
        heads = torch.tensor(slots, device=device)[:, None] * self._heads + torch.arange(self._heads, device=device)
        rows = (heads * self.context + where[:, None]).flatten()
        singles = [piece for piece in ordered if len(piece.ids) == 1]
        parts: list[_Singles | _Run | _Longer] = []
        if self._kernels is None:
            parts += _runs(singles, self.keys)
        elif singles:
            parts.append(_Singles(self._kernels, where[: len(singles)], rows))
        self.plan = _Plan(rows, where, (*parts, *(_longer(piece, self.keys) for piece in ordered[len(singles) :])))
        return torch.tensor([ids], device=device), last

    # ---- what a `Decoder` asks of a cache

    def extend(self, input_ids: Tensor) -> tuple[int, Tensor]:
        """As `KeyValueCache.extend`: rotary tables are those of a full context, whatever is in it."""
        return self.context - input_ids.shape[1], input_ids

    def entry(self, layer: int, start: int) -> SlotEntry:
        return SlotEntry(self, layer)


def bytes_a_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of the keys and values of all layers."""
    return config.layers * config.kv_heads * (config.head_dim + config.value_head_dim) * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU memory that is taken page by page as it is written: `torch.zeros` writes all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            # A short answer would take two megabytes for each head of each layer.
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@dataclass(frozen=True)
class SlotEntry:
    """One layer's part of a cache."""

    cache: SlotCache
    layer: int

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, `[slots, K, T, d]`."""
        return self.cache.keys[self.layer], self.cache.values[self.layer]

    @property
    def rows(self) -> Tensor:
        """Of `[slots * K * T]`, `[N * K]`: where the keys of a step's tokens go."""
        assert self.cache.plan is not None
        return self.cache.plan.rows

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store `key, value [1, N, K, d]`; returns those of all slots, `[slots, K, T, d]`."""
        for kept, new in zip(self.kept, (key, value), strict=True):
            size = kept.shape[-1]
            kept.view(-1, size).index_copy_(0, self.rows, new.reshape(-1, size).to(kept.dtype))
        return self.kept


class SlotAttention(CausalAttention):
    """Attention of a step's tokens, each to its own sequence."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def forward(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None, dropout: float) -> Tensor:
        """`query [1, N, H, d]`, `key, value [slots, K, T, d]` -> `[1, N, H, d_v]`."""
        plan = self._cache.plan
        assert plan is not None
        out, start = [], 0
        for part in plan.parts:
            out.append(part.attend(query[0, start : start + part.tokens], key, value))
            start += part.tokens
        return torch.cat(out)[None] if len(out) > 1 else out[0][None]


def _runs(singles: list[Piece], like: Tensor) -> Iterator[_Run]:
    """Of single tokens in the order of their slots; masks are `like` keys."""
    start = 0
    for stop in range(1, len(singles) + 1):
        if stop < len(singles) and singles[stop].slot == singles[stop - 1].slot + 1:
            continue
        run = singles[start:stop]
        longest = max(piece.end for piece in run)
        ends = torch.tensor([piece.end for piece in run], device=like.device)
        hidden = torch.arange(longest, device=like.device) >= ends[:, None]
        yield _Run(len(run), slice(run[0].slot, run[-1].slot + 1), longest, _added(hidden, like)[:, None, None])
        start = stop


def _longer(piece: Piece, like: Tensor) -> _Longer:
    visible = None
    if piece.start:
        places = torch.arange(piece.end, device=like.device)
        visible = _added(places > places[piece.start :, None], like)
    return _Longer(len(piece.ids), piece.slot, piece.end, visible)


def _added(hidden: Tensor, like: Tensor) -> Tensor:
    """A mask in the form that attention would make of it at every layer."""
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


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
