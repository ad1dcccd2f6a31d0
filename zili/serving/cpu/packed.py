"""Weights in the order in which the CPU's products read them.

A product of few rows takes as long as its weight takes to be read, if it is read as it lies. A library copies a weight
that lies in rows into blocks of its own at each product. Blocks cannot be trained or saved, so this is for a model that
answers only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zili import torch_private
from zili.chips.cpu import bf16_units
from zili.models.attention import Attention
from zili.models.cache import CacheEntry
from zili.models.decoder import Block, Decoder
from zili.models.feed_forward import FeedForward
from zili.models.layers import Linear
from zili.models.outputs import Routing
from zili.serving.cpu.kernels import Kernels

_ROWS = 512
"""Rows of a product that oneDNN lays the blocks out for. They do as well for few, but not those for 1 for many."""


class PackedLinear(nn.Module):
    """`x [..., I]` -> `[..., O]`, as the `Linear` it is made of, with blocks as oneDNN has them."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight [O, I]`, `bias [O]`."""
        super().__init__()
        self._weight = torch_private.onednn_layout(weight.detach(), _ROWS)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch_private.onednn_product(x, self._weight, self._bias, "none", [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other [..., O]`, without a pass of its own."""
        return torch_private.onednn_product.binary(x, other, self._weight, self._bias, "add")


class CompiledLinear(nn.Module):
    """`x [..., I]` -> `[..., O]`, as the `Linear` it is made of, by our own kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        """`weight [O, I]`, `bias [O]`."""
        super().__init__()
        self._kernels, self._out = kernels, len(weight)
        self._weight = kernels.laid_out(weight.detach())
        self._bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        return self._kernels.product(x, self._weight, self._out, self._bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other [..., O]`, without a pass of its own."""
        return self._kernels.product(x, self._weight, self._out, self._bias, other)


class PackedBlock(nn.Module):
    """A `Block` with a cache, in few operations: on few rows each costs about the same, however little it does."""

    def __init__(self, plain: Block, kernels: Kernels) -> None:
        super().__init__()
        attention, feed_forward = plain.attention, plain.feed_forward
        assert isinstance(attention, Attention) and isinstance(feed_forward, FeedForward)
        self._kernels, self._head_dim = kernels, attention.head_dim
        self._heads = attention.query.out_features // attention.head_dim
        norms = (plain.attention_norm, plain.feed_forward_norm)
        self._norms = [(norm.weight.detach().float(), norm.eps) for norm in norms]
        self._input = _linear(kernels, attention.query, attention.key, attention.value)
        self._output = _linear(kernels, attention.output)
        self._wide = _linear(kernels, feed_forward.gate, feed_forward.up)
        self._down = _linear(kernels, feed_forward.down)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_ids: Tensor | None,
        cache_entry: CacheEntry,
        routing: Routing | None = None,
    ) -> Tensor:
        """As `Block.forward`; there are no experts here."""
        joined = self._input(self._kernels.norm(x, *self._norms[0]))
        keys, values = cache_entry.kept
        self._kernels.place(joined, cos, sin, cache_entry.rows, keys, values)
        query = joined.unflatten(-1, (-1, self._head_dim))[:, :, : self._heads]
        x = self._output.plus(cache_entry.attend_laid(query).flatten(-2), x)
        joined = self._wide(self._kernels.norm(x, *self._norms[1]))
        return self._down.plus(self._kernels.swiglu(joined), x)


def _linear(kernels: Kernels | None, *parts: Linear) -> PackedLinear | CompiledLinear:
    """`parts`, which take the same, as one."""
    weights = [part.weight.detach() for part in parts]
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    return _laid_out(torch.cat(weights), torch.cat(biases) if biases else None, kernels)


def _laid_out(weight: Tensor, bias: Tensor | None, kernels: Kernels | None) -> PackedLinear | CompiledLinear:
    # Where there are instructions for bfloat16 oneDNN has them; ours took 0.57 to 0.96 of its time in float32
    # (benchmarks/serve_kernels.py).
    if kernels is not None and _compiles(weight, kernels):
        return CompiledLinear(weight, bias, kernels)
    return PackedLinear(weight, bias)


@torch.no_grad()
def pack(model: Decoder, kernels: Kernels | None) -> None:
    """Lay out the weights of `model`, on a CPU, for answering alone; on other chips they lie well as they are.

    Parts that are not made of plain `Linear` keep their form: those with an adapter, experts. Without kernels blocks do
    too, of packed `Linear`s.
    """
    if not _packs(model.head_weight, kernels):
        return
    output = model.head or model.embedding
    assert output is not None
    model.readout = _laid_out(output.weight.detach(), None, kernels)
    model.head = None
    _pack_parts(model, kernels)


def _pack_parts(parent: nn.Module, kernels: Kernels | None) -> None:
    # By name, so that nothing here keeps a part that was packed: one is in memory twice at a time.
    for name in [name for name, _ in parent.named_children()]:
        made = _packed(getattr(parent, name), kernels)
        if made is None:
            _pack_parts(getattr(parent, name), kernels)
        else:
            setattr(parent, name, made)


def _packed(module: nn.Module, kernels: Kernels | None) -> nn.Module | None:
    """`module` in its packed form; None: it has none, though what it is made of may."""
    linears = [child for child in module.modules() if isinstance(child, Linear)]
    if not all(one.leave is None and one.lora_a is None and _packs(one.weight, kernels) for one in linears):
        return None
    if type(module) is Linear:
        return _linear(kernels, module)
    if kernels is None or type(module) is not Block or type(module.attention) is not Attention:
        return None
    return PackedBlock(module, kernels) if type(module.feed_forward) is FeedForward else None


def _packs(weight: Tensor, kernels: Kernels | None) -> bool:
    if kernels is not None and _compiles(weight, kernels):
        return True
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or _has_bfloat16(weight))
    )


def _compiles(weight: Tensor, kernels: Kernels) -> bool:
    return weight.dtype == kernels.dtype and not (_has_bfloat16(weight) and bf16_units().value)


def _has_bfloat16(weight: Tensor) -> bool:
    """Whether oneDNN takes the numbers of `weight`, which are bfloat16: in some CPUs by fp32's instructions."""
    return weight.dtype == torch.bfloat16 and bool(torch_private.onednn_has_bf16())
