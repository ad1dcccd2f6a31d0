"""The decoder: one class for every model of the family, told apart by its `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zili import ops
from zili.config.mixture import LoraConfig
from zili.config.model import ModelConfig
from zili.models.attention import attention_of
from zili.models.cache import AttentionKernels, CacheEntry, KeyValueCache
from zili.models.initialization import fill, initial_value
from zili.models.layers import Embedding, Entrance, Linear, RMSNorm, local
from zili.models.mixture import Router, feed_forward_of
from zili.models.outputs import Outputs, Routing, logits, scaled
from zili.models.recomputation import Recompute, recomputed
from zili.models.rotary import Kept, rotary_tables


class Block(nn.Module):
    """One pre-norm layer: `h = x + attention(norm(x))`, `y = h + feed_forward(norm(h))`."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        """`number`: which layer of the model it is, from 0; it says whether there are experts."""
        super().__init__()
        self.dropout = config.hidden_dropout
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = attention_of(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = feed_forward_of(config, number)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_ids: Tensor | None = None,
        cache_entry: CacheEntry | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """`x [B, S, D]`, `cos, sin [S, d]`, `document_ids [B, T]` -> `[B, S, D]`."""
        branch = self._drop(self.attention(self.attention_norm(x), cos, sin, document_ids, cache_entry))
        normed, x = self.feed_forward_norm.after_adding(x, branch)
        return x + self._drop(self.feed_forward(normed, routing))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout) if self.training and self.dropout else branch


class Blocks(nn.Module):
    """Blocks under their number in the whole model, which part of a model keeps: `layers.17` is the 18th everywhere."""

    def __init__(self, numbers: range, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        for number in numbers:
            self.add_module(str(number), make(number))

    def items(self) -> Iterator[tuple[int, nn.Module]]:
        """Number and block, in order."""
        return ((int(name), block) for name, block in self.named_children())

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __getitem__(self, number: int) -> nn.Module:
        return self.get_submodule(str(number))

    def __len__(self) -> int:
        return len(self._modules)


class Decoder(nn.Module):
    """Token ids to hidden states, and to whatever the caller makes of them: logits, or a loss.

    Built on the `meta` device it has shapes only; built elsewhere its weights are those of seed 0 until
    `init_weights` or a checkpoint sets others. `recompute` is the trainer's switch: "full" keeps only each
    block's input for the backward pass.

    `part` builds some consecutive layers. The part with the first layer has the embedding and takes ids; every other
    takes the hidden states of the part before it. The part with the last layer has norm and head.

    A subclass may override `make_block` to have blocks of its own kind.
    """

    def __init__(self, config: ModelConfig, part: range | None = None) -> None:
        super().__init__()
        part = range(config.layers) if part is None else part
        first, last = part.start == 0, part.stop == config.layers
        self.config = config
        self.recompute: Recompute = "none"
        self.positions: Callable[[int, torch.device], Tensor] | None = None
        """Which of a row's positions this process has, given the row's length and where; None: all of them."""
        self._frequencies: Kept = {}
        self.vocabulary: ops.VocabularyPart | None = None
        """Which rows of the output matrix this process has; None: all of them."""
        self.tokens: Callable[[Tensor], Tensor] | None = None
        """Between matrices this process has some of the tokens of rows `[B, S, ...]`: which; None: all of them."""
        self.first = first
        # A tied output matrix is the embedding, and multi-token prediction embeds, so the last part may have it too.
        embeds = first or (last and bool(config.tied_embeddings or config.mtp_layers))
        self.embedding = Embedding(config.vocab_size, config.hidden_size) if embeds else None
        self.layers = Blocks(part, self.make_block)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps) if last else None
        self.gather = Entrance()
        """Before the output matrix, which is cut by rows of the vocabulary and so needs every token."""
        separate = last and not config.tied_embeddings
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False) if separate else None
        self.beside: list[str] = []
        """Names of the modules that an objective put here (`add_beside`)."""
        self.readout: Callable[[Tensor], Tensor] | None = None
        """The product with the output matrix, where that lies in another form for it; None: as it is."""
        if config.lora is not None:
            self._adapt(config.lora)
        if not next(self.parameters()).is_meta:
            self.init_weights(0)

    def make_block(self, number: int) -> nn.Module:
        """Layer `number` of the model, from 0. It is called as `Block.forward` is."""
        return Block(self.config, number)

    def add_beside(self, name: str, module: nn.Module) -> None:
        """Put what an objective learns beside the model into this part, under `name`: its weights are cut, sharded,
        saved and optimized with the others."""
        self.add_module(name, module)
        self.beside.append(name)

    def units(self) -> Iterator[nn.Module]:
        """Modules whose weights are used together: the blocks, and what an objective has beside them."""
        yield from self.layers
        yield from (self.get_submodule(name) for name in self.beside)

    def _adapt(self, lora: LoraConfig) -> None:
        """Adapters beside the matrices that have one; nothing else is trained."""
        self.requires_grad_(False)
        for name, module in self.layers.named_modules():
            if isinstance(module, Linear) and name.rpartition(".")[2] in lora.matrices:
                module.adapt(lora.rank, lora.scale)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter with its part of `initial_value(name, shape, config, seed)`."""
        for name, parameter in self.named_parameters():
            fill(parameter, initial_value(name, tuple(parameter.shape), self.config, seed))
        for buffer in self.buffers():  # the routers' biases
            buffer.zero_()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a checkpoint must hold of the model: parameters, and buffers that training moves."""
        yield from self.named_parameters()
        yield from self.named_buffers()

    def routers(self) -> Iterator[Router]:
        """The routers of this part, in the order of layers; multi-token prediction's comes last."""
        return (module for module in self.modules() if isinstance(module, Router))

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`: the output matrix, which is the embedding's when tied."""
        assert self.readout is None, "it lies in another form"
        weight = self.head or self.embedding
        assert weight is not None, "only the part with the last layer has it"
        return weight.weight

    def forward(
        self,
        inputs: Tensor,
        *,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        routing: Routing | None = None,
        then: Callable[[Outputs], Any] = logits,
    ) -> Any:
        """What `then` makes of the last layer's outputs: by default logits `[B, S, V]` in fp32 for ids `[B, S]`.

        A part without the last layer returns hidden states `[B, S, D]`, for the next part's `inputs`. `routing` is for
        the routers of a model that learns. Other arguments as for `hidden_states`.
        """
        x, run = self._blocks(inputs, document_ids, cache, routing)
        if self.norm is None:
            return x
        hidden = self.norm(x[:, -inputs.shape[1] :] if cache is not None else x)
        return then(Outputs(self, hidden, () if routing is None else tuple(routing.figures), run))

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden [..., D]`, as `hidden_states` returns it, to fp32 logits `[..., V]`."""
        product = ops.linear(hidden, local(self.head_weight)) if self.readout is None else self.readout(hidden)
        return scaled(product.float(), self.config.logit_multiplier)

    def embed(self, ids: Tensor) -> Tensor:
        """`ids [B, S]` -> `[B, S, D]`."""
        assert self.embedding is not None, "only some parts have it"
        return scaled(self.embedding(ids), self.config.embedding_multiplier)

    def hidden_states(
        self, inputs: Tensor, *, document_ids: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """`[B, S, D]` after the final norm, or after the last block of a part.

        Args:
            inputs: ids `[B, S]`; for a part without the first layer, hidden states `[B, S, D]`.
            document_ids: `[B, S]`, or with a cache `[B, T]` for cached and new tokens together; a token sees
                only its own document. None: one document a row. Always of whole rows, also where `inputs` has
                some of a row's positions.
            cache: tokens seen before; the new ones are added to it. Equals the pass without a cache over all
                tokens, whatever the rotary rule; see `KeyValueCache` for the price and for the published
                code's different behaviour. `inputs` may also be the row `[1, N]` that the cache has laid.
        """
        x, _ = self._blocks(inputs, document_ids, cache)
        return x if self.norm is None else self.norm(x[:, -inputs.shape[1] :] if cache is not None else x)

    def _blocks(
        self, inputs: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None, routing: Routing | None = None
    ) -> tuple[Tensor, Callable[[nn.Module, Tensor], Tensor]]:
        """What leaves the last block, and how another block of the same sequence is run."""
        length = inputs.shape[1] if document_ids is None else document_ids.shape[1]
        if cache is not None:
            inputs, positions, length = cache.extend(inputs)
        elif self.positions is not None:
            positions = self.positions(length, inputs.device)
        else:
            positions = torch.arange(length, device=inputs.device)
        rotary, head_dim = self.config.rotary, self.config.rotary_dim
        cos, sin = rotary_tables(rotary, head_dim, positions, length, self._frequencies)
        x = self.embed(inputs) if self.first else inputs
        if self.first and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # products run in half precision, what they are added up in does not
        for i, block in self.layers.items():
            entry = None if cache is None else cache.entry(i)
            x = self._run(block, x, cos, sin, document_ids, entry, routing)
        return x, lambda block, y: self._run(block, y, cos, sin, document_ids, None, routing)

    def _run(self, block: nn.Module, *arguments: Tensor | CacheEntry | Routing | None) -> Tensor:
        if self.recompute != "none" and self.training and torch.is_grad_enabled():
            return recomputed(block, self.recompute, *arguments)
        return block(*arguments)

    def loss_sum(self, input_ids: Tensor, labels: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """Sum of cross entropies over `labels [B, S]` that are not `IGNORE_INDEX`, 0-d fp32.

        Labels are aligned with the inputs: `labels[:, i]` is the token after `input_ids[:, i]`.
        """
        return self(input_ids, document_ids=document_ids, then=lambda outputs: outputs.cross_entropy(labels))

    def new_cache(
        self,
        slots: int,
        max_length: int,
        *,
        exact: bool = True,
        kernels: AttentionKernels | None = None,
    ) -> KeyValueCache:
        """An empty cache beside the weights, in their dtype; the rest is `KeyValueCache`'s."""
        weight = next(self.parameters())
        return KeyValueCache(
            self.config, slots, max_length, dtype=weight.dtype, device=weight.device, exact=exact, kernels=kernels
        )
