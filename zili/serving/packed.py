"""Weights as the CPU's product reads them.

A product of few rows takes as long as its weight takes to be read. oneDNN copies a weight that lies in rows into blocks
of its own at every product; with blocks from the start, 16 rows took it 0.6 to 0.7 of the time. They cannot be
trained or saved, so this is for a model that answers only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zili import ops
from zili.models.attention import Attention
from zili.models.cache import CacheEntry
from zili.models.decoder import Block, Decoder
from zili.models.feed_forward import FeedForward
from zili.models.layers import Embedding, Linear

_product = torch.ops.mkldnn._linear_pointwise
_ROWS = 512
"""Rows of a product that oneDNN lays the blocks out for. They do as well for few, but not those for 1 for many."""


class PackedLinear(nn.Module):
    """`x [..., I]` -> `[..., O]`, as the `Linear` it is made of; of several with one input, their outputs joined."""

    def __init__(self, *linears: Linear | Embedding) -> None:
        super().__init__()
        weights = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias for linear in linears if isinstance(linear, Linear) and linear.bias is not None]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weights, _ROWS)
        self._bias = torch.cat([bias.detach() for bias in biases]) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self._weight, self._bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        """Of the product, without a pass of its own."""
        return _product(x, self._weight, self._bias, "swish", [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other [..., O]`, without a pass of its own."""
        return _product.binary(x, other, self._weight, self._bias, "mul")


class PackedBlock(nn.Module):
    """A `Block` with a cache, in few operations: on few rows a small one takes as long as a product."""

    def __init__(self, plain: Block) -> None:
        super().__init__()
        attention, feed_forward = plain.attention, plain.feed_forward
        assert isinstance(attention, Attention) and isinstance(feed_forward, FeedForward)
        self._norms = [(norm.weight.detach(), norm.eps) for norm in (plain.attention_norm, plain.feed_forward_norm)]
        self._head_dim, self._core = attention.head_dim, attention.core
        self._heads, self._kv_heads = (
            linear.out_features // attention.head_dim for linear in (attention.query, attention.key)
        )
        self._input = PackedLinear(attention.query, attention.key, attention.value)
        self._output = PackedLinear(attention.output)
        self._gate, self._up = PackedLinear(feed_forward.gate), PackedLinear(feed_forward.up)
        self._down = PackedLinear(feed_forward.down)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, document_ids: Tensor | None, cache_entry: CacheEntry
    ) -> Tensor:
        """As `Block.forward`."""
        heads = self._input(self._normed(x, 0)).unflatten(-1, (-1, self._head_dim))
        turned = ops.rotate(heads[:, :, : -self._kv_heads], cos, sin)
        query, key = turned[:, :, : self._heads], turned[:, :, self._heads :]
        key, value = cache_entry.append(key, heads[:, :, -self._kv_heads :])
        x = x + self._output(self._core(query, key, value, document_ids, 0.0).flatten(-2))
        normed = self._normed(x, 1)
        return x + self._down(self._up.times(normed, self._gate.silu(normed)))

    def _normed(self, x: Tensor, number: int) -> Tensor:
        weight, eps = self._norms[number]
        return F.rms_norm(x, weight.shape, weight, eps)


@torch.no_grad()
def pack(model: Decoder) -> None:
    """Lay out the weights of `model`, on a CPU, for answering alone; on other chips they lie well as they are.

    Parts that are not made of plain `Linear` keep their form: those with an adapter, experts.
    """
    if not _packs(model.head_weight):
        return
    output = model.head or model.embedding
    assert output is not None
    model.readout = PackedLinear(output)
    model.head = None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if made := _packed(child):
                setattr(parent, name, made)


def _packed(module: nn.Module) -> nn.Module | None:
    """`module` in its packed form; None: it has none, though what it is made of may."""
    linears = [child for child in module.modules() if isinstance(child, Linear)]
    if not all(one.leave is None and one.lora_a is None and _packs(one.weight) for one in linears):
        return None
    if type(module) is Linear:
        return PackedLinear(module)
    if type(module) is not Block or type(module.attention) is not Attention:
        return None
    return PackedBlock(module) if type(module.feed_forward) is FeedForward else None


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # Without instructions for it oneDNN refuses bfloat16.
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
