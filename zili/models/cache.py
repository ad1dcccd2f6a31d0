"""Keys and values of tokens already seen, of several sequences of different lengths at once, and attention over them.

A forward pass is one of two. It is rows of one length, `[B, S]`, each going on with what the cache has of it. Or it is
one row of tokens of any sequences, as `lay` puts them: products see all of them together, which makes many answers
cheap, and only attention looks where each lies. A `Decoder` runs alike in both.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zili.config.model import ModelConfig
from zili.models.rotary import Scaling, scaling
from zili.ops.grouped_heads import scaled_dot_product_attention


class AttentionKernels(Protocol):
    """Attention of single tokens where a machine has code of its own for it."""

    def attend(self, query: Tensor, positions: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`query [N, H, d]` at `positions [N]` of sequences whose keys go to `rows [N * K]`; `[N, H, d]`."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence: `ids` at positions from `start` on, in slot `slot`."""

    slot: int
    start: int
    ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


class KeyValueCache:
    """Room for `max_length` tokens in each of `slots` sequences.

    Some rotary rules change every table when the sequence grows: telechat_ntk's base at each doubling and its magnitude
    at every token past training_length, tele_flm_ntk's base at each doubling. The keys of the second layer on come from
    hidden states that change with them, so turning the cached keys again would not be enough. Once the tables have
    changed, a sequence is computed again from its first token (`holds`). So decoding equals the full forward pass, at
    the price of a full forward pass per change.

    The published code does not do this: TeleChat's cached loop leaves old keys as they were first turned, so
    its cached continuation leaves its own uncached one once the tables have moved (golden
    `generated_ids_cached` of telechat2-ntk). `exact=False` reproduces that behaviour, at a constant cost a
    token.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = True,
        kernels: AttentionKernels | None = None,
    ) -> None:
        self.max_length, self.length = max_length, 0
        """`length`: tokens of each row that were given as rows of one length."""
        self._config, self._kernels = config, kernels
        # Keys of a head lie together, as attention reads them.
        shape = (config.layers, slots, config.kv_heads, max_length)
        self.keys = _zeros((*shape, config.head_dim), dtype, device)
        self.values = _zeros((*shape, config.value_head_dim), dtype, device)
        self.stretches = exact and served_length(config, max_length) < max_length
        """Whether tables may change as a sequence grows, so that its keys have to be made again."""
        self._turned: list[Scaling | None] = [None] * slots
        """How the keys of each slot were turned."""
        self._ids: Tensor | None = None
        self.plan: PassPlan | None = None

    def holds(self, slot: int, length: int) -> bool:
        """Whether the keys in a slot are those that a sequence of `length` tokens has."""
        return not self.stretches or self._turned[slot] == self._scaling(length)

    def _scaling(self, length: int) -> Scaling:
        return scaling(self._config.rotary, self._config.rotary_dim, length)

    # ---- tokens of any sequences

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` tokens of `source`."""
        for kept in (self.keys, self.values):
            kept[:, target, :, :length] = kept[:, source, :, :length]
        self._turned[target] = self._turned[source]

    def lay(self, chunks: Sequence[Chunk], length: int) -> tuple[Tensor, list[int]]:
        """Plan a forward pass: its ids `[1, N]`, and for each chunk in the order given the place of its last token.

        `length`: of the sequences, as rotary tables have it. Where these change with it (`stretches`) a pass is of
        sequences of one length.
        """
        order = sorted(range(len(chunks)), key=lambda i: (len(chunks[i].ids) > 1, chunks[i].slot))
        ids: list[int] = []
        last = [0] * len(chunks)
        for number in order:
            ids += chunks[number].ids
            last[number] = len(ids) - 1
        self.plan = self._planned([chunks[number] for number in order], length)
        if self.stretches:
            for chunk in chunks:
                self._turned[chunk.slot] = self._scaling(length)
        return torch.tensor([ids], device=self.keys.device), last

    def _planned(self, chunks: list[Chunk], length: int) -> PassPlan:
        """The layout of chunks, those with a single token first."""
        device, kv_heads = self.keys.device, self.keys.shape[2]
        slots = torch.tensor([chunk.slot for chunk in chunks for _ in chunk.ids], device=device)
        where = torch.tensor([place for chunk in chunks for place in range(chunk.start, chunk.end)], device=device)
        heads = slots[:, None] * kv_heads + torch.arange(kv_heads, device=device)
        rows = (heads * self.max_length + where[:, None]).flatten()
        singles = [chunk for chunk in chunks if len(chunk.ids) == 1]
        parts: list[_Singles | _Run | _Longer] = []
        if self._kernels is None:
            parts += _runs(singles, self.keys)
        elif singles:
            parts.append(_Singles(self._kernels, where[: len(singles)], rows))
        parts += (_longer(chunk, self.keys) for chunk in chunks[len(singles) :])
        return PassPlan(rows, where, length, tuple(parts))

    # ---- what a `Decoder` asks

    def extend(self, input_ids: Tensor) -> tuple[Tensor, Tensor, int]:
        """What a forward pass computes: ids, their positions in their sequences, and the length of these.

        The ids are `input_ids`: those that were laid, or `[B, S]` that go on with the cache's rows. After a change of
        tables they are all ids of the rows so far.

        Raises:
            ValueError: more tokens than there is room for, or another number of rows.
        """
        if self.plan is not None:
            return input_ids, self.plan.positions, self.plan.length
        rows, end = len(self._turned), self.length + input_ids.shape[1]
        if end > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} tokens, {end} are needed; make a longer one")
        if len(input_ids) != rows:
            raise ValueError(f"the cache has {rows} rows, input_ids has {len(input_ids)}")
        before = input_ids[:, :0] if self._ids is None else self._ids[:, : self.length]
        start = self.length if self.holds(0, end) else 0
        self._ids, self.length = torch.cat((before, input_ids), 1), end
        self._turned = [self._scaling(end)] * rows
        return self._ids[:, start:], torch.arange(start, end, device=input_ids.device), end

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row, to decode another continuation of them."""
        self.length = min(self.length, length)

    def entry(self, layer: int) -> CacheEntry:
        """Where `layer` reads and writes."""
        return CacheEntry(self, layer)


Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""`CausalAttention.forward`."""


