"""Causal attention for the CPU, a block of queries at a time, each product a large matrix product.

torch's CPU kernel multiplies small tiles through its BLAS. Here the G query heads that share a key/value head become
rows of one matrix. So a block of 128 positions is a product of 128 G rows, by the library that `linear` uses. Keys
after the block, or before the first document in it, are never touched. The backward pass computes the probabilities
again (Dao et al. 2022, algorithm 4), so memory grows with S, not S^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zili.ops import reference
from zili.ops.product import LIBRARIES, Product, library, weight_gradient
from zili.torch_private import softmax_backward

BLOCK = 128


class _Tile(NamedTuple):
    """A block of queries against the keys it may see, for one row of the batch and one key/value head."""

    batch: int
    head: int
    rows: slice
    """Rows of the folded queries `[S G, d]`."""
    keys: slice
    hidden: Tensor | None
    """`[rows, keys]` bool, true where a query must not look; None where every key is seen."""


def _key_starts(documents: Tensor | None, batch: int, blocks: range) -> list[list[int]]:
    """First key that any query of each block may see: the beginning of the block's first document."""
    if documents is None:
        return [[0] * len(blocks)] * batch
    firsts = documents[:, list(blocks)].contiguous()
    return torch.searchsorted(documents.contiguous(), firsts).tolist()


def _tiles(query: Tensor, key: Tensor, documents: Tensor | None) -> Iterator[_Tile]:
    (batch, heads, length, _), group = key.shape, query.shape[2] // key.shape[2]
    blocks = range(0, length, BLOCK)
    # Where the rows of the batch are one document, there is nothing to mask but the future.
    if documents is not None and bool((documents[:, 0] == documents[:, -1]).all()):
        documents = None
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1).repeat_interleave(group, 0)
    for b, starts in enumerate(_key_starts(documents, batch, blocks)):
        for start, first in zip(blocks, starts, strict=True):
            end = min(start + BLOCK, length)
            rows, keys = slice(start * group, end * group), slice(first, end)
            hidden = _hidden(None if documents is None else documents[b], start, keys, group, future)
            for h in range(heads):
                yield _Tile(b, h, rows, keys, hidden)


def _hidden(documents: Tensor | None, start: int, keys: slice, group: int, future: Tensor) -> Tensor:
    """The mask of a tile: `[rows, BLOCK]` over its last keys, or `[rows, keys]` where documents differ."""
    width = keys.stop - start
    corner = future[: width * group, :width]
    if documents is None or documents[keys.start] == documents[keys.stop - 1]:
        return corner
    own = documents[start : keys.stop].repeat_interleave(group)
    hidden = own[:, None] != documents[None, keys]
    hidden[:, start - keys.start :] |= corner
    return hidden


def _probabilities(tile: _Tile, query: Tensor, key: Tensor, product: Product) -> Tensor:
    scores = product(query, key)
    if tile.hidden is not None:
        scores[:, -tile.hidden.shape[1] :].masked_fill_(tile.hidden, -torch.inf)
    return torch.softmax(scores, -1, out=scores)


@torch.library.custom_op("zili::blocked_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, library_name: str) -> Tensor:
    """`query [B, K, S G, d]` scaled, rows position by position; `key, value [B, K, S, d]`; all contiguous."""
    product, out = LIBRARIES[library_name], torch.empty_like(query)
    for tile in _tiles(query, key, documents):
        at = (tile.batch, tile.head)
        probabilities = _probabilities(tile, query[at][tile.rows], key[at][tile.keys], product)
        out[at][tile.rows] = product(probabilities, value[at][tile.keys].t())
    return out


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, library_name: str) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("zili::blocked_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, library_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    product, grad = LIBRARIES[library_name], grad.contiguous()
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for tile in _tiles(query, key, documents):
        at, rows, keys = (tile.batch, tile.head), tile.rows, tile.keys
        probabilities = _probabilities(tile, query[at][rows], key[at][keys], product)
        grad_value[at][keys] += weight_gradient(probabilities, grad[at][rows], product)
        upstream = product(grad[at][rows], value[at][keys])
        scores = softmax_backward(upstream, probabilities, -1, torch.float32)
        grad_query[at][rows] = product(scores, key[at][keys].t())
        grad_key[at][keys] += weight_gradient(scores, query[at][rows], product)
    return grad_query, grad_key, grad_value


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, library_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, str],
    output: Tensor,
) -> None:
    query, key, value, documents, library_name = inputs
    ctx.save_for_backward(query, key, value, documents)  # type: ignore[arg-type]  # None is allowed
    ctx.library = library_name  # type: ignore[attr-defined]


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    tensors, library_name = ctx.saved_tensors, ctx.library  # type: ignore[attr-defined]
    gradients = torch.ops.zili.blocked_attention_backward(grad, *tensors, library_name)
    return *gradients, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    document_ids: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`reference.attention` in blocks. A row's documents must lie one after another, as the loader packs them.

    With a cache (fewer queries than keys), values of another size than keys, dropout, or another dtype than fp32, the
    reference runs.
    """
    batch, length, heads, size = query.shape
    alike = query.shape[-1] == value.shape[-1] and key.shape[1] == length
    if not alike or dropout or query.dtype != torch.float32:
        return reference.attention(query, key, value, document_ids=document_ids, dropout=dropout)
    kv_heads = key.shape[2]
    group = heads // kv_heads
    # [B, S, K, G, d] -> [B, K, S, G, d]: in a compiled block these copies melt into the rotation before them.
    folded = (query * size**-0.5).view(batch, length, kv_heads, group, size).transpose(1, 2)
    out = torch.ops.zili.blocked_attention(
        folded.reshape(batch, kv_heads, length * group, size),
        key.transpose(1, 2).contiguous(),
        value.transpose(1, 2).contiguous(),
        document_ids,
        library(),
    )
    return out.view(batch, kv_heads, length, group, size).transpose(1, 2).reshape(batch, length, heads, size)
