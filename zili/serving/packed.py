"""Weights as the CPU's product reads them.

A product of few rows takes as long as its weight takes to be read. oneDNN copies a weight that lies in rows into blocks
of its own at every product; with blocks from the start, 16 rows took it about half the time (docs/benchmarks.md). They
cannot be trained or saved, so this is for a model that answers only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zili import ops
from zili.models.attention import Attention
from zili.models.cache import CacheEntry
from zili.models.decoder import Decoder
from zili.models.feed_forward import FeedForward
from zili.models.layers import Embedding, Linear

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

    def forward(self, x: Tensor, then: str = "none") -> Tensor:
        """`then` is what oneDNN does to each result before it is written: "swish", for one."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, then, [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other [..., O]`, without a pass of its own."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, "mul")


class PackedFeedForward(nn.Module):
    """As the `FeedForward` it is made of."""

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        self._gate, self._up, self._down = PackedLinear(plain.gate), PackedLinear(plain.up), PackedLinear(plain.down)

    def forward(self, x: Tensor) -> Tensor:
        return self._down(self._up.times(x, self._gate(x, "swish")))


class PackedAttention(nn.Module):
    """As the `Attention` it is made of, whose core it takes: query, key and value are one product."""

    def __init__(self, plain: Attention) -> None:
        super().__init__()
        self._input, self._output = PackedLinear(plain.query, plain.key, plain.value), PackedLinear(plain.output)
        self._heads = plain.query.out_features // plain.head_dim
        self._kv_heads = plain.key.out_features // plain.head_dim
        self._head_dim, self.core = plain.head_dim, plain.core

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, document_ids: Tensor | None, cache_entry: CacheEntry
    ) -> Tensor:
        """As `Attention.forward`, with a cache."""
        joined = self._input(x).unflatten(-1, (-1, self._head_dim))
        plain, value = joined.split((self._heads + self._kv_heads, self._kv_heads), 2)
        query, key = ops.rotate(plain, cos, sin).split((self._heads, self._kv_heads), 2)
        attended = self.core(query, *cache_entry.append(key, value), document_ids, 0.0)
        return self._output(attended.flatten(-2))


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
    if type(module) is Attention and len({one.bias is None for one in (module.query, module.key, module.value)}) == 1:
        return PackedAttention(module)
    if type(module) is FeedForward:
        return PackedFeedForward(module)
    return PackedLinear(module) if type(module) is Linear else None


def _packs(weight: Tensor) -> bool:
    return torch.backends.mkldnn.is_available() and weight.device.type == "cpu" and weight.dtype == torch.float32
