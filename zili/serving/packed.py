"""Weights as the CPU's product reads them.

A product of few rows takes as long as its weight takes to be read. oneDNN copies a weight that lies in rows into blocks
of its own at every product; with blocks from the start, 16 rows took it 0.6 to 0.7 of the time. They cannot be
trained or saved, so this is for a model that answers only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zili.models.attention import Attention
from zili.models.decoder import Block, Decoder
from zili.models.feed_forward import FeedForward
from zili.models.layers import Linear
from zili.serving.kernels import Kernels
from zili.serving.slots import SlotEntry

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

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other [..., O]`, without a pass of its own."""
        return _product.binary(x, other, self._weight, self._bias, "add")


class PackedBlock(nn.Module):
    """A `Block` with a cache, in few operations: on few rows each costs about the same, however little it does."""

    def __init__(self, plain: Block, kernels: Kernels) -> None:
        super().__init__()
        attention, feed_forward = plain.attention, plain.feed_forward
        assert isinstance(attention, Attention) and isinstance(feed_forward, FeedForward)
        self._kernels, self._core, self._head_dim = kernels, attention.core, attention.head_dim
        self._heads = attention.query.out_features // attention.head_dim
        norms = (plain.attention_norm, plain.feed_forward_norm)
        self._norms = [(norm.weight.detach().float(), norm.eps) for norm in norms]
        self._input = PackedLinear(*_stacked(attention.query, attention.key, attention.value))
        self._output = PackedLinear(attention.output.weight, attention.output.bias)
        self._wide = PackedLinear(*_stacked(feed_forward.gate, feed_forward.up))
        self._down = PackedLinear(feed_forward.down.weight, feed_forward.down.bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, document_ids: Tensor | None, cache_entry: SlotEntry
    ) -> Tensor:
        """As `Block.forward`."""
        joined = self._input(self._kernels.norm(x, *self._norms[0]))
        keys, values = cache_entry.kept
        self._kernels.place(joined, cos, sin, cache_entry.rows, keys, values)
        query = joined.unflatten(-1, (-1, self._head_dim))[:, :, : self._heads]
        x = self._output.plus(self._core(query, keys, values, document_ids, 0.0).flatten(-2), x)
        joined = self._wide(self._kernels.norm(x, *self._norms[1]))
        return self._down.plus(self._kernels.swiglu(joined), x)


def _stacked(*linears: Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of `linears` as one."""
    weights: list[Tensor] = [linear.weight for linear in linears]
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(weights), torch.cat(biases) if biases else None


@torch.no_grad()
def pack(model: Decoder, kernels: Kernels | None) -> None:
    """Lay out the weights of `model`, on a CPU, for answering alone; on other chips they lie well as they are.

    Parts that are not made of plain `Linear` keep their form: those with an adapter, experts. Without kernels blocks do
    too, of packed `Linear`s.
    """
    if not _packs(model.head_weight):
        return
    output = model.head or model.embedding
    assert output is not None
    model.readout = PackedLinear(output.weight)
    model.head = None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if made := _packed(child, kernels):
                setattr(parent, name, made)


def _packed(module: nn.Module, kernels: Kernels | None) -> nn.Module | None:
    """`module` in its packed form; None: it has none, though what it is made of may."""
    linears = [child for child in module.modules() if isinstance(child, Linear)]
    if not all(one.leave is None and one.lora_a is None and _packs(one.weight) for one in linears):
        return None
    if type(module) is Linear:
        return PackedLinear(module.weight, module.bias)
    if kernels is None or type(module) is not Block or type(module.attention) is not Attention:
        return None
    return PackedBlock(module, kernels) if type(module.feed_forward) is FeedForward else None


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # Without instructions for it oneDNN refuses bfloat16.
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
