"""Weights as the CPU's product reads them.

A product of few rows takes as long as its weight takes to be read. oneDNN copies a weight that lies in rows into blocks
of its own at every product; with blocks from the start, 16 rows took it 0.6 to 0.7 of the time. They cannot be
trained or saved, so this is for a model that answers only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zili.models.attention import Attention
from zili.models.cache import CacheEntry
from zili.models.decoder import Block, Decoder
from zili.models.feed_forward import FeedForward
from zili.models.layers import Linear, RMSNorm

_product = torch.ops.mkldnn._linear_pointwise
_ROWS = 512
"""Rows of a product that oneDNN lays the blocks out for. They do as well for few, but not those for 1 for many."""


class PackedLinear(nn.Module):
    """`x [..., I]` -> `[..., O]`, as the `Linear` it is made of."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight [O, I]`, `bias [O]`."""
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self._weight, self._bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        """Of the product, without a pass of its own."""
        return _product(x, self._weight, self._bias, "swish", [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other [..., O]`, without a pass of its own."""
        return _product.binary(x, other, self._weight, self._bias, "mul")


class PackedBlock(nn.Module):
    """A `Block` with a cache, in few operations: on few rows each costs about the same, however little it does."""

    def __init__(self, plain: Block) -> None:
        super().__init__()
        attention, feed_forward = plain.attention, plain.feed_forward
        assert isinstance(attention, Attention) and isinstance(feed_forward, FeedForward)
        self._norms = [_Norm(plain.attention_norm), _Norm(plain.feed_forward_norm)]
        self._head_dim, self._core = attention.head_dim, attention.core
        self._heads, self._kv_heads = (
            linear.out_features // attention.head_dim for linear in (attention.query, attention.key)
        )
        self._input = PackedLinear(*_joined(attention))
        self._output, self._gate, self._up, self._down = (
            PackedLinear(linear.weight, linear.bias)
            for linear in (attention.output, feed_forward.gate, feed_forward.up, feed_forward.down)
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, document_ids: Tensor | None, cache_entry: CacheEntry
    ) -> Tensor:
        """As `Block.forward`."""
        heads = self._input(self._norms[0](x)).unflatten(-1, (-1, self._head_dim))
        turned = _turned(heads[:, :, : -self._kv_heads], cos, sin)
        query, key = turned[:, :, : self._heads], turned[:, :, self._heads :]
        key, value = cache_entry.append(key, heads[:, :, -self._kv_heads :])
        x = x + self._output(self._core(query, key, value, document_ids, 0.0).flatten(-2))
        normed = self._norms[1](x)
        return x + self._down(self._up.times(normed, self._gate.silu(normed)))


class _Norm:
    """`RMSNorm`, in fewer operations."""

    def __init__(self, plain: RMSNorm) -> None:
        size = plain.weight.numel()
        self._weight = plain.weight.detach().float() * math.sqrt(size)
        self._least = torch.tensor([math.sqrt(plain.eps * size)])

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self._least) * self._weight).to(x.dtype)


def _joined(attention: Attention) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of query, key and value as one, with rows of the first two where `_turned` looks for them."""
    linears = (attention.query, attention.key, attention.value)
    half = attention.head_dim // 2

    def placed(rows: Tensor, linear: Linear) -> Tensor:
        """Element i of a head beside i + half."""
        if linear is attention.value:
            return rows
        return rows.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)

    biases = [placed(linear.bias, linear) for linear in linears if linear.bias is not None]
    weight = torch.cat([placed(linear.weight, linear) for linear in linears])
    return weight, torch.cat(biases) if biases else None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rotate`, of heads with the elements that it mixes beside each other: a product of complex numbers."""
    by = torch.complex(cos, sin)[:, None, : cos.shape[-1] // 2]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)


@torch.no_grad()
def pack(model: Decoder) -> None:
    """Lay out the weights of `model`, on a CPU, for answering alone; on other chips they lie well as they are.

    Parts that are not made of plain `Linear` keep their form: those with an adapter, experts.
    """
    if not _packs(model.head_weight):
        return
    output = model.head or model.embedding
    assert output is not None
    model.readout = PackedLinear(output.weight)
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
        return PackedLinear(module.weight, module.bias)
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