@dataclass(frozen=True)
class CacheEntry:
    """One layer's part of a cache."""

    cache: KeyValueCache
    layer: int

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, `[slots, K, T, d]`."""
        return self.cache.keys[self.layer], self.cache.values[self.layer]

    @property
    def rows(self) -> Tensor:
        """Of `[slots * K * T]`, `[N * K]`: where the keys of the tokens that were laid go."""
        assert self.cache.plan is not None
        return self.cache.plan.rows

    def attend(
        self, core: Core, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None, dropout: float
    ) -> Tensor:
        """Store `key, value [B, S, K, d]`; what `core` makes of them and of those before, `[B, S, H, d]`."""
        if self.cache.plan is not None:
            for kept, new in zip(self.kept, (key, value), strict=True):
                size = kept.shape[-1]
                kept.view(-1, size).index_copy_(0, self.rows, new.reshape(-1, size).to(kept.dtype))
            return self.attend_laid(query)
        end = self.cache.length
        for kept, new in zip(self.kept, (key, value), strict=True):
            kept[:, :, end - key.shape[1] : end] = new.detach().transpose(1, 2)
        keys, values = (kept[:, :, :end].transpose(1, 2).to(query.dtype) for kept in self.kept)
        return core(query, keys, values, document_ids, dropout)

    def attend_laid(self, query: Tensor) -> Tensor:
        """Attention of the tokens that were laid, `query [1, N, H, d]`, whose keys are there; `[1, N, H, d_v]`."""
        assert self.cache.plan is not None
        out, start = [], 0
        for part in self.cache.plan.parts:
            out.append(part.attend(query[0, start : start + part.tokens], *self.kept))
            start += part.tokens
        return torch.cat(out)[None] if len(out) > 1 else out[0][None]


# ---- where the tokens of a pass lie


class _Run(NamedTuple):
    """Single tokens whose slots lie beside each other, so that their keys are one view."""

    tokens: int
    slots: slice
    longest: int
    visible: Tensor | None
    """`[tokens, 1, 1, longest]`, added to scores: 0 where a key is of a token's sequence, else minus infinity; None:
    all keys are."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`query [tokens, H, d]`, `key, value [slots, K, T, d]` -> `[tokens, H, d_v]`."""
        keys, values = (kept[self.slots, :, : self.longest].to(query.dtype) for kept in (key, value))
        # Heads that share a key are its queries, so that no key is copied.
        grouped = query.unflatten(1, (key.shape[1], -1))
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.visible).flatten(1, 2)


class _Singles(NamedTuple):
    """Single tokens, wherever their slots are."""

    kernels: AttentionKernels
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


class PassPlan(NamedTuple):
    """Where the tokens of a pass go: single tokens first, by slot, then longer chunks."""

    rows: Tensor
    """Of `[slots * K * T]`, `[N * K]`: where each token's keys go."""
    positions: Tensor
    """`[N]`."""
    length: int
    """Of the sequences, as rotary tables have it."""
    parts: tuple[_Singles | _Run | _Longer, ...]


def _runs(singles: list[Chunk], like: Tensor) -> Iterator[_Run]:
    """Of single tokens in the order of their slots; masks are `like` keys."""
    start = 0
    for stop in range(1, len(singles) + 1):
        if stop < len(singles) and singles[stop].slot == singles[stop - 1].slot + 1:
            continue
        run = singles[start:stop]
        ends, slots = [chunk.end for chunk in run], slice(run[0].slot, run[-1].slot + 1)
        visible = None
        if min(ends) < (longest := max(ends)):
            places = torch.arange(longest, device=like.device)
            visible = _added(places >= torch.tensor(ends, device=like.device)[:, None], like)[:, None, None]
        yield _Run(len(run), slots, longest, visible)
        start = stop


def _longer(chunk: Chunk, like: Tensor) -> _Longer:
    visible = None
    if chunk.start:
        places = torch.arange(chunk.end, device=like.device)
        visible = _added(places > places[chunk.start :, None], like)
    return _Longer(len(chunk.ids), chunk.slot, chunk.end, visible)


def _added(hidden: Tensor, like: Tensor) -> Tensor:
    """A mask in the form that attention would make of it at every layer."""
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


# ---- memory


def bytes_a_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of the keys and values of all layers."""
    return config.layers * config.kv_heads * (config.head_dim + config.value_head_dim) * dtype.itemsize


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
